#include "guest.h"

#include "channel.h"
#include "config.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

const char *problem(const char *format, ...)
{
    static char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

void console_line(const char *text)
{
    int console = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (console < 0)
        return;
    dprintf(console, "cube-agent: %s\n", text);
    close(console);
}

void guest_mount_base(void)
{
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
}

static bool path_has_entries(const char *path)
{
    DIR *directory = opendir(path);
    if (directory == NULL)
        return false;
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(directory)) != NULL)
        found = entry->d_name[0] != '.';
    closedir(directory);
    return found;
}

/* The initial root's /modules, kept open: once the initial root is left, no path leads there. */
static int modules_directory = -1;

/* "load" in it has a line "SET FILE" for each module, in loading order. A set without a line is
 * built into this kernel, or nothing here has it: then whoever asked for it finds out.
 */
const char *guest_load_modules(const char *wanted)
{
    if (modules_directory < 0)
        modules_directory = open("/modules", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int load = modules_directory < 0 ? -1 : openat(modules_directory, "load", O_RDONLY | O_CLOEXEC);
    FILE *list = load < 0 ? NULL : fdopen(load, "r");
    if (list == NULL)
        return NULL; /* a kernel of the user's own with everything built in */
    char set[16], name[128];
    const char *error = NULL;
    while (error == NULL && fscanf(list, "%15s %127s", set, name) == 2) {
        if (strcmp(set, wanted) != 0)
            continue;
        int file = openat(modules_directory, name, O_RDONLY | O_CLOEXEC);
        if (file < 0 || (syscall(SYS_finit_module, file, "", 0) < 0 && errno != EEXIST))
            error = problem("cannot load the kernel module %s: %s", name, strerror(errno));
        if (file >= 0)
            close(file);
    }
    fclose(list);
    return error;
}

const char *guest_load_boot_modules(void)
{
    const char *error = guest_load_modules("always");
    if (error == NULL && path_has_entries("/sys/bus/pci/devices"))
        error = guest_load_modules("pci");
    return error;
}

static int busybox = -1;

int guest_busybox(void)
{
    return busybox;
}

const char *guest_leave_initramfs(void)
{
    busybox = open("/sbin/busybox", O_RDONLY | O_CLOEXEC);
    static const char *const moved[] = {"/proc", "/sys", "/dev"};
    char target[64];
    mkdir("/sandbox", 0755);
    if (mount("tmpfs", "/sandbox", "tmpfs", MS_NOSUID, "mode=0755,size=16m") < 0)
        return problem("cannot mount a tmpfs for the agent: %s", strerror(errno));
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
        snprintf(target, sizeof target, "/sandbox%s", moved[i]);
        mkdir(target, 0755);
        if (mount(moved[i], target, NULL, MS_MOVE, NULL) < 0)
            return problem("cannot move %s: %s", moved[i], strerror(errno));
    }
    if (chdir("/sandbox") < 0 || mount("/sandbox", "/", NULL, MS_MOVE, NULL) < 0 ||
        chroot(".") < 0 || chdir("/") < 0)
        return problem("cannot leave the initial root: %s", strerror(errno));
    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
    if (!make_directories(SANDBOX, 0700))
        return problem("cannot make %s: %s", SANDBOX, strerror(errno));
    return NULL;
}

const char *guest_cmdline_word(const char *word)
{
    static char line[4096];
    if (line[0] == 0) {
        int file = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
        ssize_t got = file < 0 ? 0 : read(file, line, sizeof line - 1);
        if (file >= 0)
            close(file);
        line[got > 0 ? got : 0] = 0;
    }
    size_t length = strlen(word);
    for (const char *at = line; (at = strstr(at, word)) != NULL; at += length)
        if ((at == line || at[-1] == ' ') && strchr(" =\n", at[length]) != NULL)
            return at + length + (at[length] == '=');
    return NULL;
}

static bool read_line(const char *path, char *line, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t got = read(file, line, size - 1);
    close(file);
    if (got < 0)
        return false;
    line[got] = 0;
    line[strcspn(line, "\n")] = 0;
    return true;
}

/* Where a machine's disks cannot have serials of our choice, the kernel's command line names them in
 * their order: cube.disks=cube-config,root-1.
 */
static bool listed_disk(const char *list, const char *serial, char name[32])
{
    size_t length = strlen(serial);
    for (unsigned place = 0; place < 26; place++) {
        size_t width = strcspn(list, ", \n");
        if (width == length && memcmp(list, serial, length) == 0) {
            snprintf(name, 32, "vd%c", 'a' + (int)place);
            return true;
        }
        if (list[width] != ',')
            break;
        list += width + 1;
    }
    return false;
}

/* The block device name (vda) with this serial. */
static bool disk_name(const char *serial, char name[32])
{
    const char *list = guest_cmdline_word("cube.disks");
    if (list)
        return listed_disk(list, serial, name);
    DIR *disks = opendir("/sys/block");
    if (disks == NULL)
        return false;
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(disks)) != NULL) {
        char path[320], text[64];
        snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
        if (entry->d_name[0] != '.' && strlen(entry->d_name) < 32 &&
            read_line(path, text, sizeof text) && strcmp(text, serial) == 0) {
            strcpy(name, entry->d_name);
            found = true;
        }
    }
    closedir(disks);
    return found;
}

const char *guest_find_disk(const char *serial, int deadline_ms, char path[64])
{
    char name[32];
    uint64_t end = monotonic_ns() + (uint64_t)deadline_ms * 1000000u;
    for (;;) {
        if (disk_name(serial, name)) {
            snprintf(path, 64, "/dev/%s", name);
            if (access(path, F_OK) == 0)
                return NULL;
        }
        if (monotonic_ns() > end)
            return problem("this machine has no disk with the serial \"%s\"", serial);
        usleep(2000);
    }
}

uint64_t guest_disk_read_bytes(const char *serial)
{
    char name[32], path[96], line[256];
    unsigned long long sectors = 0;
    if (!disk_name(serial, name))
        return 0;
    snprintf(path, sizeof path, "/sys/block/%s/stat", name);
    if (!read_line(path, line, sizeof line) || sscanf(line, "%*u %*u %llu", &sectors) != 1)
        return 0;
    return (uint64_t)sectors * 512;
}

static bool read_all(int file, uint8_t *bytes, size_t length)
{
    while (length > 0) {
        ssize_t got = read(file, bytes, length);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        bytes += got;
        length -= (size_t)got;
    }
    return true;
}

const char *guest_read_config(uint8_t header[16], uint8_t **body, size_t *length)
{
    char path[64];
    const char *error = guest_find_disk("cube-config", 5000, path);
    if (error)
        return error;
    int disk = open(path, O_RDONLY | O_CLOEXEC);
    if (disk < 0)
        return problem("cannot open the configuration disk: %s", strerror(errno));
    if (!read_all(disk, header, CONFIG_HEADER)) {
        close(disk);
        return problem("cannot read the configuration disk: %s", strerror(errno));
    }
    *length = config_body_length(header, &error);
    if (error == NULL) {
        *body = must_allocate(*length);
        if (!read_all(disk, *body, *length))
            error = "the configuration disk is shorter than its header says";
    }
    close(disk);
    return error;
}

void guest_memory(uint64_t *total, uint64_t *available)
{
    char line[128];
    unsigned long long kib;
    *total = *available = 0;
    FILE *table = fopen("/proc/meminfo", "re");
    if (table == NULL)
        return;
    while (fgets(line, sizeof line, table))
        if (sscanf(line, "MemTotal: %llu", &kib) == 1)
            *total = kib * 1024;
        else if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            *available = kib * 1024;
    fclose(table);
}

void guest_set_clock(uint64_t realtime_ns)
{
    struct timespec when = {
        .tv_sec = (time_t)(realtime_ns / 1000000000u),
        .tv_nsec = (long)(realtime_ns % 1000000000u),
    };
    clock_settime(CLOCK_REALTIME, &when);
}

void guest_loopback_up(void)
{
    int handle = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (handle < 0)
        return;
    struct ifreq request = {.ifr_name = "lo"};
    if (ioctl(handle, SIOCGIFFLAGS, &request) == 0) {
        request.ifr_flags |= IFF_UP;
        ioctl(handle, SIOCSIFFLAGS, &request);
    }
    close(handle);
}

_Noreturn void guest_power_off(void)
{
    sync();
    /* Firecracker has no power switch: it ends when its guest resets (reboot=k). */
    if (guest_cmdline_word("cube.vsock"))
        reboot(RB_AUTOBOOT);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

bool make_directories(const char *path, unsigned mode)
{
    char partial[4096];
    struct stat status;
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof partial)
        return false;
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != 0)
            continue;
        memcpy(partial, path, i);
        partial[i] = 0;
        if (mkdir(partial, mode) < 0 && errno != EEXIST)
            return false;
    }
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}
