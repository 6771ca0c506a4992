/* Volumes: mounted once, by a child of the agent (a server that does not answer holds up nobody),
 * and bound into every container that names them.
 */
#ifndef CUBE_VOLUME_H
#define CUBE_VOLUME_H

#include "config.h"

#include <sys/types.h>

#define VOLUME_SECONDS 90 /* for one volume to be mounted */

/* Starts mounting what the container needs and has not. True with NULL: all of it is there. True
 * with a text: it failed (the next call tries again). False: not yet.
 */
bool volumes_ready(const struct config *config, const struct container *container,
                   const char **error);
/* Whether the child that has ended was one that mounts. */
bool volume_reaped(pid_t child, int status);
void volumes_unmount(const struct config *config);

/* In the container's first process: before its root is entered, `trees` become detached copies of
 * its volumes; afterwards they are attached at their paths.
 */
const char *volumes_take(const struct config *config, const struct container *container,
                         int trees[MOUNT_LIMIT]);
const char *volumes_attach(const struct container *container, const int trees[MOUNT_LIMIT]);

/* remote.c, in the mounting child. */
const char *mount_nfs(const struct volume *volume, const char *target);
const char *mount_s3(const struct config *config, const struct volume *volume, size_t index);
#define TOOLS_ROOT SANDBOX "/tools/root"

#endif
