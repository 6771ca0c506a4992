/* Volumes on other machines: NFS by the kernel's client, S3 by s3fs from the tools disk. */
#include "guest.h"
#include "volume.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define OPTIONS_LIMIT 1024u
#define FUSE_MAGIC 0x65735546

/* Options that are the mount call's flags, or mean something to mount programs only. */
static const struct {
    const char *word;
    unsigned long flag;
} plain_options[] = {{"ro", MS_RDONLY},   {"noexec", MS_NOEXEC},         {"noatime", MS_NOATIME},
                     {"sync", MS_SYNCHRONOUS}, {"nodiratime", MS_NODIRATIME}, {"rw", 0},
                     {"defaults", 0},     {"_netdev", 0},                {"auto", 0},
                     {"nosuid", 0},       {"nodev", 0},                  {"async", 0}};

static bool take_plain(const char *word, unsigned long *flags)
{
    for (size_t i = 0; i < sizeof plain_options / sizeof *plain_options; i++)
        if (strcmp(word, plain_options[i].word) == 0) {
            *flags |= plain_options[i].flag;
            return true;
        }
    return false;
}

const char *mount_nfs(const struct volume *volume, const char *target)
{
    static const char *const versions[] = {"vers=4.2,", "vers=4.1,", "vers=4.0,", "vers=3,nolock,"};
    char given[OPTIONS_LIMIT], address[80], rest[OPTIONS_LIMIT] = "", whole[2 * OPTIONS_LIMIT];
    unsigned long flags = MS_NOSUID | MS_NODEV | (volume->read_only ? MS_RDONLY : 0);
    const char *source = volume->source ? volume->source : "";
    const char *colon = source[0] == '[' ? strstr(source, "]:") : strchr(source, ':');
    size_t skip = source[0] == '[';
    if (colon == NULL || (size_t)(colon - source) - skip >= sizeof address)
        return problem("volume %s: \"%s\" is not ADDRESS:/PATH", volume->name, source);
    snprintf(address, sizeof address, "%.*s", (int)((size_t)(colon - source) - skip), source + skip);
    if (snprintf(given, sizeof given, "%s", volume->options ? volume->options : "") >=
        (int)sizeof given)
        return problem("volume %s has too many mount options", volume->name);
    bool chosen = false;
    char *state;
    for (char *word = strtok_r(given, ",", &state); word; word = strtok_r(NULL, ",", &state)) {
        if (take_plain(word, &flags))
            continue;
        chosen = chosen || strncmp(word, "vers=", 5) == 0 || strncmp(word, "nfsvers=", 8) == 0;
        size_t used = strlen(rest);
        snprintf(rest + used, sizeof rest - used, "%s,", word);
    }
    int cause = EINVAL;
    for (size_t i = 0; i < (chosen ? 1 : sizeof versions / sizeof *versions); i++) {
        snprintf(whole, sizeof whole, "%s%saddr=%s", chosen ? "" : versions[i], rest, address);
        if (mount(source, target, "nfs", flags, whole) == 0)
            return NULL;
        cause = errno;
        if (cause != EPROTONOSUPPORT && cause != EINVAL && cause != EPROTO)
            break;
    }
    if (cause == ENODEV)
        return problem("volume %s: this kernel has no NFS client", volume->name);
    return problem("volume %s: cannot mount %s over NFS: %s", volume->name, source, strerror(cause));
}

/* The tools' root: their disk below a small tmpfs, once for all volumes of the machine. */
static const char *mount_tools(const struct config *config)
{
    char disk[64];
    struct stat status;
    if (stat(TOOLS_ROOT "/mnt", &status) == 0)
        return NULL;
    if (config->tools_disk == NULL || config->tools_disk[0] == 0)
        return problem("this machine has no tools disk, so it has no s3fs");
    const char *error = guest_find_disk(config->tools_disk, 5000, disk);
    if (error)
        return error;
    if (!make_directories(SANDBOX "/tools/lower", 0755) ||
        !make_directories(SANDBOX "/tools/writable", 0755) || !make_directories(TOOLS_ROOT, 0755) ||
        mount(disk, SANDBOX "/tools/lower", "erofs", MS_RDONLY, NULL) < 0 ||
        mount("tmpfs", SANDBOX "/tools/writable", "tmpfs", 0, "mode=0755") < 0 ||
        mkdir(SANDBOX "/tools/writable/upper", 0755) < 0 ||
        mkdir(SANDBOX "/tools/writable/work", 0755) < 0 ||
        mount("overlay", TOOLS_ROOT, "overlay", 0,
              "lowerdir=" SANDBOX "/tools/lower,upperdir=" SANDBOX "/tools/writable/upper,workdir=" SANDBOX
              "/tools/writable/work") < 0)
        return problem("cannot mount the tools disk: %s", strerror(errno));
    static const char *const shared[] = {"/dev", "/proc"};
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) {
        char target[96];
        snprintf(target, sizeof target, TOOLS_ROOT "%s", shared[i]);
        mkdir(target, 0755);
        if (mount(shared[i], target, NULL, MS_BIND, NULL) < 0)
            return problem("cannot share %s with the tools: %s", shared[i], strerror(errno));
    }
    mkdir(TOOLS_ROOT "/etc", 0755);
    unlink(TOOLS_ROOT "/etc/resolv.conf");
    int names = open(TOOLS_ROOT "/etc/resolv.conf", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (names >= 0) {
        if (write(names, config->resolv.bytes, config->resolv.length) < 0)
            console_line("the tools have no name servers");
        close(names);
    }
    mkdir(TOOLS_ROOT "/mnt", 0755);
    return mkdir(TOOLS_ROOT "/run", 0755) < 0 && errno != EEXIST
               ? problem("cannot make the tools' /run: %s", strerror(errno))
               : NULL;
}

static _Noreturn void run_s3fs(const struct volume *volume, char **words)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    int said = open(TOOLS_ROOT "/run/said", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (said >= 0) {
        dup2(said, 1);
        dup2(said, 2);
    }
    if (chroot(TOOLS_ROOT) == 0 && chdir("/") == 0)
        execve("/usr/bin/s3fs", words, (char *[]){(char[]){"PATH=/usr/bin:/bin"}, NULL});
    dprintf(2, "%s: cannot run s3fs: %s\n", volume->name, strerror(errno));
    _exit(127);
}

/* What s3fs complained about last, on one line. */
static const char *last_words(void)
{
    static char text[2048];
    int file = open(TOOLS_ROOT "/run/said", O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? 0 : read(file, text, sizeof text - 1);
    if (file >= 0)
        close(file);
    text[got > 0 ? got : 0] = 0;
    for (size_t length = strlen(text); length && text[length - 1] == '\n';)
        text[--length] = 0;
    const char *line = strrchr(text, '\n');
    return line ? line + 1 : text;
}

const char *mount_s3(const struct config *config, const struct volume *volume, size_t index)
{
    /* Two volumes of one machine are mounted by two children: one after the other, please. */
    char lock_path[] = SANDBOX "/tools.lock";
    int lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (lock < 0 || lockf(lock, F_LOCK, 0) < 0)
        return problem("cannot lock the tools: %s", strerror(errno));
    const char *error = mount_tools(config);
    if (error)
        return error;
    char outside[96], inside[32], secret[64], secret_option[96], options[OPTIONS_LIMIT];
    snprintf(outside, sizeof outside, TOOLS_ROOT "/mnt/%zu", index);
    snprintf(inside, sizeof inside, "/mnt/%zu", index);
    snprintf(secret, sizeof secret, TOOLS_ROOT "/run/passwd-%zu", index);
    snprintf(secret_option, sizeof secret_option, "passwd_file=/run/passwd-%zu", index);
    if (snprintf(options, sizeof options, "allow_other,%s%s", volume->read_only ? "ro," : "",
                 volume->options && volume->options[0] ? volume->options : "use_cache=") >=
        (int)sizeof options)
        return problem("volume %s has too many mount options", volume->name);
    if (!make_directories(outside, 0755))
        return problem("cannot make %s: %s", outside, strerror(errno));
    unlink(secret);
    int file = open(secret, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool written = file >= 0 && write(file, volume->secret.bytes, volume->secret.length) ==
                                    (ssize_t)volume->secret.length;
    if (file >= 0)
        close(file);
    if (!written)
        return problem("volume %s: cannot write its key: %s", volume->name, strerror(errno));
    char *words[] = {(char[]){"s3fs"}, volume->source ? volume->source : (char[]){""},
                     inside,           (char[]){"-o"},
                     secret_option,    (char[]){"-o"},
                     options,          NULL};
    pid_t child = fork();
    if (child == 0)
        run_s3fs(volume, words);
    int status = -1;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        continue;
    struct statfs mounted;
    if (child < 0 || status != 0 || statfs(outside, &mounted) < 0 || mounted.f_type != FUSE_MAGIC)
        return problem("volume %s: s3fs cannot mount %s: %.200s", volume->name, volume->source,
                       last_words());
    return NULL;
}
