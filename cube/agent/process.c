#include "process.h"

#include "cgroup.h"
#include "guest.h"
#include "launch.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

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

void process_reset(struct process *process)
{
    if (process->id || process->running) {
        close_fd(&process->control);
        close_fd(&process->failure);
        close_fd(&process->input);
        close_fd(&process->output[1]);
        close_fd(&process->output[2]);
        buffer_free(&process->input_left);
        buffer_free(&process->exit_record);
    }
    *process = (struct process){
        .control = -1,
        .failure = -1,
        .input = -1,
        .output = {-1, -1, -1},
        .credit = {0, OUTPUT_WINDOW, OUTPUT_WINDOW},
    };
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

static bool make_pipe(int ends[2], bool wanted)
{
    ends[0] = ends[1] = -1;
    return !wanted || pipe2(ends, O_CLOEXEC) == 0;
}

/* Forks what `launch` says, with its pipes. `flags` are new namespaces. */
static const char *spawn(struct process *process, struct launch *launch, unsigned long flags)
{
    int in[2], out[2], err[2], failure[2], control[2] = {-1, -1};
    const struct program *program = &launch->program;
    bool made = make_pipe(in, program->wants_stdin && !program->tty);
    made = make_pipe(out, !program->tty) && made;
    made = make_pipe(err, !program->tty) && made;
    made = make_pipe(failure, true) && made;
    made = made && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control) == 0;
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    pid_t first = -1;
    if (made) {
        launch->standard[0] = in[0] >= 0 ? in[0] : null;
        launch->standard[1] = out[1];
        launch->standard[2] = err[1];
        launch->failure = failure[1];
        launch->control = control[1];
        first = (pid_t)syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    }
    int cause = errno;
    if (first == 0) {
        /* Only these ends are the child's; all others would keep our pipes open. */
        close_fd(&out[0]);
        close_fd(&err[0]);
        close_fd(&failure[0]);
        close_fd(&control[0]);
        close_fd(&in[1]);
        launch_container(launch, process->supervised);
    }
    close_fd(&out[1]);
    close_fd(&err[1]);
    close_fd(&failure[1]);
    close_fd(&control[1]);
    close_fd(&in[0]);
    close_fd(&null);
    process->control = control[0];
    process->failure = failure[0];
    process->output[1] = out[0];
    process->output[2] = err[0];
    process->input = in[1];
    process->tty = program->tty;
    if (first < 0) {
        uint32_t id = process->id;
        process->running = true;
        process_reset(process);
        process->id = id;
        return problem("cannot start a process: %s", strerror(cause));
    }
    process->first = first;
    process->running = true;
    for (int stream = 1; stream <= 2; stream++)
        if (process->output[stream] >= 0)
            set_nonblocking(process->output[stream]);
    if (process->input >= 0)
        set_nonblocking(process->input);
    return NULL;
}

const char *process_start(struct process *process, const struct container *container,
                          const struct config *config)
{
    process_reset(process);
    process->id = container->id;
    process->kind = PROCESS_CONTAINER;
    process->container = container;
    process->supervised = !wants_pid_one(container);
    const char *error = cgroup_make(container);
    if (error)
        return error;
    process->oom_before = cgroup_usage(container->id).oom_kills;
    struct launch launch = {
        .container = container,
        .config = config,
        .program = {.arguments = container->arguments,
                    .environment = container->environment,
                    .environment_count = container->environment_count,
                    .user = container->user,
                    .directory = container->working_directory,
                    .wants_stdin = container->wants_stdin,
                    .tty = container->tty},
        .joined = -1,
    };
    return spawn(process, &launch, CLONE_NEWNS | CLONE_NEWPID);
}

const char *process_exec(struct process *process, uint32_t id, const struct process *beside,
                         const struct config *config, const struct request *request)
{
    const struct container *container = beside->container;
    process_reset(process);
    process->id = id;
    process->kind = PROCESS_EXEC;
    process->container = container;
    process->supervised = true;
    if (request->argument_count == 0 || request->arguments[0][0] == 0)
        return "the request names no program";
    int joined = (int)syscall(SYS_pidfd_open, beside->first, 0);
    if (joined < 0)
        return problem("the container is not running: %s", strerror(errno));
    size_t count = container->environment_count + request->environment_count;
    char **environment = must_allocate((count + 1) * sizeof(char *));
    memcpy(environment, container->environment, container->environment_count * sizeof(char *));
    memcpy(environment + container->environment_count, request->environment,
           request->environment_count * sizeof(char *));
    bool own_user = request->user && request->user[0];
    bool own_directory = request->directory && request->directory[0];
    struct launch launch = {
        .container = container,
        .config = config,
        .program = {.arguments = request->arguments,
                    .environment = environment,
                    .environment_count = count,
                    .user = own_user ? request->user : container->user,
                    .directory = own_directory ? request->directory : container->working_directory,
                    .wants_stdin = request->wants_stdin,
                    .tty = request->tty,
                    .rows = request->rows,
                    .columns = request->columns},
        .joined = joined,
    };
    const char *error = spawn(process, &launch, 0);
    free(environment);
    close(joined);
    return error;
}

void process_refuse(struct process *process, uint32_t id, int code, const char *text,
                    struct channel *channel)
{
    const struct container *container = process->container;
    enum process_kind kind = process->kind;
    char kept[sizeof process->start_problem];
    snprintf(kept, sizeof kept, "%s", text);
    process_reset(process);
    process->id = id;
    process->kind = kind;
    process->container = container;
    process->start_code = code;
    memcpy(process->start_problem, kept, sizeof kept);
    process->status_known = true;
    process->running = true;
    process_report(process, channel);
}

void process_signal(struct process *process, int number, unsigned flags)
{
    if (process->kind == PROCESS_CONNECTION) {
        close_fd(&process->input);
        close_fd(&process->output[1]);
        process->start_code = 128 + SIGKILL;
        process->connecting = false;
        return;
    }
    if (process->first == 0 || number <= 0 || number >= NSIG)
        return;
    if (flags & SIGNAL_TO_EVERYTHING && process->kind == PROCESS_CONTAINER) {
        if (number == SIGKILL) /* the end of PID 1 is the end of them all */
            kill(process->first, SIGKILL);
        else
            cgroup_signal(process->container->id, number);
        return;
    }
    int group = (flags & SIGNAL_TO_GROUP) != 0;
    if (process->supervised && !process->status_known) {
        int32_t order[2] = {number, group};
        if (send(process->control, order, sizeof order, MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
            return;
    }
    if (!process->supervised && (!group || kill(-process->first, number) < 0))
        kill(process->first, number);
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
        process->executed = true;
        channel_event(channel, process->id, "exec", monotonic_ns());
    }
    close_fd(&process->failure);
}

void process_read_control(struct process *process)
{
    for (;;) {
        int32_t number;
        int terminal;
        long got = receive_message(process->control, &number, &terminal);
        if (got == (long)sizeof number && terminal >= 0 && process->tty && process->output[1] < 0) {
            process->output[1] = terminal;
            process->input = fcntl(terminal, F_DUPFD_CLOEXEC, 3);
            set_nonblocking(terminal);
        } else if (got == (long)sizeof number) {
            close_fd(&terminal);
            process->wait_status = number;
            process->status_known = true;
        } else {
            if (got >= 0 || (errno != EAGAIN && errno != EINTR))
                close_fd(&process->control);
            return;
        }
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

static bool is_over(const struct process *process)
{
    return process->running && !process->reported && process->first == 0 && !process->pending &&
           process->failure < 0 && process->output[1] < 0 && process->output[2] < 0 &&
           (process->kind != PROCESS_CONNECTION || process->input < 0);
}

void process_report(struct process *process, struct channel *channel)
{
    if (!is_over(process))
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
    if (process->kind == PROCESS_CONTAINER) {
        uint64_t kills = cgroup_usage(process->id).oom_kills;
        append_number(&record, KEY_READ_BYTES,
                      guest_disk_read_bytes(process->container->root_disk));
        append_number(&record, KEY_OOM_KILLS,
                      kills > process->oom_before ? kills - process->oom_before : 0);
    }
    append_number(&record, KEY_AT, monotonic_ns());
    append_number(&record, KEY_SENT, monotonic_ns());
    channel_send(channel, FRAME_EXIT, 0, process->id, record.bytes, record.length);
    process->exit_record = record;
    process->reported = true;
    if (process->kind != PROCESS_CONTAINER)
        process_reset(process);
}

void process_retell(struct process *process, struct channel *channel)
{
    if (!process->running)
        return;
    channel_event(channel, process->id, "known", monotonic_ns());
    if (process->executed)
        channel_event(channel, process->id, "exec", monotonic_ns());
    for (unsigned stream = 1; stream <= 2; stream++) {
        process->credit[stream] = OUTPUT_WINDOW;
        process->waiting_since[stream] = 0;
        if (process->output[stream] < 0 && !process->pending && !process->tty)
            channel_send(channel, FRAME_END, stream, process->id, NULL, 0);
    }
    if (process->reported)
        channel_send(channel, FRAME_EXIT, 0, process->id, process->exit_record.bytes,
                     process->exit_record.length);
}
