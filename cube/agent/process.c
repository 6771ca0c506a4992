#include "process.h"

#include "guest.h"
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHANNEL_BACKLOG (512u << 10) /* output waiting for the port; more stays in the pipes */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* Systems that insist on being PID 1: an init is its own supervisor. */
static bool wants_pid_one(const struct container *container)
{
    static const char *const inits[] = {"init", "systemd", "s6-svscan", "runit-init", "openrc-init"};
    if (container->pid_one != PID_ONE_AUTO)
        return container->pid_one == PID_ONE_PROGRAM;
    const char *slash = strrchr(container->arguments[0], '/');
    const char *base = slash ? slash + 1 : container->arguments[0];
    for (size_t i = 0; i < sizeof inits / sizeof *inits; i++)
        if (strcmp(base, inits[i]) == 0)
            return true;
    return false;
}

const char *process_start(struct process *process, const struct container *container,
                          const struct config *config)
{
    int in[2] = {-1, -1}, out[2], err[2], failure[2], control[2];
    *process = (struct process){.id = container->id, .container = container, .input = -1};
    process->supervised = !wants_pid_one(container);
    if (pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0 || pipe2(failure, O_CLOEXEC) < 0 ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control) < 0 ||
        (container->wants_stdin && pipe2(in, O_CLOEXEC) < 0))
        return problem("cannot make the container's pipes: %s", strerror(errno));
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct launch launch = {
        .container = container,
        .config = config,
        .standard = {container->wants_stdin ? in[0] : null, out[1], err[1]},
        .failure = failure[1],
        .control = control[1],
    };
    pid_t first = (pid_t)syscall(SYS_clone, CLONE_NEWNS | CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0);
    if (first < 0)
        return problem("cannot make the container's namespaces: %s", strerror(errno));
    if (first == 0) {
        /* Only these ends are the container's; all others would keep our pipes open. */
        close(out[0]);
        close(err[0]);
        close(failure[0]);
        close(control[0]);
        close_fd(&in[1]);
        launch_container(&launch, process->supervised);
    }
    close(out[1]);
    close(err[1]);
    close(failure[1]);
    close(control[1]);
    close_fd(&in[0]);
    close_fd(&null);
    process->first = first;
    process->running = true;
    process->control = control[0];
    process->failure = failure[0];
    process->output[0] = -1;
    process->output[1] = out[0];
    process->output[2] = err[0];
    process->credit[1] = process->credit[2] = OUTPUT_WINDOW;
    process->input = in[1];
    set_nonblocking(out[0]);
    set_nonblocking(err[0]);
    if (in[1] >= 0)
        set_nonblocking(in[1]);
    return NULL;
}

void process_signal(struct process *process, int number, bool group)
{
    if (process->first == 0 || number <= 0 || number >= NSIG)
        return;
    if (process->supervised && !process->status_known) {
        int32_t order[2] = {number, group};
        if (send(process->control, order, sizeof order, MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
            return;
    }
    if (!process->supervised && (!group || kill(-process->first, number) < 0))
        kill(process->first, number);
}

void process_feed(struct process *process, const uint8_t *bytes, size_t length)
{
    if (process->input >= 0 && !process->input_ended)
        buffer_append(&process->input_left, bytes, length);
}

void process_end_input(struct process *process)
{
    process->input_ended = true;
    if (process->input_left.length == 0)
        close_fd(&process->input);
}

static void grant(struct channel *channel, const struct process *process, size_t bytes)
{
    uint8_t credit[4];
    for (int i = 0; i < 4; i++)
        credit[i] = (uint8_t)(bytes >> (8 * i));
    channel_send(channel, FRAME_WINDOW, STREAM_STDIN, process->id, credit, sizeof credit);
}

void process_push_input(struct process *process, struct channel *channel)
{
    while (process->input >= 0 && process->input_left.length > 0) {
        ssize_t wrote = write(process->input, process->input_left.bytes, process->input_left.length);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0 && errno == EAGAIN)
            return;
        if (wrote < 0) { /* the program closed its stdin */
            buffer_free(&process->input_left);
            close_fd(&process->input);
            return;
        }
        buffer_consume(&process->input_left, (size_t)wrote);
        grant(channel, process, (size_t)wrote);
    }
    if (process->input_ended && process->input_left.length == 0)
        close_fd(&process->input);
}

void process_pull_output(struct process *process, unsigned stream, struct channel *channel)
{
    static uint8_t chunk[PAYLOAD_LIMIT];
    while (process->output[stream] >= 0 && process->credit[stream] > 0 &&
           channel_pending(channel) < CHANNEL_BACKLOG) {
        size_t size = process->credit[stream] < sizeof chunk ? process->credit[stream] : sizeof chunk;
        ssize_t got = read(process->output[stream], chunk, size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            close_fd(&process->output[stream]);
            channel_send(channel, FRAME_END, stream, process->id, NULL, 0);
            return;
        }
        process->credit[stream] -= (size_t)got;
        channel_send(channel, FRAME_DATA, stream, process->id, chunk, (size_t)got);
        channel_write(channel);
    }
}

void process_read_failure(struct process *process, struct channel *channel)
{
    struct start_failure failure;
    ssize_t got = read(process->failure, &failure, sizeof failure);
    if (got < 0 && errno == EINTR)
        return;
    if (got == (ssize_t)sizeof failure) {
        process->start_code = failure.code;
        failure.text[sizeof failure.text - 1] = 0;
        snprintf(process->start_problem, sizeof process->start_problem, "%s", failure.text);
    } else {
        channel_event(channel, process->id, "exec", monotonic_ns());
    }
    close_fd(&process->failure);
}

void process_read_control(struct process *process)
{
    int32_t status;
    ssize_t got = recv(process->control, &status, sizeof status, MSG_DONTWAIT);
    if (got == (ssize_t)sizeof status) {
        process->wait_status = status;
        process->status_known = true;
    } else if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
        close_fd(&process->control);
    }
}

void process_reaped(struct process *process, int wait_status)
{
    /* The supervisor told us its program's status before it ended; without that, its own counts. */
    if (process->control >= 0)
        process_read_control(process);
    if (!process->status_known)
        process->wait_status = wait_status;
    process->status_known = true;
    process->first = 0;
    close_fd(&process->control);
    close_fd(&process->input);
}

void process_report(struct process *process, struct channel *channel)
{
    if (!process->running || process->reported || process->first != 0 || process->failure >= 0 ||
        process->output[1] >= 0 || process->output[2] >= 0)
        return;
    int status = process->wait_status;
    int killer = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    int code = killer ? 128 + killer : WEXITSTATUS(status);
    struct buffer record = {0};
    if (process->start_code) {
        code = process->start_code;
        append_text(&record, KEY_TEXT, process->start_problem);
    }
    append_number(&record, KEY_CODE, (uint64_t)code);
    append_number(&record, KEY_SIGNAL, (uint64_t)killer);
    append_number(&record, KEY_READ_BYTES, guest_disk_read_bytes(process->container->root_disk));
    append_number(&record, KEY_AT, monotonic_ns());
    append_number(&record, KEY_SENT, monotonic_ns());
    channel_send(channel, FRAME_EXIT, 0, process->id, record.bytes, record.length);
    buffer_free(&record);
    process->reported = true;
}
