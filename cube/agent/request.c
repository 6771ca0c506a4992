#include "request.h"

#include <stdlib.h>
#include <string.h>

static const char *take_text(char **target, const struct field *field)
{
    if (*target != NULL)
        return "the request gives a single value twice";
    *target = field_text(field);
    return *target ? NULL : "a text of the request holds a NUL byte";
}

static const char *take_number(struct request *request, const struct field *field)
{
    uint64_t number;
    if (!field_number(field, &number))
        return "a number of the request has a wrong width";
    if (field->key == KEY_CONTAINER ? number > UINT32_MAX : number > UINT16_MAX)
        return "a number of the request is out of bounds";
    switch (field->key) {
    case KEY_CONTAINER:
        request->container = (uint32_t)number;
        break;
    case KEY_TTY:
        request->tty = number != 0;
        break;
    case KEY_STDIN:
        request->wants_stdin = number != 0;
        break;
    case KEY_ROWS:
        request->rows = (uint16_t)number;
        break;
    case KEY_COLUMNS:
        request->columns = (uint16_t)number;
        break;
    default:
        request->port = (uint16_t)number;
    }
    return NULL;
}

static const char *take_field(struct request *request, const struct field *field)
{
    const char *error;
    switch (field->key) {
    case KEY_ARGUMENT:
        if (request->argument_count == REQUEST_STRING_LIMIT)
            return "the request has too many arguments";
        error = take_text(&request->arguments[request->argument_count], field);
        request->argument_count += error == NULL;
        return error;
    case KEY_VARIABLE:
        if (request->environment_count == REQUEST_STRING_LIMIT)
            return "the request has too many variables";
        error = take_text(&request->environment[request->environment_count], field);
        if (error)
            return error;
        char *equals = strchr(request->environment[request->environment_count], '=');
        bool named = equals && equals != request->environment[request->environment_count];
        request->environment_count++;
        return named ? NULL : "an environment variable is not NAME=VALUE";
    case KEY_USER:
        return take_text(&request->user, field);
    case KEY_DIRECTORY:
        return take_text(&request->directory, field);
    case KEY_ADDRESS:
        return take_text(&request->address, field);
    case KEY_CONTAINER:
    case KEY_TTY:
    case KEY_STDIN:
    case KEY_ROWS:
    case KEY_COLUMNS:
    case KEY_PORT:
        return take_number(request, field);
    default:
        return field->flags & FIELD_CRITICAL ? "the request needs what this agent does not know"
                                             : NULL;
    }
}

const char *request_parse(const uint8_t *record, size_t length, struct request *request)
{
    *request = (struct request){0};
    request->arguments = must_allocate((REQUEST_STRING_LIMIT + 1) * sizeof(char *));
    request->environment = must_allocate((REQUEST_STRING_LIMIT + 1) * sizeof(char *));
    struct reader reader = {record, length, false};
    struct field field;
    while (next_field(&reader, &field)) {
        const char *error = take_field(request, &field);
        if (error)
            return error;
    }
    return reader.malformed ? "the request's record is cut off" : NULL;
}

void request_free(struct request *request)
{
    for (size_t i = 0; i < request->argument_count; i++)
        free(request->arguments[i]);
    for (size_t i = 0; i < request->environment_count; i++)
        free(request->environment[i]);
    free(request->arguments);
    free(request->environment);
    free(request->user);
    free(request->directory);
    free(request->address);
    *request = (struct request){0};
}
