#include "channel.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define SYNC_KEY_LENGTH 16u
#define KEY_BEGUN (SYNC_KEY_LENGTH / 2)
#define WRITE_SIZE 32768u /* the port's driver takes no more in one call */

uint64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int find_port(const char *wanted)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    if (ports == NULL)
        return -1;
    int found = -1;
    struct dirent *entry;
    while (found < 0 && (entry = readdir(ports)) != NULL) {
        char path[320], name[64];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t got = file < 0 ? -1 : read(file, name, sizeof name - 1);
        if (file >= 0)
            close(file);
        if (got <= 0)
            continue;
        name[got] = 0;
        name[strcspn(name, "\n")] = 0;
        if (strcmp(name, wanted) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    closedir(ports);
    return found;
}

bool channel_open(struct channel *channel, const char *port, int deadline_ms)
{
    /* Port names arrive over the device's control queue, a moment after its driver is ready. */
    uint64_t end = monotonic_ns() + (uint64_t)deadline_ms * 1000000u;
    while ((channel->fd = find_port(port)) < 0 && monotonic_ns() < end)
        usleep(2000);
    return channel->fd >= 0;
}

bool channel_listen(struct channel *channel, unsigned port)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK,
        .svm_cid = VMADDR_CID_ANY,
        .svm_port = port,
    };
    channel->listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    return channel->listener >= 0 &&
           bind(channel->listener, (struct sockaddr *)&address, sizeof address) == 0 &&
           listen(channel->listener, 4) == 0;
}

static void leave_host(struct channel *channel)
{
    close(channel->fd);
    channel->fd = -1;
    channel->in_length = channel->taken = 0;
    channel->sync_matched = 0;
    channel->adrift = channel->nonce_wanted = false;
}

bool channel_accept(struct channel *channel)
{
    int fresh = channel->listener < 0
                    ? -1
                    : accept4(channel->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fresh < 0)
        return false;
    if (channel->fd >= 0)
        leave_host(channel);
    channel->fd = fresh;
    bool again = channel->had_host;
    channel->had_host = true;
    if (again) {
        buffer_consume(&channel->out, channel->out.length);
        channel->out_sent = 0;
    }
    return again;
}

void channel_send(struct channel *channel, enum frame_type type, unsigned stream, uint32_t process,
                  const void *payload, size_t length)
{
    append32(&channel->out, (uint32_t)length);
    append16(&channel->out, (uint16_t)type);
    append16(&channel->out, (uint16_t)stream);
    append32(&channel->out, process);
    buffer_append(&channel->out, payload, length);
}

void channel_event(struct channel *channel, uint32_t process, const char *name, uint64_t at_ns)
{
    struct buffer record = {0};
    append_text(&record, KEY_NAME, name);
    append_number(&record, KEY_AT, at_ns);
    append_number(&record, KEY_SENT, monotonic_ns());
    channel_send(channel, FRAME_EVENT, 0, process, record.bytes, record.length);
    buffer_free(&record);
}

size_t channel_pending(const struct channel *channel)
{
    return channel->out.length - channel->out_sent;
}

void channel_write(struct channel *channel)
{
    while (channel->fd >= 0 && channel_pending(channel) > 0) {
        size_t size = channel_pending(channel);
        if (size > WRITE_SIZE)
            size = WRITE_SIZE;
        ssize_t wrote = write(channel->fd, channel->out.bytes + channel->out_sent, size);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            break;
        channel->out_sent += (size_t)wrote;
        channel->progress_at = monotonic_ns();
    }
    if (channel_pending(channel) == 0)
        channel->progress_at = monotonic_ns();
    /* Compact rarely: moving the rest after each write would cost more than the write. */
    if (channel->out_sent == channel->out.length || channel->out_sent > (1u << 20)) {
        buffer_consume(&channel->out, channel->out_sent);
        channel->out_sent = 0;
    }
}

void channel_restart(struct channel *channel, const uint8_t nonce[SYNC_NONCE])
{
    buffer_consume(&channel->out, channel->out.length);
    channel->out_sent = 0;
    buffer_append(&channel->out, nonce, SYNC_NONCE);
}

/* Looks for the key in bytes just read, wherever frames begin and end: an earlier host may have gone
 * in the middle of one. The key's first byte comes only once in it, so a scan never steps back.
 */
static void watch_for_sync(struct channel *channel, size_t fresh)
{
    if (channel->sync_key == NULL)
        return;
    for (size_t i = channel->in_length - fresh; i < channel->in_length; i++) {
        if (channel->in[i] == channel->sync_key[channel->sync_matched])
            channel->sync_matched++;
        else
            channel->sync_matched = channel->in[i] == channel->sync_key[0];
        if (channel->sync_matched < SYNC_KEY_LENGTH)
            continue;
        channel->sync_matched = 0;
        channel->adrift = false;
        channel->nonce_wanted = true;
        channel->in_length -= i + 1;
        memmove(channel->in, channel->in + i + 1, channel->in_length);
        return;
    }
}

bool channel_read(struct channel *channel, struct frame *frame, bool *more)
{
    *more = false;
    size_t need = FRAME_HEADER;
    channel->in_length -= channel->taken;
    memmove(channel->in, channel->in + channel->taken, channel->in_length);
    channel->taken = 0;
    if (channel->fd < 0)
        return false;
    for (;;) {
        if (channel->nonce_wanted) {
            need = SYNC_NONCE;
            if (channel->in_length >= need)
                break;
        } else if (channel->adrift) {
            channel->in_length = 0;
            need = sizeof channel->in;
        } else if (channel->in_length >= FRAME_HEADER) {
            uint32_t length = load32(channel->in);
            if (length > PAYLOAD_LIMIT) {
                /* Out of step with the host: nothing is believed before a new host's key, whose
                 * first bytes these may be.
                 */
                channel->adrift = true;
                channel->host_gone = channel->sync_key == NULL;
                if (channel->host_gone)
                    return false;
                continue;
            }
            need = FRAME_HEADER + length;
            /* The end of this frame is half of the key: it is no frame, a new host has come. */
            channel->adrift = channel->in_length == need && channel->sync_matched >= KEY_BEGUN;
            if (channel->in_length >= need && !channel->adrift)
                break;
        } else {
            need = FRAME_HEADER;
        }
        if (channel->in_length >= need)
            continue;
        ssize_t got = read(channel->fd, channel->in + channel->in_length, need - channel->in_length);
        if (got < 0 && errno == EINTR)
            continue;
        if (channel->listener >= 0 && (got == 0 || (got < 0 && errno != EAGAIN)))
            leave_host(channel); /* another may come */
        if (got <= 0)
            return false;
        channel->in_length += (size_t)got;
        watch_for_sync(channel, (size_t)got);
    }
    *more = true;
    if (channel->nonce_wanted) {
        *frame = (struct frame){.payload = channel->in, .length = SYNC_NONCE};
        channel->nonce_wanted = false;
        channel->taken = need;
        return true;
    }
    frame->type = load16(channel->in + 4);
    frame->stream = load16(channel->in + 6);
    frame->process = load32(channel->in + 8);
    frame->payload = channel->in + FRAME_HEADER;
    frame->length = need - FRAME_HEADER;
    channel->taken = need;
    return true;
}
