/* Addresses and routes of the machine, over rtnetlink. */
#ifndef CUBE_NETWORK_H
#define CUBE_NETWORK_H

#include "config.h"

/* Finds the interface by its hardware address, names it, and gives it what the record says. NULL,
 * or what went wrong.
 */
const char *network_set_up(const struct interface *interface);
void network_traffic(uint64_t *received, uint64_t *sent); /* bytes, loopback not counted */

#endif
