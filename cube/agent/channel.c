#include "channel.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

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
    while (channel_pending(channel) > 0) {
        size_t size = channel_pending(channel);
        if (size > WRITE_SIZE)
            size = WRITE_SIZE;
        ssize_t wrote = write(channel->fd, channel->out.bytes + channel->out_sent, size);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            break;
        channel->out_sent += (size_t)wrote;
    }
    /* Compact rarely: moving the rest after each write would cost more than the write. */
    if (channel->out_sent == channel->out.length || channel->out_sent > (1u << 20)) {
        buffer_consume(&channel->out, channel->out_sent);
        channel->out_sent = 0;
    }
}

bool channel_read(struct channel *channel, struct frame *frame, bool *more)
{
    *more = false;
    size_t need = FRAME_HEADER;
    for (;;) {
        if (channel->in_length >= FRAME_HEADER) {
            uint32_t length = load32(channel->in);
            if (length > PAYLOAD_LIMIT) {
                /* Out of step with the host: nothing after this can be trusted. */
                channel->host_gone = true;
                return false;
            }
            need = FRAME_HEADER + length;
            if (channel->in_length == need)
                break;
        }
        ssize_t got = read(channel->fd, channel->in + channel->in_length, need - channel->in_length);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        channel->in_length += (size_t)got;
    }
    frame->type = load16(channel->in + 4);
    frame->stream = load16(channel->in + 6);
    frame->process = load32(channel->in + 8);
    frame->payload = channel->in + FRAME_HEADER;
    frame->length = need - FRAME_HEADER;
    channel->in_length = 0;
    *more = true;
    return true;
}
