#include "cgroup.h"

#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define BASE "/sys/fs/cgroup"
#define CPU_PERIOD_US 100000u

static bool put(const char *directory, const char *name, const char *value)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    bool done = write(file, value, strlen(value)) == (ssize_t)strlen(value);
    close(file);
    return done;
}

static void group_of(uint32_t container, char path[64])
{
    snprintf(path, 64, BASE "/c%u", container);
}

void cgroup_mount(void)
{
    if (mount("cgroup2", BASE, "cgroup2", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL) < 0)
        return;
    static const char *const wanted[] = {"+cpu", "+memory", "+pids", "+io"};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        put(BASE, "cgroup.subtree_control", wanted[i]);
}

const char *cgroup_make(const struct container *container)
{
    char path[64], value[64];
    group_of(container->id, path);
    mkdir(path, 0755);
    if (container->memory_bytes) {
        snprintf(value, sizeof value, "%llu", (unsigned long long)container->memory_bytes);
        if (!put(path, "memory.max", value))
            return problem("the memory limit cannot be set: %s", strerror(errno));
        /* One process of a container without the others is a container that limps. */
        put(path, "memory.oom.group", "1");
        put(path, "memory.swap.max", "0");
    }
    if (container->cpu_millis) {
        unsigned long long quota = container->cpu_millis * (CPU_PERIOD_US / 1000);
        snprintf(value, sizeof value, "%llu %u", quota < 1000 ? 1000 : quota, CPU_PERIOD_US);
        if (!put(path, "cpu.max", value))
            return problem("the processor limit cannot be set: %s", strerror(errno));
    }
    if (container->pids_limit) {
        snprintf(value, sizeof value, "%llu", (unsigned long long)container->pids_limit);
        if (!put(path, "pids.max", value))
            return problem("the limit of processes cannot be set: %s", strerror(errno));
    }
    return NULL;
}

int cgroup_open(uint32_t container)
{
    char path[64], file[96];
    group_of(container, path);
    snprintf(file, sizeof file, "%s/cgroup.procs", path);
    return open(file, O_WRONLY | O_CLOEXEC);
}

void cgroup_enter(int group)
{
    if (group >= 0 && write(group, "0", 1) < 0)
        console_line("a process could not enter its container's cgroup");
}

static size_t read_text(const char *directory, const char *name, char *text, size_t size)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? 0 : read(file, text, size - 1);
    if (file >= 0)
        close(file);
    text[got > 0 ? got : 0] = 0;
    return got > 0 ? (size_t)got : 0;
}

static uint64_t number_in(const char *directory, const char *name)
{
    char text[64];
    return read_text(directory, name, text, sizeof text) ? strtoull(text, NULL, 10) : 0;
}

/* The sum of all numbers that follow `word`: "word N" or "word=N". */
static uint64_t sum_of(const char *text, const char *word)
{
    uint64_t sum = 0;
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)) != NULL; at += length)
        if ((at == text || at[-1] == ' ' || at[-1] == '\n') && strchr(" =", at[length]) != NULL)
            sum += strtoull(at + length + 1, NULL, 10);
    return sum;
}

struct usage cgroup_usage(uint32_t container)
{
    char path[64], text[8192];
    struct usage used = {0};
    group_of(container, path);
    read_text(path, "cpu.stat", text, sizeof text);
    used.cpu_ns = sum_of(text, "usage_usec") * 1000;
    read_text(path, "memory.stat", text, sizeof text);
    uint64_t idle = sum_of(text, "inactive_file");
    used.memory_bytes = number_in(path, "memory.current");
    used.memory_bytes = used.memory_bytes > idle ? used.memory_bytes - idle : 0;
    used.memory_limit = number_in(path, "memory.max"); /* "max" reads as 0 */
    used.pids = number_in(path, "pids.current");
    read_text(path, "io.stat", text, sizeof text);
    used.read_bytes = sum_of(text, "rbytes");
    used.write_bytes = sum_of(text, "wbytes");
    read_text(path, "memory.events", text, sizeof text);
    used.oom_kills = sum_of(text, "oom_kill");
    return used;
}

struct usage cgroup_total(void)
{
    char text[8192];
    read_text(BASE, "cpu.stat", text, sizeof text);
    return (struct usage){.cpu_ns = sum_of(text, "usage_usec") * 1000};
}

void cgroup_signal(uint32_t container, int number)
{
    char path[64], file[96];
    group_of(container, path);
    snprintf(file, sizeof file, "%s/cgroup.procs", path);
    FILE *list = fopen(file, "re");
    if (list == NULL)
        return;
    int member;
    while (fscanf(list, "%d", &member) == 1)
        if (member > 1)
            kill(member, number);
    fclose(list);
}
