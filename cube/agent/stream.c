/* The bytes of processes: stdin in, output out, both within the windows; connections too. */
#include "guest.h"
#include "process.h"
#include "terminal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHANNEL_BACKLOG (512u << 10) /* output waiting for the port; more stays in the pipes */
#define INPUT_LIMIT (4u * INPUT_WINDOW) /* several hosts, each with a window of its own */
#define DISCARD_AT_ONCE (1u << 20)
#define END_OF_INPUT 4 /* what a terminal's reader takes as the end */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

const char *process_connect(struct process *process, uint32_t id, const struct request *request)
{
    struct sockaddr_storage storage = {0};
    struct sockaddr_in *four = (struct sockaddr_in *)&storage;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)&storage;
    const char *address = request->address && request->address[0] ? request->address : "127.0.0.1";
    process_reset(process);
    process->id = id;
    process->kind = PROCESS_CONNECTION;
    if (inet_pton(AF_INET, address, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(request->port);
    } else if (inet_pton(AF_INET6, address, &six->sin6_addr) == 1) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(request->port);
    } else {
        return problem("\"%.60s\" is not an IP address", address);
    }
    int handle = socket(storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (handle < 0)
        return problem("no socket: %s", strerror(errno));
    socklen_t length = storage.ss_family == AF_INET ? sizeof *four : sizeof *six;
    if (connect(handle, (struct sockaddr *)&storage, length) < 0 && errno != EINPROGRESS) {
        int cause = errno;
        close(handle);
        return problem("cannot connect to %.60s port %u: %s", address, request->port,
                       strerror(cause));
    }
    process->output[1] = handle;
    process->input = fcntl(handle, F_DUPFD_CLOEXEC, 3);
    process->connecting = true;
    process->running = true;
    return NULL;
}

void process_drop_streams(struct process *process)
{
    close_fd(&process->output[1]);
    close_fd(&process->output[2]);
    close_fd(&process->input);
}

void process_check_connection(struct process *process, struct channel *channel)
{
    struct pollfd made = {.fd = process->output[1], .events = POLLOUT};
    if (!process->connecting || poll(&made, 1, 0) <= 0)
        return;
    int cause = 0;
    socklen_t length = sizeof cause;
    getsockopt(process->output[1], SOL_SOCKET, SO_ERROR, &cause, &length);
    process->connecting = false;
    if (cause == 0) {
        process->executed = true;
        channel_event(channel, process->id, "exec", monotonic_ns());
        return;
    }
    process->start_code = CONNECTION_REFUSED;
    strncpy(process->start_problem, strerror(cause), sizeof process->start_problem - 1);
    close_fd(&process->output[1]);
    close_fd(&process->input);
}

void process_feed(struct process *process, const uint8_t *bytes, size_t length)
{
    if (process->input >= 0 && !process->input_ended &&
        process->input_left.length + length <= INPUT_LIMIT)
        buffer_append(&process->input_left, bytes, length);
}

static void finish_input(struct process *process)
{
    if (process->kind == PROCESS_CONNECTION && process->input >= 0)
        shutdown(process->input, SHUT_WR);
    close_fd(&process->input);
}

void process_end_input(struct process *process)
{
    static const uint8_t end = END_OF_INPUT;
    if (process->tty)
        process_feed(process, &end, 1);
    process->input_ended = true;
    if (process->input_left.length == 0 && !process->tty && !process->connecting)
        finish_input(process);
}

void process_resize(struct process *process, uint16_t rows, uint16_t columns)
{
    if (process->tty && process->output[1] >= 0)
        terminal_resize(process->output[1], rows, columns);
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
    if (process->connecting)
        return;
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
    if (process->input_ended && process->input_left.length == 0 && !process->tty)
        finish_input(process);
}

void process_grant(struct process *process, unsigned stream, uint32_t bytes)
{
    if (stream != STREAM_STDOUT && stream != STREAM_STDERR)
        return;
    process->credit[stream] += bytes;
    if (process->credit[stream] > OUTPUT_WINDOW)
        process->credit[stream] = OUTPUT_WINDOW;
    process->waiting_since[stream] = 0;
}

static void tell_loss(struct process *process, unsigned stream, struct channel *channel)
{
    uint8_t bytes[8];
    if (process->lost[stream] == 0)
        return;
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(process->lost[stream] >> (8 * i));
    channel_send(channel, FRAME_LOST, stream, process->id, bytes, sizeof bytes);
    process->lost[stream] = 0;
}

static bool may_discard(const struct process *process)
{
    return process->kind == PROCESS_CONTAINER && process->container->discard_after_ms > 0;
}

bool process_holds_back(const struct process *process, const struct channel *channel)
{
    bool port_full = channel_pending(channel) >= CHANNEL_BACKLOG;
    for (int stream = 1; may_discard(process) && stream <= 2; stream++)
        if (process->output[stream] >= 0 && (port_full || process->credit[stream] == 0))
            return true;
    return false;
}

/* Whether output has been held back for longer than its container may have to wait. */
static bool must_discard(struct process *process, unsigned stream, const struct channel *channel)
{
    if (!may_discard(process))
        return false;
    uint64_t now = monotonic_ns(), since = 0;
    if (process->credit[stream] == 0)
        since = process->waiting_since[stream] ? process->waiting_since[stream] : now;
    else if (channel_pending(channel) >= CHANNEL_BACKLOG)
        since = channel->progress_at;
    if (process->credit[stream] == 0)
        process->waiting_since[stream] = since;
    return since && now - since >= process->container->discard_after_ms * 1000000u;
}

static void end_output(struct process *process, unsigned stream, struct channel *channel)
{
    close_fd(&process->output[stream]);
    tell_loss(process, stream, channel);
    channel_send(channel, FRAME_END, stream, process->id, NULL, 0);
}

void process_pull_output(struct process *process, unsigned stream, struct channel *channel)
{
    static uint8_t chunk[PAYLOAD_LIMIT];
    if (process->connecting)
        return;
    bool discard = must_discard(process, stream, channel);
    size_t budget = DISCARD_AT_ONCE;
    while (process->output[stream] >= 0 && budget > 0 &&
           (discard || (process->credit[stream] > 0 && channel_pending(channel) < CHANNEL_BACKLOG))) {
        size_t size = process->credit[stream] < sizeof chunk ? process->credit[stream] : sizeof chunk;
        ssize_t got = read(process->output[stream], chunk, discard ? sizeof chunk : size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN) {
            /* Something in the background may keep an exec's streams open for ever. */
            if (process->kind == PROCESS_EXEC && process->first == 0 && process->failure < 0)
                end_output(process, stream, channel);
            return;
        }
        if (got <= 0) {
            end_output(process, stream, channel);
            return;
        }
        if (discard) {
            process->lost[stream] += (size_t)got;
            budget -= (size_t)got < budget ? (size_t)got : budget;
            continue;
        }
        tell_loss(process, stream, channel);
        process->credit[stream] -= (size_t)got;
        channel_send(channel, FRAME_DATA, stream, process->id, chunk, (size_t)got);
        channel_write(channel);
    }
}
