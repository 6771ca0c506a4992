#include "root.h"

#include "guest.h"
#include "volume.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static const char *mount_lower(const struct container *container, const char *target)
{
    char disk[64];
    const char *error = guest_find_disk(container->root_disk, 5000, disk);
    if (error)
        return error;
    unsigned long flags = container->root_writable ? 0 : MS_RDONLY;
    if (!make_directories(target, 0755))
        return problem("cannot make %s: %s", target, strerror(errno));
    if (mount(disk, target, container->root_fs, flags, NULL) < 0)
        return problem("cannot mount the root disk as %s: %s", container->root_fs, strerror(errno));
    return NULL;
}

static bool is_mount_point(const char *path)
{
    char parent[128];
    struct stat inside, outside;
    snprintf(parent, sizeof parent, "%s/..", path);
    return stat(path, &inside) == 0 && stat(parent, &outside) == 0 && inside.st_dev != outside.st_dev;
}

const char *root_mount(const struct container *container)
{
    char base[64], lower[96], writable[96], upper[112], work[112], root[96], options[512];
    snprintf(base, sizeof base, SANDBOX "/%u", container->id);
    snprintf(root, sizeof root, "%s/root", base);
    if (!make_directories(root, 0755))
        return problem("cannot make %s: %s", root, strerror(errno));
    snprintf(lower, sizeof lower, "%s/lower", base);
    bool again = is_mount_point(container->root_writable ? root : lower);
    if (container->root_writable)
        return again ? NULL : mount_lower(container, root);
    const char *error = again ? NULL : mount_lower(container, lower);
    if (error)
        return error;
    /* The upper layer has a tmpfs of its own, so that its limit is the container's alone. */
    snprintf(writable, sizeof writable, "%s/writable", base);
    snprintf(upper, sizeof upper, "%s/upper", writable);
    snprintf(work, sizeof work, "%s/work", writable);
    if (again) {
        umount2(root, MNT_DETACH);
        umount2(writable, MNT_DETACH);
    }
    options[0] = 0;
    if (container->upper_bytes)
        snprintf(options, sizeof options, "size=%llu", (unsigned long long)container->upper_bytes);
    if (!make_directories(writable, 0755) || mount("tmpfs", writable, "tmpfs", 0, options) < 0 ||
        mkdir(work, 0755) < 0 || mkdir(upper, 0755) < 0)
        return problem("cannot make the writable layer: %s", strerror(errno));
    /* The merged root shows the upper directory's own owner and mode: copy the image's. */
    struct stat status;
    if (stat(lower, &status) == 0) {
        if (chown(upper, status.st_uid, status.st_gid) < 0 || chmod(upper, status.st_mode & 07777) < 0)
            return problem("cannot copy the root's owner: %s", strerror(errno));
    }
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work);
    if (mount("overlay", root, "overlay", 0, options) < 0)
        return problem("cannot mount the overlay: %s", strerror(errno));
    return NULL;
}

void root_unmount(const struct container *container)
{
    char path[96];
    snprintf(path, sizeof path, SANDBOX "/%u/root", container->id);
    /* A writable disk must be clean when the machine goes; the rest lives in memory. */
    if (container->root_writable && umount2(path, 0) < 0)
        umount2(path, MNT_DETACH);
}

/* A mount point inside the image. A symbolic link there could point anywhere: refused. */
static const char *mount_point(const char *path)
{
    struct stat status;
    if (mkdir(path, 0755) < 0 && errno != EEXIST)
        return problem("cannot make %s in the root: %s", path, strerror(errno));
    if (lstat(path, &status) < 0 || !S_ISDIR(status.st_mode))
        return problem("the image's %s is not a directory", path);
    return NULL;
}

static const char *mount_at(const char *type, const char *path, unsigned long flags,
                            const char *options)
{
    const char *error = mount_point(path);
    if (error)
        return error;
    if (mount(type, path, type, flags, options) < 0)
        return problem("cannot mount %s: %s", path, strerror(errno));
    return NULL;
}

static const char *make_devices(void)
{
    static const struct {
        const char *path;
        unsigned major, minor;
    } devices[] = {{"/dev/null", 1, 3},   {"/dev/zero", 1, 5},    {"/dev/full", 1, 7},
                   {"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0}};
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},
                                           {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"},
                                           {"/proc/self/fd/2", "/dev/stderr"},
                                           {"pts/ptmx", "/dev/ptmx"}};
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
        dev_t number = makedev(devices[i].major, devices[i].minor);
        if (mknod(devices[i].path, S_IFCHR | 0666, number) < 0 ||
            chmod(devices[i].path, 0666) < 0)
            return problem("cannot make %s: %s", devices[i].path, strerror(errno));
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i][0], links[i][1]) < 0)
            return problem("cannot make %s: %s", links[i][1], strerror(errno));
    const unsigned long plain = MS_NOSUID | MS_NOEXEC | MS_NODEV;
    const char *error = mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC,
                                 "newinstance,ptmxmode=0666,mode=0620,gid=5");
    if (error == NULL)
        error = mount_at("tmpfs", "/dev/shm", plain, "mode=1777,size=64m");
    if (error == NULL && mount_at("mqueue", "/dev/mqueue", plain, NULL) != NULL)
        rmdir("/dev/mqueue"); /* not every kernel has POSIX queues */
    return error;
}

/* Replaces a file of the image, and never writes through a symbolic link. */
static const char *write_file(const char *path, const void *bytes, size_t length)
{
    mkdir("/etc", 0755);
    if (unlink(path) < 0 && errno != ENOENT)
        return problem("cannot replace %s: %s", path, strerror(errno));
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (file < 0)
        return problem("cannot write %s: %s", path, strerror(errno));
    ssize_t wrote = write(file, bytes, length);
    if (close(file) < 0 || wrote != (ssize_t)length)
        return problem("cannot write %s: %s", path, strerror(errno));
    return NULL;
}

static const char *write_names(const struct config *config)
{
    const char *error = NULL;
    if (config->resolv.length)
        error = write_file("/etc/resolv.conf", config->resolv.bytes, config->resolv.length);
    if (error == NULL && config->hosts.length)
        error = write_file("/etc/hosts", config->hosts.bytes, config->hosts.length);
    if (error == NULL && config->hostname && config->hostname[0]) {
        char line[256];
        int length = snprintf(line, sizeof line, "%s\n", config->hostname);
        error = write_file("/etc/hostname", line, (size_t)length);
    }
    return error;
}

const char *root_enter(const struct container *container, const struct config *config)
{
    char root[96];
    snprintf(root, sizeof root, SANDBOX "/%u/root", container->id);
    umask(0);
    int trees[MOUNT_LIMIT];
    const char *error = volumes_take(config, container, trees);
    if (error)
        return error;
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || chdir(root) < 0 ||
        syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        return problem("cannot enter the root: %s", strerror(errno));
    const unsigned long plain = MS_NOSUID | MS_NOEXEC | MS_NODEV;
    error = mount_at("proc", "/proc", plain, NULL);
    if (error == NULL)
        error = mount_at("sysfs", "/sys", plain | MS_RDONLY, NULL);
    if (error == NULL) /* programs look there for their limits; a kernel without it is fine */
        mount("cgroup2", "/sys/fs/cgroup", "cgroup2", plain | MS_RDONLY, NULL);
    if (error == NULL)
        error = mount_at("tmpfs", "/dev", MS_NOSUID | MS_STRICTATIME, "mode=0755,size=64k");
    if (error == NULL)
        error = make_devices();
    if (error == NULL)
        error = write_names(config);
    if (mkdir("/tmp", 01777) == 0)
        chmod("/tmp", 01777);
    umask(022);
    return error ? error : volumes_attach(container, trees);
}

const char *root_seal(void)
{
    if (mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) < 0)
        return problem("the root cannot be made read-only: %s", strerror(errno));
    return NULL;
}
