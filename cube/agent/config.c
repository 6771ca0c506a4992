#include "config.h"

#include <stdlib.h>
#include <string.h>

uint32_t crc32_of(const uint8_t *bytes, size_t length)
{
    static uint32_t table[256];
    if (table[1] == 0)
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; bit++)
                value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
            table[i] = value;
        }
    uint32_t sum = 0xFFFFFFFFu;
    for (size_t i = 0; i < length; i++)
        sum = table[(sum ^ bytes[i]) & 0xFF] ^ (sum >> 8);
    return ~sum;
}

uint32_t config_body_length(const uint8_t header[CONFIG_HEADER], const char **error)
{
    if (memcmp(header, CONFIG_MAGIC, 8) != 0) {
        *error = "the configuration disk has another magic or version";
        return 0;
    }
    uint32_t length = load32(header + 8);
    if (length == 0 || length > CONFIG_LIMIT) {
        *error = "the configuration's length is out of bounds";
        return 0;
    }
    return length;
}

/* Strings are counted first, so that one allocation of the right size holds them. */
size_t count_fields(const struct field *record, uint16_t key)
{
    struct reader reader = {record->value, record->length, false};
    struct field field;
    size_t count = 0;
    while (next_field(&reader, &field))
        count += field.key == key;
    return count;
}

const char *set_text(char **target, const struct field *field)
{
    if (*target != NULL)
        return "the configuration gives a single value twice";
    *target = field_text(field);
    return *target ? NULL : "a text of the configuration holds a NUL byte";
}

static const char *set_container_field(struct container *container, const struct field *field)
{
    uint64_t number;
    switch (field->key) {
    case CONTAINER_NAME:
        return set_text(&container->name, field);
    case CONTAINER_ROOT_DISK:
        return set_text(&container->root_disk, field);
    case CONTAINER_ROOT_FS:
        return set_text(&container->root_fs, field);
    case CONTAINER_USER:
        return set_text(&container->user, field);
    case CONTAINER_WORKDIR:
        return set_text(&container->working_directory, field);
    case CONTAINER_ARG: {
        char *text = field_text(field);
        if (text == NULL)
            return "an argument holds a NUL byte";
        container->arguments[container->argument_count++] = text;
        return NULL;
    }
    case CONTAINER_ENV: {
        const uint8_t *equals = field->length ? memchr(field->value, '=', field->length) : NULL;
        if (equals == NULL || equals == field->value)
            return "an environment variable is not NAME=VALUE";
        char *text = field_text(field);
        if (text == NULL)
            return "an environment variable holds a NUL byte";
        container->environment[container->environment_count++] = text;
        return NULL;
    }
    case CONTAINER_MOUNT:
        return parse_mount(field, &container->mounts[container->mount_count++]);
    case CONTAINER_ID:
    case CONTAINER_ROOT_WRITABLE:
    case CONTAINER_UPPER_BYTES:
    case CONTAINER_STDIN:
    case CONTAINER_CAPABILITIES:
    case CONTAINER_PID_ONE:
    case CONTAINER_AUTOSTART:
    case CONTAINER_TTY:
    case CONTAINER_READ_ONLY_ROOT:
    case CONTAINER_CPU_MILLIS:
    case CONTAINER_MEMORY_BYTES:
    case CONTAINER_PIDS_LIMIT:
    case CONTAINER_GROUP:
    case CONTAINER_NO_NEW_PRIVILEGES:
    case CONTAINER_DISCARD_AFTER_MS:
        break;
    default:
        return field->flags & FIELD_CRITICAL ? "a container needs what this agent does not know"
                                             : NULL;
    }
    if (!field_number(field, &number))
        return "a number of the configuration has a wrong width";
    switch (field->key) {
    case CONTAINER_ID:
        if (number == 0 || number > UINT32_MAX)
            return "a container's id is out of bounds";
        container->id = (uint32_t)number;
        break;
    case CONTAINER_ROOT_WRITABLE:
        container->root_writable = number != 0;
        break;
    case CONTAINER_UPPER_BYTES:
        container->upper_bytes = number;
        break;
    case CONTAINER_STDIN:
        container->wants_stdin = number != 0;
        break;
    case CONTAINER_CAPABILITIES:
        container->capabilities = number;
        break;
    case CONTAINER_PID_ONE:
        if (number > PID_ONE_SUPERVISOR)
            return "a container's PID 1 rule is unknown";
        container->pid_one = (enum pid_one)number;
        break;
    case CONTAINER_AUTOSTART:
        container->held = number == 0;
        break;
    case CONTAINER_TTY:
        container->tty = number != 0;
        break;
    case CONTAINER_READ_ONLY_ROOT:
        container->read_only_root = number != 0;
        break;
    case CONTAINER_CPU_MILLIS:
        container->cpu_millis = number;
        break;
    case CONTAINER_MEMORY_BYTES:
        container->memory_bytes = number;
        break;
    case CONTAINER_PIDS_LIMIT:
        container->pids_limit = number;
        break;
    case CONTAINER_GROUP:
        if (number >= UINT32_MAX || container->group_count == EXTRA_GROUP_LIMIT)
            return "a container has too many groups, or one out of bounds";
        container->groups[container->group_count++] = (uint32_t)number;
        break;
    case CONTAINER_NO_NEW_PRIVILEGES:
        container->no_new_privileges = number != 0;
        break;
    case CONTAINER_DISCARD_AFTER_MS:
        container->discard_after_ms = number;
        break;
    default:
        break;
    }
    return NULL;
}

static const char *parse_container(const struct field *record, struct container *container)
{
    size_t arguments = count_fields(record, CONTAINER_ARG);
    size_t variables = count_fields(record, CONTAINER_ENV);
    if (arguments > STRING_LIMIT || variables > STRING_LIMIT)
        return "a container has too many arguments or variables";
    size_t mounts = count_fields(record, CONTAINER_MOUNT);
    if (mounts > MOUNT_LIMIT)
        return "a container has too many mounts";
    container->mounts = must_allocate(mounts * sizeof *container->mounts);
    container->arguments = must_allocate((arguments + 1) * sizeof(char *));
    container->environment = must_allocate((variables + 1) * sizeof(char *));
    struct reader reader = {record->value, record->length, false};
    struct field field;
    while (next_field(&reader, &field)) {
        const char *error = set_container_field(container, &field);
        if (error)
            return error;
    }
    if (reader.malformed)
        return "a container's record is cut off";
    if (container->id == 0 || container->root_disk == NULL || container->root_fs == NULL)
        return "a container lacks its id, root disk or root file system";
    if (container->argument_count == 0 || container->arguments[0][0] == 0)
        return "a container has no command";
    return NULL;
}

const char *config_parse(const uint8_t header[CONFIG_HEADER], const uint8_t *body, size_t length,
                         struct config *config)
{
    *config = (struct config){0};
    const char *error = NULL;
    if (config_body_length(header, &error) != length)
        return error ? error : "the configuration's length does not match its header";
    if (crc32_of(body, length) != load32(header + 12))
        return "the configuration's checksum does not match";
    struct reader reader = {body, length, false};
    struct field field;
    while (error == NULL && next_field(&reader, &field)) {
        switch (field.key) {
        case CONFIG_HOSTNAME:
            error = set_text(&config->hostname, &field);
            break;
        case CONFIG_CLOCK:
            if (!field_number(&field, &config->clock_ns))
                error = "the configuration's clock has a wrong width";
            break;
        case CONFIG_RESOLV:
            buffer_append(&config->resolv, field.value, field.length);
            break;
        case CONFIG_HOSTS:
            buffer_append(&config->hosts, field.value, field.length);
            break;
        case CONFIG_CONTAINER:
            if (config->container_count == CONTAINER_LIMIT)
                error = "the configuration has too many containers";
            else
                error = parse_container(&field, &config->containers[config->container_count++]);
            break;
        case CONFIG_MODULES:
            if (config->module_set_count == MODULE_SET_LIMIT)
                error = "the configuration asks for too many sets of modules";
            else
                error = set_text(&config->module_sets[config->module_set_count++], &field);
            break;
        case CONFIG_INTERFACE:
            if (config->interface_count == INTERFACE_LIMIT)
                error = "the configuration has too many interfaces";
            else
                error = parse_interface(&field, &config->interfaces[config->interface_count++]);
            break;
        case CONFIG_VOLUME:
            if (config->volume_count == VOLUME_LIMIT)
                error = "the configuration has too many volumes";
            else
                error = parse_volume(&field, &config->volumes[config->volume_count++]);
            break;
        case CONFIG_TOOLS_DISK:
            error = set_text(&config->tools_disk, &field);
            break;
        case CONFIG_SYNC_KEY:
            if (field.length != SYNC_KEY_BYTES)
                error = "the configuration's sync key has a wrong length";
            else
                memcpy(config->sync_key, field.value, SYNC_KEY_BYTES);
            config->has_sync_key = true;
            break;
        default:
            if (field.flags & FIELD_CRITICAL)
                error = "the configuration needs what this agent does not know";
        }
    }
    if (error)
        return error;
    if (reader.malformed)
        return "the configuration's record is cut off";
    for (size_t i = 0; i < config->container_count; i++)
        for (size_t j = 0; j < i; j++)
            if (config->containers[i].id == config->containers[j].id)
                return "two containers have one id";
    if (config->container_count == 0)
        return "the configuration names no container";
    return resolve_mounts(config);
}

static void free_strings(char **strings, size_t count)
{
    for (size_t i = 0; i < count; i++)
        free(strings[i]);
    free(strings);
}

void config_free(struct config *config)
{
    for (size_t i = 0; i < config->container_count; i++) {
        struct container *container = &config->containers[i];
        free(container->name);
        free(container->root_disk);
        free(container->root_fs);
        free(container->user);
        free(container->working_directory);
        free_strings(container->arguments, container->argument_count);
        free_strings(container->environment, container->environment_count);
    }
    for (size_t i = 0; i < config->module_set_count; i++)
        free(config->module_sets[i]);
    free_pod_parts(config);
    free(config->hostname);
    buffer_free(&config->resolv);
    buffer_free(&config->hosts);
    *config = (struct config){0};
}
