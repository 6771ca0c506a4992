/* What the host asks for over the channel: EXEC, CONNECT and RESIZE records. Pure. */
#ifndef CUBE_REQUEST_H
#define CUBE_REQUEST_H

#include "record.h"

#define REQUEST_STRING_LIMIT 4096u

/* Fields of request records; numbers continue those of channel.h. */
enum request_key {
    KEY_CONTAINER = 10,
    KEY_ARGUMENT = 11,
    KEY_VARIABLE = 12,
    KEY_USER = 13,
    KEY_DIRECTORY = 14,
    KEY_TTY = 15,
    KEY_STDIN = 16,
    KEY_ROWS = 17,
    KEY_COLUMNS = 18,
    KEY_PORT = 19,
    KEY_ADDRESS = 20,
};

struct request {
    uint32_t container;
    char **arguments; /* NULL-terminated */
    size_t argument_count;
    char **environment; /* NULL-terminated NAME=VALUE */
    size_t environment_count;
    char *user, *directory, *address;
    bool tty, wants_stdin;
    uint16_t rows, columns, port;
};

/* NULL, or one sentence that says what is wrong. `request` can be freed in both cases. */
const char *request_parse(const uint8_t *record, size_t length, struct request *request);
void request_free(struct request *request);

#endif
