/* A container's root: mounted by the agent, entered by the container's own first process. */
#ifndef CUBE_ROOT_H
#define CUBE_ROOT_H

#include "config.h"

/* Mounts the root at SANDBOX/<id>/root in the agent's view. NULL, or what went wrong. */
const char *root_mount(const struct container *container);
void root_unmount(const struct container *container);
/* In a new mount and PID namespace: pivots into the root and makes /proc, /sys, /dev and /tmp. */
const char *root_enter(const struct container *container, const struct config *config);

#endif
