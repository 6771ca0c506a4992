/* cube-agent: PID 1 of a microVM. Mounts what containers need, runs them, carries their streams
 * and exit statuses to the host, and powers off. See PROTOCOL.md.
 */
#include "channel.h"
#include "config.h"
#include "guest.h"
#include "process.h"
#include "root.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT_NAME "cubecache.agent"
#define FDS_PER_PROCESS 5

static struct channel channel = {.fd = -1};
static struct config config;
static struct process processes[CONTAINER_LIMIT];
static size_t process_count;
static bool host_said_hello;
static bool shutdown_asked;

static void say_hello(uint64_t started)
{
    struct buffer record = {0};
    append_number(&record, KEY_VERSION, PROTOCOL_VERSION);
    append_number(&record, KEY_AT, started);
    append_number(&record, KEY_SENT, monotonic_ns());
    channel_send(&channel, FRAME_HELLO, 0, 0, record.bytes, record.length);
    buffer_free(&record);
    channel_write(&channel);
}

static void log_line(const char *text)
{
    channel_send(&channel, FRAME_LOG, 0, 0, text, strlen(text));
}

static struct process *find_process(uint32_t id)
{
    for (size_t i = 0; i < process_count; i++)
        if (processes[i].id == id && processes[i].running)
            return &processes[i];
    return NULL;
}

static void on_hello(const struct frame *frame)
{
    struct reader reader = {frame->payload, frame->length, false};
    struct field field;
    uint64_t realtime;
    host_said_hello = true;
    while (next_field(&reader, &field))
        if (field.key == KEY_REALTIME && field_number(&field, &realtime))
            guest_set_clock(realtime);
}

static void on_frame(const struct frame *frame)
{
    if (frame->type == FRAME_HELLO) {
        on_hello(frame);
        return;
    }
    if (frame->type == FRAME_SHUTDOWN) {
        shutdown_asked = true;
        return;
    }
    struct process *process = find_process(frame->process);
    if (process == NULL)
        return; /* over already, or a newer host's frame: neither is an error */
    switch (frame->type) {
    case FRAME_DATA:
        process_feed(process, frame->payload, frame->length);
        process_push_input(process, &channel);
        break;
    case FRAME_END:
        process_end_input(process);
        break;
    case FRAME_WINDOW:
        if (frame->length == 4 && (frame->stream == STREAM_STDOUT || frame->stream == STREAM_STDERR))
            process->credit[frame->stream] += load32(frame->payload);
        break;
    case FRAME_SIGNAL:
        if (frame->length == 8)
            process_signal(process, (int)load32(frame->payload),
                           load32(frame->payload + 4) & SIGNAL_TO_GROUP);
        break;
    default:
        break;
    }
}

static void read_host(void)
{
    struct frame frame;
    bool more = true;
    while (more && !channel.host_gone)
        if (channel_read(&channel, &frame, &more))
            on_frame(&frame);
}

static void reap(void)
{
    int status;
    pid_t ended;
    while ((ended = waitpid(-1, &status, WNOHANG)) > 0)
        for (size_t i = 0; i < process_count; i++)
            if (processes[i].running && processes[i].first == ended)
                process_reaped(&processes[i], status);
}

/* One round of the event loop: waits for anything, then moves everything that can move. */
static void turn(int children, int timeout_ms)
{
    struct pollfd wanted[2 + CONTAINER_LIMIT * FDS_PER_PROCESS];
    nfds_t count = 0;
    wanted[count++] = (struct pollfd){.fd = children, .events = POLLIN};
    wanted[count++] = (struct pollfd){
        .fd = channel.fd,
        .events = (short)(POLLIN | (channel_pending(&channel) ? POLLOUT : 0)),
    };
    for (size_t i = 0; i < process_count; i++) {
        struct process *process = &processes[i];
        if (!process->running)
            continue;
        for (unsigned stream = 1; stream <= 2; stream++)
            if (process->output[stream] >= 0 && process->credit[stream] > 0 &&
                channel_pending(&channel) == 0)
                wanted[count++] = (struct pollfd){.fd = process->output[stream], .events = POLLIN};
        if (process->failure >= 0)
            wanted[count++] = (struct pollfd){.fd = process->failure, .events = POLLIN};
        if (process->control >= 0)
            wanted[count++] = (struct pollfd){.fd = process->control, .events = POLLIN};
        if (process->input >= 0 && process->input_left.length > 0)
            wanted[count++] = (struct pollfd){.fd = process->input, .events = POLLOUT};
    }
    if (poll(wanted, count, timeout_ms) < 0)
        return;
    if (wanted[1].revents & POLLHUP)
        usleep(20000); /* nobody is connected: the port would wake us without end */
    struct signalfd_siginfo drained;
    while (read(children, &drained, sizeof drained) > 0)
        continue;
    read_host();
    reap();
    for (size_t i = 0; i < process_count; i++) {
        struct process *process = &processes[i];
        if (!process->running)
            continue;
        struct pollfd failure = {.fd = process->failure, .events = POLLIN};
        if (process->failure >= 0 && poll(&failure, 1, 0) > 0)
            process_read_failure(process, &channel);
        if (process->control >= 0)
            process_read_control(process);
        process_push_input(process, &channel);
        process_pull_output(process, STREAM_STDOUT, &channel);
        process_pull_output(process, STREAM_STDERR, &channel);
        process_report(process, &channel);
    }
    channel_write(&channel);
}

static int watch_children(void)
{
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
}

static _Noreturn void fail(int children, const char *text)
{
    console_line(text);
    if (channel.fd >= 0) {
        struct buffer record = {0};
        append_text(&record, KEY_TEXT, text);
        channel_send(&channel, FRAME_FAILED, 0, 0, record.bytes, record.length);
        buffer_free(&record);
        uint64_t end = monotonic_ns() + 10000000000u;
        while (!shutdown_asked && !channel.host_gone && monotonic_ns() < end)
            turn(children, 200);
    }
    guest_power_off();
}

static void start_containers(int children)
{
    for (size_t i = 0; i < config.container_count; i++) {
        const struct container *container = &config.containers[i];
        const char *error = root_mount(container);
        if (error == NULL)
            channel_event(&channel, container->id, "root-mounted", monotonic_ns());
        channel_write(&channel);
        /* The host's answer to our greeting carries the time: it has come by now, or soon. */
        for (int rounds = 0; !host_said_hello && !channel.host_gone && rounds < 50; rounds++)
            turn(children, 10);
        if (error == NULL)
            error = process_start(&processes[process_count], container, &config);
        if (error)
            fail(children, error);
        process_count++;
    }
}

int main(void)
{
    uint64_t started = monotonic_ns();
    guest_mount_base();
    for (int fd = open("/dev/null", O_RDWR); fd >= 0 && fd < 2; fd = open("/dev/null", O_RDWR))
        continue; /* 0, 1 and 2 must be taken, or a pipe would land there */
    if (guest_cmdline_has("cube.probe")) {
        console_line("probe-ok");
        guest_power_off();
    }
    int children = watch_children();
    const char *error = guest_load_boot_modules();
    uint64_t loaded = monotonic_ns();
    if (error == NULL)
        error = guest_leave_initramfs();
    if (error)
        fail(children, error);
    if (!channel_open(&channel, PORT_NAME, 5000))
        fail(children, "this machine has no virtio-serial port named " PORT_NAME);
    say_hello(started);
    channel_event(&channel, 0, "modules-loaded", loaded);

    uint8_t header[CONFIG_HEADER], *body = NULL;
    size_t length = 0;
    error = guest_read_config(header, &body, &length);
    if (error == NULL)
        error = config_parse(header, body, length, &config);
    if (error)
        fail(children, error);
    free(body);
    for (size_t i = 0; i < config.module_set_count; i++) {
        error = guest_load_modules(config.module_sets[i]);
        if (error)
            fail(children, error);
    }
    if (config.clock_ns && !host_said_hello)
        guest_set_clock(config.clock_ns + monotonic_ns());
    if (config.hostname && sethostname(config.hostname, strlen(config.hostname)) < 0)
        log_line("the host name was not accepted");
    guest_loopback_up();
    start_containers(children);
    while (!shutdown_asked && !channel.host_gone)
        turn(children, -1);
    for (size_t i = 0; i < process_count; i++)
        root_unmount(processes[i].container);
    guest_power_off();
}
