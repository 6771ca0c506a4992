#include "record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint16_t load16(const uint8_t *from)
{
    return (uint16_t)(from[0] | (uint16_t)from[1] << 8);
}

uint32_t load32(const uint8_t *from)
{
    return (uint32_t)load16(from) | (uint32_t)load16(from + 2) << 16;
}

uint64_t load64(const uint8_t *from)
{
    return (uint64_t)load32(from) | (uint64_t)load32(from + 4) << 32;
}

bool next_field(struct reader *reader, struct field *field)
{
    if (reader->malformed || reader->left == 0)
        return false;
    if (reader->left < FIELD_HEADER) {
        reader->malformed = true;
        return false;
    }
    size_t length = load32(reader->at + 4);
    if (length > reader->left - FIELD_HEADER) {
        reader->malformed = true;
        return false;
    }
    field->key = load16(reader->at);
    field->flags = load16(reader->at + 2);
    field->value = reader->at + FIELD_HEADER;
    field->length = length;
    reader->at += FIELD_HEADER + length;
    reader->left -= FIELD_HEADER + length;
    return true;
}

bool field_number(const struct field *field, uint64_t *number)
{
    switch (field->length) {
    case 1:
        *number = field->value[0];
        return true;
    case 2:
        *number = load16(field->value);
        return true;
    case 4:
        *number = load32(field->value);
        return true;
    case 8:
        *number = load64(field->value);
        return true;
    default:
        return false;
    }
}

char *field_text(const struct field *field)
{
    if (field->length > 0 && memchr(field->value, 0, field->length) != NULL)
        return NULL;
    char *text = must_allocate(field->length + 1);
    memcpy(text, field->value, field->length);
    text[field->length] = 0;
    return text;
}

void *must_allocate(size_t size)
{
    void *memory = calloc(1, size ? size : 1);
    if (memory == NULL) {
        fputs("cube: out of memory\n", stderr);
        abort();
    }
    return memory;
}

void buffer_append(struct buffer *buffer, const void *bytes, size_t length)
{
    if (length == 0)
        return;
    if (buffer->capacity - buffer->length < length) {
        size_t capacity = buffer->capacity ? buffer->capacity : 4096;
        while (capacity - buffer->length < length)
            capacity *= 2;
        uint8_t *grown = realloc(buffer->bytes, capacity);
        if (grown == NULL) {
            fputs("cube: out of memory\n", stderr);
            abort();
        }
        buffer->bytes = grown;
        buffer->capacity = capacity;
    }
    memcpy(buffer->bytes + buffer->length, bytes, length);
    buffer->length += length;
}

void buffer_consume(struct buffer *buffer, size_t length)
{
    buffer->length -= length;
    if (buffer->length > 0)
        memmove(buffer->bytes, buffer->bytes + length, buffer->length);
}

void buffer_free(struct buffer *buffer)
{
    free(buffer->bytes);
    *buffer = (struct buffer){0};
}

void append16(struct buffer *buffer, uint16_t number)
{
    uint8_t bytes[2] = {(uint8_t)number, (uint8_t)(number >> 8)};
    buffer_append(buffer, bytes, sizeof bytes);
}

void append32(struct buffer *buffer, uint32_t number)
{
    append16(buffer, (uint16_t)number);
    append16(buffer, (uint16_t)(number >> 16));
}

void append_field(struct buffer *buffer, uint16_t key, const void *value, size_t length)
{
    append16(buffer, key);
    append16(buffer, 0);
    append32(buffer, (uint32_t)length);
    buffer_append(buffer, value, length);
}

void append_text(struct buffer *buffer, uint16_t key, const char *text)
{
    append_field(buffer, key, text, strlen(text));
}

void append_number(struct buffer *buffer, uint16_t key, uint64_t number)
{
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(number >> (8 * i));
    append_field(buffer, key, bytes, sizeof bytes);
}
