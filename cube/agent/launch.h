/* The container's side of a start: from a fresh namespace to execve. */
#ifndef CUBE_LAUNCH_H
#define CUBE_LAUNCH_H

#include "config.h"

#define CANNOT_RUN 126
#define NOT_FOUND 127
#define START_FAILED 125 /* the fault is not the program's: root, user, working directory */

struct launch {
    const struct container *container;
    const struct config *config;
    int standard[3]; /* becomes 0, 1, 2 */
    int failure;     /* closed by a successful execve */
    int control;     /* supervisor's end, -1 without one */
};

struct start_failure {
    int32_t code;
    char text[508];
};

_Noreturn void launch_container(const struct launch *launch, bool supervised);

#endif
