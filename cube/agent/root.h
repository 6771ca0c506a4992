/* A container's root: mounted by the agent, entered by the container's own first process. */
#ifndef CUBE_ROOT_H
#define CUBE_ROOT_H

#include "config.h"

/* Mounts the root at SANDBOX/<id>/root in the agent's view; an overlay of an earlier run is replaced
 * by an empty one. NULL, or what went wrong.
 */
const char *root_mount(const struct container *container);
void root_unmount(const struct container *container);
/* In a new mount and PID namespace: pivots into the root and makes /proc, /sys, /dev, /tmp and the
 * volumes.
 */
const char *root_enter(const struct container *container, const struct config *config);
const char *root_seal(void); /* makes the entered root read-only, but nothing mounted in it */

#endif
