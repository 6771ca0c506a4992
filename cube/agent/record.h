/* Records: the one encoding of the configuration disk and of control frames (PROTOCOL.md).
 * A record is a run of fields; a field is u16 key, u16 flags, u32 length, value; all little-endian.
 */
#ifndef CUBE_RECORD_H
#define CUBE_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FIELD_HEADER 8u
#define FIELD_CRITICAL 1u /* a reader that does not know this key must refuse the record */

struct reader {
    const uint8_t *at;
    size_t left;
    bool malformed;
};

struct field {
    uint16_t key;
    uint16_t flags;
    const uint8_t *value;
    size_t length;
};

/* False at the end of the record; `malformed` tells a clean end from a broken field. */
bool next_field(struct reader *reader, struct field *field);
bool field_number(const struct field *field, uint64_t *number); /* 1, 2, 4 or 8 bytes */
char *field_text(const struct field *field);                     /* copy; NULL if it holds a NUL */

uint16_t load16(const uint8_t *from);
uint32_t load32(const uint8_t *from);
uint64_t load64(const uint8_t *from);

/* A growing byte buffer. Allocation failure ends the program: PID 1 has nowhere to go. */
struct buffer {
    uint8_t *bytes;
    size_t length;
    size_t capacity;
};

void *must_allocate(size_t size);
void buffer_append(struct buffer *buffer, const void *bytes, size_t length);
void buffer_consume(struct buffer *buffer, size_t length);
void buffer_free(struct buffer *buffer);
void append16(struct buffer *buffer, uint16_t number);
void append32(struct buffer *buffer, uint32_t number);
void append_field(struct buffer *buffer, uint16_t key, const void *value, size_t length);
void append_text(struct buffer *buffer, uint16_t key, const char *text);
void append_number(struct buffer *buffer, uint16_t key, uint64_t number);

#endif
