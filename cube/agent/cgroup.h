/* One cgroup (version 2) per container: limits, use, and everything in it. Without cgroups in the
 * kernel all of this does nothing, unless a limit was asked for.
 */
#ifndef CUBE_CGROUP_H
#define CUBE_CGROUP_H

#include "config.h"

struct usage {
    uint64_t cpu_ns, memory_bytes, memory_limit, pids, read_bytes, write_bytes, oom_kills;
};

void cgroup_mount(void);
/* Makes the container's group with its limits. NULL, or what went wrong. */
const char *cgroup_make(const struct container *container);
/* For cgroup_enter by a process that has left the agent's view of files; -1 without cgroups. */
int cgroup_open(uint32_t container);
void cgroup_enter(int group); /* moves the calling process */
struct usage cgroup_usage(uint32_t container);
struct usage cgroup_total(void); /* cpu_ns of the whole machine */
void cgroup_signal(uint32_t container, int number);

#endif
