/* The machine around the containers: mounts, kernel modules, disks, clock, loopback, power. */
#ifndef CUBE_GUEST_H
#define CUBE_GUEST_H

#include "record.h"

#define SANDBOX "/run/cube" /* one directory per container: lower, upper, root */

/* Every function that returns a text returns NULL for success or one sentence, valid until the
 * next call of any of them.
 */
const char *problem(const char *format, ...) __attribute__((format(printf, 1, 2)));
void console_line(const char *text);

void guest_mount_base(void);
/* Modules of one set, in order; callable after the initial root is left too. */
const char *guest_load_modules(const char *wanted);
/* The sets that disks and the channel need: "always" and, where there is a PCI bus, "pci". */
const char *guest_load_boot_modules(void);
/* Moves onto a tmpfs: the kernel's initial root cannot be pivoted away from by containers. */
const char *guest_leave_initramfs(void);
int guest_busybox(void); /* descriptor of the initial root's busybox, -1 without one */
/* What follows WORD or WORD= on the kernel's command line; NULL without it. */
const char *guest_cmdline_word(const char *word);
/* /dev path of the virtio disk with this serial; waits up to the deadline. */
const char *guest_find_disk(const char *serial, int deadline_ms, char path[64]);
uint64_t guest_disk_read_bytes(const char *serial);
const char *guest_read_config(uint8_t header[16], uint8_t **body, size_t *length);
void guest_memory(uint64_t *total, uint64_t *available); /* bytes */
void guest_set_clock(uint64_t realtime_ns);
void guest_loopback_up(void);
_Noreturn void guest_power_off(void);
/* mkdir -p; true when the directory is there afterwards. */
bool make_directories(const char *path, unsigned mode);

#endif
