/* The framed channel to the host over one virtio-serial port (PROTOCOL.md, "Frames"). */
#ifndef CUBE_CHANNEL_H
#define CUBE_CHANNEL_H

#include "record.h"

#define PROTOCOL_VERSION 2u
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
    FRAME_SHUTDOWN = 10, /* host: power off */
    FRAME_START = 11,   /* host: empty, runs a container's program */
    FRAME_EXEC = 12,    /* host: record, runs a program beside one */
    FRAME_RESIZE = 13,  /* host: record, a terminal's size */
    FRAME_CONNECT = 14, /* host: record, a TCP connection */
    FRAME_STATS = 15,   /* host: empty; guest: record */
    FRAME_LOST = 16,    /* guest: u64, so many bytes of the stream were dropped here */
    FRAME_PING = 17     /* host: any bytes; guest: the same */
};

#define SIGNAL_TO_GROUP 1u
#define SIGNAL_TO_EVERYTHING 2u
#define SYNC_NONCE 32u

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
    /* 10 to 20: request.h */
    KEY_USAGE = 21,
    KEY_CPU_NS = 22,
    KEY_MEMORY_BYTES = 23,
    KEY_MEMORY_LIMIT = 24,
    KEY_PIDS = 25,
    KEY_WRITE_BYTES = 26,
    KEY_MEMORY_TOTAL = 27,
    KEY_MEMORY_FREE = 28,
    KEY_RECEIVED_BYTES = 29,
    KEY_SENT_BYTES = 30,
    KEY_OOM_KILLS = 31,
};

struct frame {
    uint16_t type;
    uint16_t stream;
    uint32_t process;
    const uint8_t *payload;
    size_t length;
};

struct channel {
    int fd;       /* -1 until there is a host */
    int listener; /* where hosts connect, over vsock; -1 with a serial port */
    bool had_host;
    bool host_gone;
    struct buffer out;
    size_t out_sent;
    uint64_t progress_at; /* when the port last took something, or had nothing to take */
    const uint8_t *sync_key; /* 16 bytes that announce a new host, or NULL */
    size_t sync_matched;     /* so many of them have just been read */
    bool adrift;             /* out of step: nothing counts before the key */
    bool nonce_wanted;       /* what is read now is the new host's nonce */
    size_t in_length;
    size_t taken; /* bytes of `in` that the last frame had, and the next read drops */
    uint8_t in[FRAME_HEADER + PAYLOAD_LIMIT];
};

uint64_t monotonic_ns(void);
/* Takes hosts that connect to this vsock port; false: errno. */
bool channel_listen(struct channel *channel, unsigned port);
/* A host that has connected takes the place of an earlier one. True: nothing is left of what was to
 * be said to that one, and the greeting is due again.
 */
bool channel_accept(struct channel *channel);
/* Waits until the named port exists; false after the deadline. */
bool channel_open(struct channel *channel, const char *port, int deadline_ms);
void channel_send(struct channel *channel, enum frame_type type, unsigned stream, uint32_t process,
                  const void *payload, size_t length);
void channel_event(struct channel *channel, uint32_t process, const char *name, uint64_t at_ns);
size_t channel_pending(const struct channel *channel);
void channel_write(struct channel *channel); /* as much as the port takes now */
/* A new host: drops what is unsent and sends its nonce, by which it finds its place. */
void channel_restart(struct channel *channel, const uint8_t nonce[SYNC_NONCE]);
/* Reads what has come; true with a whole frame, valid until the next call. A frame of type 0 with
 * SYNC_NONCE bytes is a new host's nonce.
 */
bool channel_read(struct channel *channel, struct frame *frame, bool *more);

#endif
