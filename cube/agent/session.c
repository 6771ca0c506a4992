#include "session.h"

#include "cgroup.h"
#include "guest.h"
#include "launch.h"
#include "network.h"
#include "process.h"
#include "request.h"
#include "root.h"
#include "volume.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define OWN_LIMIT 64u /* execs and connections at a time */
#define PROCESS_LIMIT (CONTAINER_LIMIT + OWN_LIMIT)
#define FDS_PER_PROCESS 5
#define FIRST_OWN_ID 0x10000u
#define CANNOT_SERVE 125
#define CHECK_MS 500 /* how often held-back output and volumes are looked at */
#define END_NS 3000000000u

/* Containers have the first places, in the configuration's order; the rest is for what comes. */
static struct process processes[PROCESS_LIMIT];

void session_hello(struct session *session)
{
    struct buffer record = {0};
    append_number(&record, KEY_VERSION, PROTOCOL_VERSION);
    append_number(&record, KEY_AT, session->started);
    append_number(&record, KEY_SENT, monotonic_ns());
    channel_send(&session->channel, FRAME_HELLO, 0, 0, record.bytes, record.length);
    buffer_free(&record);
    channel_write(&session->channel);
}

void session_log(struct session *session, const char *text)
{
    channel_send(&session->channel, FRAME_LOG, 0, 0, text, strlen(text));
}

static struct process *find_process(uint32_t id)
{
    for (size_t i = 0; i < PROCESS_LIMIT; i++)
        if (id && processes[i].id == id && processes[i].running && !processes[i].reported)
            return &processes[i];
    return NULL;
}

static struct process *container_process(const struct session *session, uint32_t id)
{
    for (size_t i = 0; i < session->config.container_count; i++)
        if (session->config.containers[i].id == id)
            return &processes[i];
    return NULL;
}

/* A place for an exec or connection; NULL when all are taken or the id is in use. */
static struct process *free_place(uint32_t id)
{
    struct process *place = NULL;
    for (size_t i = PROCESS_LIMIT; i-- > CONTAINER_LIMIT;) {
        if (processes[i].running && processes[i].id == id)
            return NULL;
        if (!processes[i].running)
            place = &processes[i];
    }
    return place;
}

/* NULL also while its volumes are not there yet. */
static const char *start_now(struct session *session, struct process *process,
                             const struct container *container)
{
    const char *error;
    if (!volumes_ready(&session->config, container, &error))
        return NULL;
    process->pending = false;
    if (error == NULL)
        error = root_mount(container);
    if (error == NULL) {
        channel_event(&session->channel, container->id, "root-mounted", monotonic_ns());
        error = process_start(process, container, &session->config);
    }
    return error;
}

const char *session_start(struct session *session, size_t index)
{
    const struct container *container = &session->config.containers[index];
    struct process *process = &processes[index];
    if (process->running && !process->reported)
        return "the container runs already";
    process_reset(process);
    process->id = container->id;
    process->kind = PROCESS_CONTAINER;
    process->container = container;
    process->running = process->pending = true;
    const char *error = start_now(session, process, container);
    /* A machine whose only purpose cannot be served says so itself; a pod has other containers. */
    if (error && container->held)
        process_refuse(process, container->id, CANNOT_SERVE, error, &session->channel);
    else if (error)
        process->running = process->pending = false;
    return container->held ? NULL : error;
}

static void on_hello(struct session *session, const struct frame *frame)
{
    struct reader reader = {frame->payload, frame->length, false};
    struct field field;
    uint64_t realtime;
    session->host_said_hello = true;
    while (next_field(&reader, &field))
        if (field.key == KEY_REALTIME && field_number(&field, &realtime))
            guest_set_clock(realtime);
}

/* A new host knows nothing: what the old one ran goes, and it hears about every container. */
static void on_new_host(struct session *session, const uint8_t nonce[SYNC_NONCE])
{
    channel_restart(&session->channel, nonce);
    session_hello(session);
    for (size_t i = 0; i < PROCESS_LIMIT; i++) {
        struct process *process = &processes[i];
        if (i < CONTAINER_LIMIT) {
            process_retell(process, &session->channel);
        } else if (process->running) {
            process->id = 0; /* its number may soon be another's */
            process_signal(process, SIGKILL, SIGNAL_TO_GROUP);
            process_drop_streams(process);
        }
    }
    channel_event(&session->channel, 0, "adopted", monotonic_ns());
}

static void on_request(struct session *session, const struct frame *frame)
{
    struct request request;
    struct process *place = frame->process >= FIRST_OWN_ID ? free_place(frame->process) : NULL;
    if (place == NULL) {
        session_log(session, "a request had no free place, or a number that is in use");
        return;
    }
    const char *error = request_parse(frame->payload, frame->length, &request);
    process_reset(place);
    place->kind = frame->type == FRAME_CONNECT ? PROCESS_CONNECTION : PROCESS_EXEC;
    int code = CANNOT_SERVE;
    if (error == NULL && frame->type == FRAME_CONNECT) {
        error = process_connect(place, frame->process, &request);
        code = CONNECTION_REFUSED;
    } else if (error == NULL) {
        const struct process *beside = container_process(session, request.container);
        if (beside == NULL || !beside->executed || beside->first == 0)
            error = "the container is not running";
        else
            error = process_exec(place, frame->process, beside, &session->config, &request);
    }
    if (error)
        process_refuse(place, frame->process, code, error, &session->channel);
    request_free(&request);
}

static void on_resize(struct process *process, const struct frame *frame)
{
    struct request request;
    if (request_parse(frame->payload, frame->length, &request) == NULL)
        process_resize(process, request.rows, request.columns);
    request_free(&request);
}

static void append_usage(struct buffer *record, uint32_t id, const struct container *container)
{
    struct usage used = cgroup_usage(id);
    struct buffer part = {0};
    uint64_t read_bytes = guest_disk_read_bytes(container->root_disk);
    append_number(&part, KEY_CONTAINER, id);
    append_number(&part, KEY_CPU_NS, used.cpu_ns);
    append_number(&part, KEY_MEMORY_BYTES, used.memory_bytes);
    append_number(&part, KEY_MEMORY_LIMIT, used.memory_limit);
    append_number(&part, KEY_PIDS, used.pids);
    append_number(&part, KEY_READ_BYTES, used.read_bytes > read_bytes ? used.read_bytes : read_bytes);
    append_number(&part, KEY_WRITE_BYTES, used.write_bytes);
    append_number(&part, KEY_OOM_KILLS, used.oom_kills);
    append_field(record, KEY_USAGE, part.bytes, part.length);
    buffer_free(&part);
}

static void send_stats(struct session *session)
{
    struct buffer record = {0};
    uint64_t total, available, received, sent;
    for (size_t i = 0; i < session->config.container_count; i++)
        append_usage(&record, session->config.containers[i].id, &session->config.containers[i]);
    guest_memory(&total, &available);
    network_traffic(&received, &sent);
    append_number(&record, KEY_CPU_NS, cgroup_total().cpu_ns);
    append_number(&record, KEY_MEMORY_TOTAL, total);
    append_number(&record, KEY_MEMORY_FREE, available);
    append_number(&record, KEY_RECEIVED_BYTES, received);
    append_number(&record, KEY_SENT_BYTES, sent);
    channel_send(&session->channel, FRAME_STATS, 0, 0, record.bytes, record.length);
    buffer_free(&record);
}

static void on_start(struct session *session, uint32_t id)
{
    const struct process *process = container_process(session, id);
    const char *error = process ? session_start(session, (size_t)(process - processes))
                                : "there is no such container";
    if (error)
        session_log(session, error);
}

static void on_process_frame(struct session *session, const struct frame *frame)
{
    struct process *process = find_process(frame->process);
    if (process == NULL)
        return; /* over already, or a newer host's frame: neither is an error */
    switch (frame->type) {
    case FRAME_DATA:
        process_feed(process, frame->payload, frame->length);
        process_push_input(process, &session->channel);
        break;
    case FRAME_END:
        process_end_input(process);
        break;
    case FRAME_WINDOW:
        if (frame->length == 4)
            process_grant(process, frame->stream, load32(frame->payload));
        break;
    case FRAME_SIGNAL:
        if (frame->length == 8)
            process_signal(process, (int)load32(frame->payload), load32(frame->payload + 4));
        break;
    case FRAME_RESIZE:
        on_resize(process, frame);
        break;
    default:
        break;
    }
}

static void on_frame(struct session *session, const struct frame *frame)
{
    switch (frame->type) {
    case 0:
        if (frame->length == SYNC_NONCE && session->config.has_sync_key)
            on_new_host(session, frame->payload);
        break;
    case FRAME_HELLO:
        on_hello(session, frame);
        break;
    case FRAME_SHUTDOWN:
        session->shutdown_asked = true;
        break;
    case FRAME_START:
        on_start(session, frame->process);
        break;
    case FRAME_EXEC:
    case FRAME_CONNECT:
        on_request(session, frame);
        break;
    case FRAME_STATS:
        send_stats(session);
        break;
    case FRAME_PING:
        channel_send(&session->channel, FRAME_PING, 0, 0, frame->payload, frame->length);
        break;
    default:
        on_process_frame(session, frame);
    }
}

static void reap(void)
{
    int status;
    pid_t ended;
    while ((ended = waitpid(-1, &status, WNOHANG)) > 0) {
        if (volume_reaped(ended, status))
            continue;
        for (size_t i = 0; i < PROCESS_LIMIT; i++)
            if (processes[i].running && processes[i].first == ended)
                process_reaped(&processes[i], status);
    }
}

static void move(struct session *session, struct process *process)
{
    struct channel *channel = &session->channel;
    const char *error = process->pending ? start_now(session, process, process->container) : NULL;
    if (error)
        process_refuse(process, process->id, CANNOT_SERVE, error, channel);
    if (process->pending || !process->running || process->reported)
        return;
    process_check_connection(process, channel);
    struct pollfd failure = {.fd = process->failure, .events = POLLIN};
    if (process->failure >= 0 && poll(&failure, 1, 0) > 0)
        process_read_failure(process, channel);
    if (process->control >= 0)
        process_read_control(process);
    process_push_input(process, channel);
    process_pull_output(process, STREAM_STDOUT, channel);
    process_pull_output(process, STREAM_STDERR, channel);
    process_report(process, channel);
}

/* What to wait for on behalf of one process. */
static nfds_t add_wanted(const struct process *process, bool port_busy, struct pollfd *wanted)
{
    nfds_t count = 0;
    for (unsigned stream = 1; stream <= 2; stream++)
        if (process->output[stream] >= 0 && process->connecting)
            wanted[count++] = (struct pollfd){.fd = process->output[stream], .events = POLLOUT};
        else if (process->output[stream] >= 0 && process->credit[stream] > 0 && !port_busy)
            wanted[count++] = (struct pollfd){.fd = process->output[stream], .events = POLLIN};
    if (process->failure >= 0)
        wanted[count++] = (struct pollfd){.fd = process->failure, .events = POLLIN};
    if (process->control >= 0)
        wanted[count++] = (struct pollfd){.fd = process->control, .events = POLLIN};
    if (process->input >= 0 && process->input_left.length > 0 && !process->connecting)
        wanted[count++] = (struct pollfd){.fd = process->input, .events = POLLOUT};
    return count;
}

void session_turn(struct session *session, int timeout_ms)
{
    struct channel *channel = &session->channel;
    static struct pollfd wanted[3 + PROCESS_LIMIT * FDS_PER_PROCESS];
    bool port_busy = channel_pending(channel) > 0;
    nfds_t count = 0;
    wanted[count++] = (struct pollfd){.fd = session->children, .events = POLLIN};
    wanted[count++] = (struct pollfd){
        .fd = channel->fd,
        .events = (short)(POLLIN | (port_busy ? POLLOUT : 0)),
    };
    wanted[count++] = (struct pollfd){.fd = channel->listener, .events = POLLIN};
    for (size_t i = 0; i < PROCESS_LIMIT; i++) {
        if (!processes[i].running || processes[i].reported)
            continue;
        count += add_wanted(&processes[i], port_busy, wanted + count);
        bool look_again = processes[i].pending || process_holds_back(&processes[i], channel);
        if (look_again && (timeout_ms < 0 || timeout_ms > CHECK_MS))
            timeout_ms = CHECK_MS;
    }
    if (poll(wanted, count, timeout_ms) < 0)
        return;
    if (channel_accept(channel))
        session_hello(session);
    else if (wanted[1].revents & POLLHUP && channel->listener < 0)
        usleep(20000); /* nobody is connected: the port would wake us without end */
    struct signalfd_siginfo drained;
    while (read(session->children, &drained, sizeof drained) > 0)
        continue;
    struct frame frame;
    bool more = true;
    while (more && !channel->host_gone)
        if (channel_read(channel, &frame, &more))
            on_frame(session, &frame);
    reap();
    for (size_t i = 0; i < PROCESS_LIMIT; i++)
        move(session, &processes[i]);
    channel_write(channel);
}

void session_end(struct session *session)
{
    for (size_t i = PROCESS_LIMIT; i-- > 0;)
        if (processes[i].first > 0)
            kill(processes[i].first, SIGKILL);
    bool left = true;
    for (uint64_t end = monotonic_ns() + END_NS; left && monotonic_ns() < end;) {
        left = false;
        reap();
        for (size_t i = 0; i < PROCESS_LIMIT; i++)
            left = left || (processes[i].running && processes[i].first > 0);
        if (left)
            usleep(2000);
    }
    volumes_unmount(&session->config);
    for (size_t i = 0; i < session->config.container_count; i++)
        root_unmount(&session->config.containers[i]);
}
