/* The conversation with the host: its requests, the processes it knows, and the event loop. */
#ifndef CUBE_SESSION_H
#define CUBE_SESSION_H

#include "channel.h"
#include "config.h"

struct session {
    struct channel channel;
    struct config config;
    uint64_t started; /* when the agent began, monotonic ns */
    int children;     /* readable when a child has ended */
    bool host_said_hello;
    bool shutdown_asked;
};

void session_hello(struct session *session);
void session_log(struct session *session, const char *text);
/* Asks for a container's start: at once, or when its volumes are there. NULL, or what went wrong. */
const char *session_start(struct session *session, size_t container);
/* One round of the event loop: waits for anything, then moves everything that can move. */
void session_turn(struct session *session, int timeout_ms);
/* Ends all containers and what runs beside them; waits a little for their last bytes. */
void session_end(struct session *session);

#endif
