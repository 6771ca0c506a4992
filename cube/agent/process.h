/* Processes of containers: starting, feeding, draining and ending them. */
#ifndef CUBE_PROCESS_H
#define CUBE_PROCESS_H

#include "channel.h"
#include "config.h"

#include <sys/types.h>

#define OUTPUT_WINDOW (256u << 10) /* bytes a stream may send before the host grants more */
#define INPUT_WINDOW (64u << 10)

struct process {
    uint32_t id;
    const struct container *container;
    pid_t first;       /* PID 1 of the container's namespace; 0 once reaped */
    bool supervised;   /* `first` is our supervisor, the program its child */
    int control;       /* to the supervisor: signals out, wait status in */
    int output[3];     /* [1] stdout, [2] stderr; -1 after the end */
    size_t credit[3];  /* bytes the host is ready to take */
    int failure;       /* readable: why the program could not be started */
    int input;         /* write end of stdin, or -1 */
    struct buffer input_left;
    bool input_ended;
    bool running;
    int wait_status;   /* of the program, when `status_known` */
    bool status_known;
    int start_code;    /* exit code of a failed start, 0 if it started */
    char start_problem[512];
    bool reported;     /* its exit frame is queued */
};

/* Starts the container's command; problems come later through `failure` and the exit frame. */
const char *process_start(struct process *process, const struct container *container,
                          const struct config *config);
void process_signal(struct process *process, int number, bool group);
void process_feed(struct process *process, const uint8_t *bytes, size_t length);
void process_end_input(struct process *process);
/* Pushes stdin into the program's pipe, granting the host as much again. */
void process_push_input(struct process *process, struct channel *channel);
/* Moves output that has credit into the channel. */
void process_pull_output(struct process *process, unsigned stream, struct channel *channel);
void process_read_failure(struct process *process, struct channel *channel);
void process_read_control(struct process *process);
void process_reaped(struct process *process, int wait_status);
/* Queues the exit frame once the namespace is empty and all output was sent. */
void process_report(struct process *process, struct channel *channel);

#endif
