/* The parts of a configuration that only pods have: volumes, mounts, interfaces. Pure. */
#include "config.h"

#include <stdlib.h>
#include <string.h>

enum { MOUNT_VOLUME = 1, MOUNT_PATH = 2, MOUNT_SUB_PATH = 3, MOUNT_READ_ONLY = 4 };
enum { IF_MAC = 1, IF_NAME = 2, IF_ADDRESS = 3, IF_GATEWAY = 4, IF_GATEWAY6 = 5, IF_MTU = 6 };
enum { FILE_PATH = 1, FILE_MODE = 2, FILE_CONTENT = 3, FILE_UID = 4, FILE_GID = 5 };
enum {
    VOL_NAME = 1,
    VOL_KIND = 2,
    VOL_SIZE = 3,
    VOL_DISK = 4,
    VOL_FS = 5,
    VOL_SOURCE = 6,
    VOL_OPTIONS = 7,
    VOL_SECRET = 8,
    VOL_MODE = 9,
    VOL_GID = 10,
    VOL_READ_ONLY = 11,
    VOL_FILE = 12,
};

static const char *unknown(const struct field *field)
{
    return field->flags & FIELD_CRITICAL ? "a pod needs what this agent does not know" : NULL;
}

static const char *set_u32(uint32_t *target, const struct field *field)
{
    uint64_t number;
    if (!field_number(field, &number) || number >= UINT32_MAX)
        return "a number of a volume or interface is out of bounds";
    *target = (uint32_t)number;
    return NULL;
}

static const char *set_flag(bool *target, const struct field *field)
{
    uint32_t number;
    const char *error = set_u32(&number, field);
    if (error == NULL)
        *target = number != 0;
    return error;
}

bool path_stays_inside(const char *path)
{
    if (path[0] == 0 || path[0] == '/')
        return false;
    while (*path) {
        size_t length = strcspn(path, "/");
        if (length == 0 || length > 255 || (length == 1 && path[0] == '.') ||
            (length == 2 && path[0] == '.' && path[1] == '.'))
            return false;
        path += length;
        if (*path == '/' && *++path == 0)
            return false;
    }
    return true;
}

const char *parse_mount(const struct field *record, struct mount_place *place)
{
    struct reader reader = {record->value, record->length, false};
    struct field field;
    const char *error = NULL;
    while (error == NULL && next_field(&reader, &field))
        switch (field.key) {
        case MOUNT_VOLUME:
            error = set_text(&place->volume, &field);
            break;
        case MOUNT_PATH:
            error = set_text(&place->path, &field);
            break;
        case MOUNT_SUB_PATH:
            error = set_text(&place->sub_path, &field);
            break;
        case MOUNT_READ_ONLY:
            error = set_flag(&place->read_only, &field);
            break;
        default:
            error = unknown(&field);
        }
    if (error)
        return error;
    if (reader.malformed || place->volume == NULL || place->path == NULL)
        return "a mount's record is cut off, or lacks its volume or path";
    if (place->path[0] != '/' || (place->path[1] && !path_stays_inside(place->path + 1)))
        return "a mount's path is not absolute and plain";
    if (place->path[1] == 0)
        return "a mount would replace the whole root";
    if (place->sub_path && place->sub_path[0] && !path_stays_inside(place->sub_path))
        return "a mount's sub-path leads out of its volume";
    return NULL;
}

static const char *parse_file(const struct field *record, struct volume_file *file)
{
    struct reader reader = {record->value, record->length, false};
    struct field field;
    const char *error = NULL;
    file->mode = 0644;
    while (error == NULL && next_field(&reader, &field))
        switch (field.key) {
        case FILE_PATH:
            error = set_text(&file->path, &field);
            break;
        case FILE_MODE:
            error = set_u32(&file->mode, &field);
            break;
        case FILE_CONTENT:
            buffer_append(&file->content, field.value, field.length);
            break;
        case FILE_UID:
            error = set_u32(&file->uid, &field);
            break;
        case FILE_GID:
            error = set_u32(&file->gid, &field);
            break;
        default:
            error = unknown(&field);
        }
    if (error)
        return error;
    if (reader.malformed || file->path == NULL || !path_stays_inside(file->path))
        return "a volume's file has no path, or one that leads out of the volume";
    return file->mode > 07777 ? "a volume's file has an impossible mode" : NULL;
}

static const char *set_volume_field(struct volume *volume, const struct field *field)
{
    uint32_t kind;
    const char *error;
    switch (field->key) {
    case VOL_NAME:
        return set_text(&volume->name, field);
    case VOL_KIND:
        error = set_u32(&kind, field);
        if (error == NULL && (kind < VOLUME_FILES || kind > VOLUME_VIRTIOFS))
            error = "a volume is of a kind that this agent does not know";
        if (error == NULL)
            volume->kind = (enum volume_kind)kind;
        return error;
    case VOL_SIZE:
        return field_number(field, &volume->size_bytes) ? NULL : "a volume's size is malformed";
    case VOL_DISK:
        return set_text(&volume->disk, field);
    case VOL_FS:
        return set_text(&volume->file_system, field);
    case VOL_SOURCE:
        return set_text(&volume->source, field);
    case VOL_OPTIONS:
        return set_text(&volume->options, field);
    case VOL_SECRET:
        buffer_append(&volume->secret, field->value, field->length);
        return NULL;
    case VOL_MODE:
        return set_u32(&volume->mode, field);
    case VOL_GID:
        volume->has_gid = true;
        return set_u32(&volume->gid, field);
    case VOL_READ_ONLY:
        return set_flag(&volume->read_only, field);
    case VOL_FILE:
        return parse_file(field, &volume->files[volume->file_count++]);
    default:
        return unknown(field);
    }
}

const char *parse_volume(const struct field *record, struct volume *volume)
{
    size_t files = count_fields(record, VOL_FILE);
    if (files > FILE_LIMIT)
        return "a volume has too many files";
    volume->files = must_allocate(files * sizeof *volume->files);
    volume->mode = 0777;
    struct reader reader = {record->value, record->length, false};
    struct field field;
    while (next_field(&reader, &field)) {
        const char *error = set_volume_field(volume, &field);
        if (error)
            return error;
    }
    if (reader.malformed || volume->name == NULL || volume->kind == 0)
        return "a volume's record is cut off, or lacks its name or kind";
    return volume->mode > 07777 ? "a volume has an impossible mode" : NULL;
}

const char *parse_interface(const struct field *record, struct interface *interface)
{
    struct reader reader = {record->value, record->length, false};
    struct field field;
    const char *error = NULL;
    while (error == NULL && next_field(&reader, &field))
        switch (field.key) {
        case IF_MAC:
            error = set_text(&interface->mac, &field);
            break;
        case IF_NAME:
            error = set_text(&interface->name, &field);
            break;
        case IF_ADDRESS:
            if (interface->address_count == ADDRESS_LIMIT)
                error = "an interface has too many addresses";
            else
                error = set_text(&interface->addresses[interface->address_count++], &field);
            break;
        case IF_GATEWAY:
            error = set_text(&interface->gateway, &field);
            break;
        case IF_GATEWAY6:
            error = set_text(&interface->gateway6, &field);
            break;
        case IF_MTU:
            error = set_u32(&interface->mtu, &field);
            break;
        default:
            error = unknown(&field);
        }
    if (error)
        return error;
    if (reader.malformed || interface->mac == NULL || interface->name == NULL)
        return "an interface's record is cut off, or lacks its hardware address or name";
    return NULL;
}

const char *resolve_mounts(struct config *config)
{
    for (size_t i = 0; i < config->container_count; i++)
        for (size_t j = 0; j < config->containers[i].mount_count; j++) {
            struct mount_place *place = &config->containers[i].mounts[j];
            for (place->index = 0; place->index < config->volume_count; place->index++)
                if (strcmp(config->volumes[place->index].name, place->volume) == 0)
                    break;
            if (place->index == config->volume_count)
                return "a mount names a volume that is not there";
        }
    return NULL;
}

void free_pod_parts(struct config *config)
{
    for (size_t i = 0; i < config->container_count; i++) {
        struct container *container = &config->containers[i];
        for (size_t j = 0; j < container->mount_count; j++) {
            free(container->mounts[j].volume);
            free(container->mounts[j].path);
            free(container->mounts[j].sub_path);
        }
        free(container->mounts);
    }
    for (size_t i = 0; i < config->volume_count; i++) {
        struct volume *volume = &config->volumes[i];
        for (size_t j = 0; j < volume->file_count; j++) {
            free(volume->files[j].path);
            buffer_free(&volume->files[j].content);
        }
        free(volume->files);
        free(volume->name);
        free(volume->disk);
        free(volume->file_system);
        free(volume->source);
        free(volume->options);
        buffer_free(&volume->secret);
    }
    for (size_t i = 0; i < config->interface_count; i++) {
        struct interface *interface = &config->interfaces[i];
        for (size_t j = 0; j < interface->address_count; j++)
            free(interface->addresses[j]);
        free(interface->mac);
        free(interface->name);
        free(interface->gateway);
        free(interface->gateway6);
    }
    free(config->tools_disk);
}
