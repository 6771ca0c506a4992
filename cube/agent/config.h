/* The configuration disk: what this VM is to run (PROTOCOL.md, "Configuration disk").
 * Parsing is pure: bytes in, structures or one sentence out, so that tests can fuzz it.
 */
#ifndef CUBE_CONFIG_H
#define CUBE_CONFIG_H

#include "record.h"

#define CONFIG_MAGIC "cubecfg1"
#define CONFIG_HEADER 16u
#define CONFIG_LIMIT (16u << 20) /* bytes of body */
#define CONTAINER_LIMIT 32u
#define MODULE_SET_LIMIT 16u
#define STRING_LIMIT 65536u /* arguments, and variables, of one container */
#define INTERFACE_LIMIT 8u
#define ADDRESS_LIMIT 8u /* of one interface */
#define VOLUME_LIMIT 64u
#define FILE_LIMIT 4096u /* of one volume */
#define MOUNT_LIMIT 64u  /* of one container */
#define EXTRA_GROUP_LIMIT 64u
#define SYNC_KEY_BYTES 16u

enum config_key {
    CONFIG_HOSTNAME = 1,
    CONFIG_CLOCK = 2,
    CONFIG_RESOLV = 3,
    CONFIG_HOSTS = 4,
    CONFIG_CONTAINER = 5,
    CONFIG_MODULES = 6,
    CONFIG_INTERFACE = 7,
    CONFIG_VOLUME = 8,
    CONFIG_TOOLS_DISK = 9,
    CONFIG_SYNC_KEY = 10,
};

enum container_key {
    CONTAINER_ID = 1,
    CONTAINER_NAME = 2,
    CONTAINER_ROOT_DISK = 3,
    CONTAINER_ROOT_FS = 4,
    CONTAINER_ROOT_WRITABLE = 5,
    CONTAINER_UPPER_BYTES = 6,
    CONTAINER_ARG = 7,
    CONTAINER_ENV = 8,
    CONTAINER_USER = 9,
    CONTAINER_WORKDIR = 10,
    CONTAINER_STDIN = 11,
    CONTAINER_CAPABILITIES = 12,
    CONTAINER_PID_ONE = 13,
    CONTAINER_MOUNT = 14,
    CONTAINER_AUTOSTART = 15,
    CONTAINER_TTY = 16,
    CONTAINER_READ_ONLY_ROOT = 17,
    CONTAINER_CPU_MILLIS = 18,
    CONTAINER_MEMORY_BYTES = 19,
    CONTAINER_PIDS_LIMIT = 20,
    CONTAINER_GROUP = 21,
    CONTAINER_NO_NEW_PRIVILEGES = 22,
    CONTAINER_DISCARD_AFTER_MS = 23,
};

enum pid_one { PID_ONE_AUTO = 0, PID_ONE_PROGRAM = 1, PID_ONE_SUPERVISOR = 2 };

enum volume_kind {
    VOLUME_FILES = 1,
    VOLUME_MEMORY = 2,
    VOLUME_DISK = 3,
    VOLUME_NFS = 4,
    VOLUME_S3 = 5,
    VOLUME_VIRTIOFS = 6,
};

struct volume_file {
    char *path; /* relative, without "." and ".." */
    uint32_t mode, uid, gid;
    struct buffer content;
};

struct volume {
    char *name;
    enum volume_kind kind;
    uint64_t size_bytes;
    char *disk, *file_system, *source, *options;
    struct buffer secret;
    uint32_t mode;
    bool has_gid, read_only;
    uint32_t gid;
    struct volume_file *files;
    size_t file_count;
};

struct mount_place {
    char *volume, *path, *sub_path;
    bool read_only;
    size_t index; /* of the volume */
};

struct interface {
    char *mac, *name;
    char *addresses[ADDRESS_LIMIT];
    size_t address_count;
    char *gateway, *gateway6;
    uint32_t mtu;
};

struct container {
    uint32_t id;
    char *name;
    char *root_disk;
    char *root_fs;
    bool root_writable;
    uint64_t upper_bytes; /* limit of the writable upper layer; 0 = the kernel's default */
    char **arguments;     /* NULL-terminated, at least one */
    size_t argument_count;
    char **environment; /* NULL-terminated NAME=VALUE */
    size_t environment_count;
    char *user;
    char *working_directory;
    bool wants_stdin;
    uint64_t capabilities; /* bit set, by capability number */
    enum pid_one pid_one;
    bool held; /* does not start before the host says so */
    bool tty, read_only_root, no_new_privileges;
    uint64_t cpu_millis, memory_bytes, pids_limit, discard_after_ms; /* 0 = none */
    uint32_t groups[EXTRA_GROUP_LIMIT];
    size_t group_count;
    struct mount_place *mounts;
    size_t mount_count;
};

struct config {
    char *hostname;      /* NULL: keep the kernel's */
    uint64_t clock_ns;   /* host's time when the disk was written; 0: unknown */
    struct buffer resolv; /* contents for /etc/resolv.conf; empty: leave the image's */
    struct buffer hosts;  /* the same for /etc/hosts */
    char *module_sets[MODULE_SET_LIMIT]; /* loaded before the containers start */
    size_t module_set_count;
    struct interface interfaces[INTERFACE_LIMIT];
    size_t interface_count;
    struct volume volumes[VOLUME_LIMIT];
    size_t volume_count;
    char *tools_disk; /* NULL: none */
    uint8_t sync_key[SYNC_KEY_BYTES];
    bool has_sync_key;
    struct container containers[CONTAINER_LIMIT];
    size_t container_count;
};

/* Body length claimed by a header, checked; 0 and *error when it is not a configuration disk. */
uint32_t config_body_length(const uint8_t header[CONFIG_HEADER], const char **error);
/* NULL, or one sentence that says what is wrong. `config` can be freed in both cases. */
const char *config_parse(const uint8_t header[CONFIG_HEADER], const uint8_t *body, size_t length,
                         struct config *config);
void config_free(struct config *config);
/* Pieces of it, in podconfig.c; the same rules. */
size_t count_fields(const struct field *record, uint16_t key);
const char *set_text(char **target, const struct field *field);
const char *parse_mount(const struct field *record, struct mount_place *place);
const char *parse_volume(const struct field *record, struct volume *volume);
const char *parse_interface(const struct field *record, struct interface *interface);
/* Each mount's volume, by name. */
const char *resolve_mounts(struct config *config);
/* Relative, of names only: nothing in it leads out. */
bool path_stays_inside(const char *path);
void free_pod_parts(struct config *config);
uint32_t crc32_of(const uint8_t *bytes, size_t length);

#endif
