/* The framed channel to the host over one virtio-serial port (PROTOCOL.md, "Frames"). */
#ifndef CUBE_CHANNEL_H
#define CUBE_CHANNEL_H

#include "record.h"

#define PROTOCOL_VERSION 1u
#define FRAME_HEADER 12u
#define PAYLOAD_LIMIT 65536u

enum frame_type {
    FRAME_HELLO = 1,    /* both ways: record */
    FRAME_EVENT = 2,    /* guest: record, a point of the timeline */
    FRAME_DATA = 3,     /* both ways: raw bytes of a stream */
    FRAME_END = 4,      /* both ways: the stream's end */
    FRAME_WINDOW = 5,   /* both ways: u32, so many more bytes of the stream may be sent */
    FRAME_EXIT = 6,     /* guest: record, a process is over and all its output was sent */
    FRAME_LOG = 7,      /* guest: text for the operator */
    FRAME_FAILED = 8,   /* guest: record, the guest cannot go on */
    FRAME_SIGNAL = 9,   /* host: u32 number, u32 flags */
    FRAME_SHUTDOWN = 10 /* host: power off */
};

#define SIGNAL_TO_GROUP 1u

enum stream { STREAM_STDIN = 0, STREAM_STDOUT = 1, STREAM_STDERR = 2 };

enum record_key {
    KEY_VERSION = 1,
    KEY_NAME = 2,
    KEY_AT = 3,   /* guest's monotonic clock when it happened, ns */
    KEY_SENT = 4, /* the same clock when the frame was queued, ns */
    KEY_TEXT = 5,
    KEY_CODE = 6,
    KEY_SIGNAL = 7,
    KEY_READ_BYTES = 8,
    KEY_REALTIME = 9,
};

struct frame {
    uint16_t type;
    uint16_t stream;
    uint32_t process;
    const uint8_t *payload;
    size_t length;
};

struct channel {
    int fd; /* -1 until opened */
    bool host_gone;
    struct buffer out;
    size_t out_sent;
    size_t in_length;
    uint8_t in[FRAME_HEADER + PAYLOAD_LIMIT];
};

uint64_t monotonic_ns(void);
/* Waits until the named port exists; false after the deadline. */
bool channel_open(struct channel *channel, const char *port, int deadline_ms);
void channel_send(struct channel *channel, enum frame_type type, unsigned stream, uint32_t process,
                  const void *payload, size_t length);
void channel_event(struct channel *channel, uint32_t process, const char *name, uint64_t at_ns);
size_t channel_pending(const struct channel *channel);
void channel_write(struct channel *channel); /* as much as the port takes now */
/* Reads what has come; true with a whole frame, valid until the next call. */
bool channel_read(struct channel *channel, struct frame *frame, bool *more);

#endif
