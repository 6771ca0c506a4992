/* Users and groups as the image's /etc/passwd and /etc/group name them. Pure over their bytes. */
#ifndef CUBE_ACCOUNT_H
#define CUBE_ACCOUNT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define GROUP_LIMIT 1024u

struct account {
    uid_t uid;
    gid_t gid;
    gid_t groups[GROUP_LIMIT]; /* supplementary, the primary group first */
    size_t group_count;
    char home[4096];
};

/* `wanted` is [USER|UID][:GROUP|GID]; the texts are the two files' contents (may be empty).
 * NULL, or one sentence that says what is missing (valid until the next call).
 */
const char *account_resolve(const char *wanted, const char *passwd, size_t passwd_length,
                            const char *group, size_t group_length, struct account *account);

#endif
