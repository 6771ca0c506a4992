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

enum config_key {
    CONFIG_HOSTNAME = 1,
    CONFIG_CLOCK = 2,
    CONFIG_RESOLV = 3,
    CONFIG_HOSTS = 4,
    CONFIG_CONTAINER = 5,
    CONFIG_MODULES = 6,
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
};

enum pid_one { PID_ONE_AUTO = 0, PID_ONE_PROGRAM = 1, PID_ONE_SUPERVISOR = 2 };

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
};

struct config {
    char *hostname;      /* NULL: keep the kernel's */
    uint64_t clock_ns;   /* host's time when the disk was written; 0: unknown */
    struct buffer resolv; /* contents for /etc/resolv.conf; empty: leave the image's */
    struct buffer hosts;  /* the same for /etc/hosts */
    char *module_sets[MODULE_SET_LIMIT]; /* loaded before the containers start */
    size_t module_set_count;
    struct container containers[CONTAINER_LIMIT];
    size_t container_count;
};

/* Body length claimed by a header, checked; 0 and *error when it is not a configuration disk. */
uint32_t config_body_length(const uint8_t header[CONFIG_HEADER], const char **error);
/* NULL, or one sentence that says what is wrong. `config` can be freed in both cases. */
const char *config_parse(const uint8_t header[CONFIG_HEADER], const uint8_t *body, size_t length,
                         struct config *config);
void config_free(struct config *config);
uint32_t crc32_of(const uint8_t *bytes, size_t length);

#endif
