/* Pseudo-terminals: made inside a container, their far end handed to the agent. */
#ifndef CUBE_TERMINAL_H
#define CUBE_TERMINAL_H

#include <stdbool.h>
#include <stdint.h>

/* In the container: a new terminal of its /dev/pts; `far` is the agent's end. False: errno. */
bool terminal_make(uint16_t rows, uint16_t columns, int *near, int *far);
void terminal_resize(int far, uint16_t rows, uint16_t columns);
/* Over a socket of whole messages; the message is a number, with one descriptor or none (-1). */
bool send_descriptor(int socket, int32_t number, int descriptor);
/* Bytes of the message as recvmsg says it; *descriptor is -1 without one. Does not wait. */
long receive_message(int socket, int32_t *number, int *descriptor);

#endif
