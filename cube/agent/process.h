/* Processes that the host knows by number: containers, programs run beside them, and connections
 * into the machine. Starting, feeding, draining and ending them.
 */
#ifndef CUBE_PROCESS_H
#define CUBE_PROCESS_H

#include "channel.h"
#include "config.h"
#include "request.h"

#include <sys/types.h>

#define OUTPUT_WINDOW (256u << 10) /* bytes a stream may send before the host grants more */
#define INPUT_WINDOW (64u << 10)
#define CONNECTION_REFUSED 111 /* exit code of a connection that could not be made */

enum process_kind { PROCESS_CONTAINER, PROCESS_EXEC, PROCESS_CONNECTION };

struct process {
    uint32_t id;
    enum process_kind kind;
    const struct container *container; /* NULL for a connection */
    pid_t first;       /* PID 1 of a container's namespace, or an exec's supervisor; 0 once reaped */
    bool supervised;   /* `first` is our supervisor, the program its child */
    int control;       /* to the supervisor: signals out, wait status and terminal in */
    int output[3];     /* [1] stdout, [2] stderr; -1 after the end */
    size_t credit[3];  /* bytes the host is ready to take */
    uint64_t waiting_since[3]; /* no credit since then, ns; 0: there is some */
    uint64_t lost[3];  /* dropped bytes that the host was not told about */
    int failure;       /* readable: why the program could not be started */
    int input;         /* write end of stdin, or -1 */
    struct buffer input_left;
    bool input_ended;
    bool tty;          /* one descriptor is output[1] and input */
    bool connecting;   /* the connection is not made yet */
    bool pending;      /* waits for its volumes */
    bool running;      /* from the start until its end was reported */
    bool executed;     /* the program itself runs, or ran */
    bool reported;     /* its exit frame was queued */
    int wait_status;   /* of the program, when `status_known` */
    bool status_known;
    int start_code;    /* exit code of a failed start, 0 if it started */
    char start_problem[512];
    uint64_t oom_before;   /* the container's out-of-memory kills when it started */
    struct buffer exit_record; /* for a host that comes later */
};

void process_reset(struct process *process); /* frees what it has; all fields as for a new one */
/* Starts the container's command, whose root and volumes are there; problems come later through
 * `failure` and the exit frame.
 */
const char *process_start(struct process *process, const struct container *container,
                          const struct config *config);
/* Runs a program in the running container of `beside`. */
const char *process_exec(struct process *process, uint32_t id, const struct process *beside,
                         const struct config *config, const struct request *request);
const char *process_connect(struct process *process, uint32_t id, const struct request *request);
/* Ends it before it began: the exit frame carries code and text. */
void process_refuse(struct process *process, uint32_t id, int code, const char *text,
                    struct channel *channel);
void process_signal(struct process *process, int number, unsigned flags);
void process_feed(struct process *process, const uint8_t *bytes, size_t length);
void process_end_input(struct process *process);
void process_resize(struct process *process, uint16_t rows, uint16_t columns);
/* Pushes stdin into the program's pipe, granting the host as much again. */
void process_push_input(struct process *process, struct channel *channel);
void process_grant(struct process *process, unsigned stream, uint32_t bytes);
/* Moves output that has credit into the channel; drops what has waited for too long. */
void process_pull_output(struct process *process, unsigned stream, struct channel *channel);
void process_drop_streams(struct process *process); /* nobody is there any more to read them */
/* Whether output of it may be held back now, and will be dropped after a while. */
bool process_holds_back(const struct process *process, const struct channel *channel);
void process_check_connection(struct process *process, struct channel *channel);
void process_read_failure(struct process *process, struct channel *channel);
void process_read_control(struct process *process);
void process_reaped(struct process *process, int wait_status);
/* Queues the exit frame once the program is gone and all its output was sent. */
void process_report(struct process *process, struct channel *channel);
/* A new host: windows as at the start, and what it must know about the process. */
void process_retell(struct process *process, struct channel *channel);

#endif
