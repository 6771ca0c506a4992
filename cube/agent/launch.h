/* The container's side of a start: from a fresh namespace to execve. */
#ifndef CUBE_LAUNCH_H
#define CUBE_LAUNCH_H

#include "config.h"

#define CANNOT_RUN 126
#define NOT_FOUND 127
#define START_FAILED 125 /* the fault is not the program's: root, user, working directory */

/* What is run: a container's own program, or one that the host wants run beside it. */
struct program {
    char **arguments;   /* NULL-terminated, at least one */
    char **environment; /* NULL-terminated NAME=VALUE; of two the later counts */
    size_t environment_count;
    const char *user, *directory;
    bool wants_stdin, tty;
    uint16_t rows, columns;
};

struct launch {
    const struct container *container;
    const struct config *config;
    struct program program;
    int joined;      /* pidfd of the running container that the program joins; -1: a new one */
    int standard[3]; /* becomes 0, 1, 2; -1 where a terminal will be */
    int failure;     /* closed by a successful execve */
    int control;     /* the child's end: descriptors and statuses out, signals in */
};

struct start_failure {
    int32_t code;
    char text[508];
};

/* In a fresh child: becomes the program, or its supervisor. */
_Noreturn void launch_container(struct launch *launch, bool supervised);

#endif
