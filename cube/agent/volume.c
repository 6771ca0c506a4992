#include "volume.h"

#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum state { ABSENT = 0, MOUNTING, READY, FAILED };

static struct {
    enum state state;
    pid_t child;
    int failure; /* readable: why the child failed */
    char text[256];
} volumes[VOLUME_LIMIT];

static void volume_path(const struct config *config, size_t index, char path[96])
{
    if (config->volumes[index].kind == VOLUME_S3)
        snprintf(path, 96, TOOLS_ROOT "/mnt/%zu", index);
    else
        snprintf(path, 96, SANDBOX "/volumes/%zu", index);
}

static const char *own_root(const struct volume *volume, const char *path)
{
    mode_t mode = volume->mode | (volume->has_gid ? S_ISGID : 0);
    if (volume->has_gid && chown(path, (uid_t)-1, volume->gid) < 0)
        return problem("volume %s cannot have the group %u: %s", volume->name, volume->gid,
                       strerror(errno));
    if (chmod(path, mode) < 0)
        return problem("volume %s cannot have the mode %o: %s", volume->name, mode, strerror(errno));
    return NULL;
}

static const char *write_volume_file(const struct volume *volume, const struct volume_file *file,
                                     const char *root)
{
    char path[4400], *slash;
    if (snprintf(path, sizeof path, "%s/%s", root, file->path) >= (int)sizeof path)
        return problem("a path in volume %s is too long", volume->name);
    slash = strrchr(path, '/');
    *slash = 0;
    bool parent = make_directories(path, 0755);
    *slash = '/';
    int handle = parent ? open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600) : -1;
    if (handle < 0)
        return problem("volume %s: cannot make %s: %s", volume->name, file->path, strerror(errno));
    size_t done = 0;
    while (done < file->content.length) {
        ssize_t wrote = write(handle, file->content.bytes + done, file->content.length - done);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            break;
        done += (size_t)wrote;
    }
    bool owned = fchown(handle, file->uid, file->gid) == 0 && fchmod(handle, file->mode) == 0;
    if (close(handle) < 0 || done < file->content.length || !owned)
        return problem("volume %s: cannot write %s: %s", volume->name, file->path, strerror(errno));
    return NULL;
}

static const char *mount_memory(const struct volume *volume, const char *path)
{
    char options[64] = "mode=0755";
    uint64_t size = volume->size_bytes;
    if (volume->kind == VOLUME_FILES) {
        size = 1 << 20; /* and room for every file in whole pages, with its directories */
        for (size_t i = 0; i < volume->file_count; i++)
            size += volume->files[i].content.length + (32u << 10);
    }
    if (size)
        snprintf(options, sizeof options, "mode=0755,size=%llu", (unsigned long long)size);
    if (mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options) < 0)
        return problem("volume %s: cannot mount a tmpfs: %s", volume->name, strerror(errno));
    const char *error = NULL;
    for (size_t i = 0; error == NULL && i < volume->file_count; i++)
        error = write_volume_file(volume, &volume->files[i], path);
    return error ? error : own_root(volume, path);
}

/* A file system as mkfs left it: its owner and mode are ours to set, and lost+found is in the way
 * of programs that want an empty directory.
 */
static bool is_fresh(const char *path)
{
    DIR *directory = opendir(path);
    if (directory == NULL)
        return false;
    bool fresh = true;
    struct dirent *entry;
    while (fresh && (entry = readdir(directory)) != NULL)
        fresh = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 ||
                strcmp(entry->d_name, "lost+found") == 0;
    closedir(directory);
    return fresh;
}

static const char *mount_disk(const struct volume *volume, const char *path)
{
    char disk[64], trash[128];
    const char *type = volume->file_system && volume->file_system[0] ? volume->file_system : "ext4";
    const char *error = guest_find_disk(volume->disk ? volume->disk : "", 5000, disk);
    if (error)
        return error;
    unsigned long flags = MS_NODEV | MS_NOSUID | (volume->read_only ? MS_RDONLY : 0);
    if (mount(disk, path, type, flags, NULL) < 0)
        return problem("volume %s: cannot mount disk %s as %s: %s", volume->name, volume->disk, type,
                       strerror(errno));
    if (volume->read_only || !is_fresh(path))
        return NULL;
    snprintf(trash, sizeof trash, "%s/lost+found", path);
    rmdir(trash);
    return own_root(volume, path);
}

static const char *mount_volume(const struct config *config, size_t index)
{
    const struct volume *volume = &config->volumes[index];
    char path[96];
    volume_path(config, index, path);
    if (volume->kind == VOLUME_S3)
        return mount_s3(config, volume, index);
    if (!make_directories(path, 0755))
        return problem("cannot make %s: %s", path, strerror(errno));
    switch (volume->kind) {
    case VOLUME_DISK:
        return mount_disk(volume, path);
    case VOLUME_NFS:
        return mount_nfs(volume, path);
    case VOLUME_VIRTIOFS:
        if (mount(volume->source ? volume->source : "", path, "virtiofs", MS_NOSUID | MS_NODEV,
                  NULL) < 0)
            return problem("volume %s: cannot mount the host's %s: %s", volume->name, volume->source,
                           strerror(errno));
        return NULL;
    default:
        return mount_memory(volume, path);
    }
}

static void begin(const struct config *config, size_t index)
{
    int failure[2];
    volumes[index].state = FAILED;
    snprintf(volumes[index].text, sizeof volumes[index].text, "volume %s: no process to mount it",
             config->volumes[index].name);
    if (pipe2(failure, O_CLOEXEC) < 0)
        return;
    pid_t child = fork();
    if (child == 0) {
        alarm(VOLUME_SECONDS);
        const char *error = mount_volume(config, index);
        if (error && write(failure[1], error, strlen(error)) < 0)
            console_line(error);
        _exit(error != NULL);
    }
    close(failure[1]);
    if (child < 0) {
        close(failure[0]);
        return;
    }
    volumes[index].state = MOUNTING;
    volumes[index].child = child;
    volumes[index].failure = failure[0];
    snprintf(volumes[index].text, sizeof volumes[index].text,
             "volume %s was not mounted within %d seconds", config->volumes[index].name,
             VOLUME_SECONDS);
}

bool volume_reaped(pid_t child, int status)
{
    for (size_t i = 0; i < VOLUME_LIMIT; i++) {
        if (volumes[i].state != MOUNTING || volumes[i].child != child)
            continue;
        bool done = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        volumes[i].state = done ? READY : FAILED;
        if (!done) {
            ssize_t got = read(volumes[i].failure, volumes[i].text, sizeof volumes[i].text - 1);
            if (got > 0)
                volumes[i].text[got] = 0;
        }
        close(volumes[i].failure);
        return true;
    }
    return false;
}

bool volumes_ready(const struct config *config, const struct container *container,
                   const char **error)
{
    bool all = true;
    *error = NULL;
    for (size_t i = 0; i < container->mount_count; i++) {
        size_t index = container->mounts[i].index;
        if (volumes[index].state == ABSENT)
            begin(config, index);
        if (volumes[index].state == FAILED) {
            *error = problem("%s", volumes[index].text);
            char path[96];
            volume_path(config, index, path);
            umount2(path, MNT_DETACH); /* what a broken attempt may have left */
            volumes[index].state = ABSENT;
            return true;
        }
        all = all && volumes[index].state == READY;
    }
    return all;
}

void volumes_unmount(const struct config *config)
{
    for (size_t i = 0; i < config->volume_count; i++) {
        char path[96];
        volume_path(config, i, path);
        /* Disks must be clean when the machine goes; a server that is gone must not hold it up. */
        if (volumes[i].state == READY && umount2(path, 0) < 0)
            umount2(path, MNT_DETACH);
    }
}

static int open_beneath(int root, const char *path)
{
    struct open_how how = {
        .flags = O_PATH | O_CLOEXEC,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS,
    };
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* A sub-path that is not there is made, one directory at a time, each looked up without leaving. */
static int open_sub_path(int root, const char *sub_path)
{
    char partial[4096];
    size_t length = strlen(sub_path);
    if (length == 0)
        return dup(root);
    int found = length < sizeof partial ? open_beneath(root, sub_path) : -1;
    if (found >= 0 || errno != ENOENT)
        return found;
    int parent = dup(root);
    for (const char *at = sub_path; parent >= 0 && *at;) {
        size_t width = strcspn(at, "/");
        memcpy(partial, at, width);
        partial[width] = 0;
        if (mkdirat(parent, partial, 0755) < 0 && errno != EEXIST) {
            close(parent);
            return -1;
        }
        at += width + (at[width] == '/');
        char saved[4096];
        snprintf(saved, sizeof saved, "%.*s", (int)(at - sub_path), sub_path);
        close(parent);
        parent = open_beneath(root, saved);
    }
    return parent;
}

const char *volumes_take(const struct config *config, const struct container *container,
                         int trees[MOUNT_LIMIT])
{
    for (size_t i = 0; i < container->mount_count; i++) {
        const struct mount_place *place = &container->mounts[i];
        const struct volume *volume = &config->volumes[place->index];
        char path[96];
        volume_path(config, place->index, path);
        int root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        int at = root < 0 ? -1 : open_sub_path(root, place->sub_path ? place->sub_path : "");
        trees[i] = at < 0 ? -1
                          : (int)syscall(SYS_open_tree, at, "",
                                         OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
        int cause = errno;
        close(at);
        close(root);
        if (trees[i] < 0)
            return problem("volume %s: cannot use \"%s\": %s", volume->name,
                           place->sub_path ? place->sub_path : "", strerror(cause));
        if (!place->read_only && !volume->read_only && volume->kind != VOLUME_FILES)
            continue;
        struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};
        if (syscall(SYS_mount_setattr, trees[i], "", AT_EMPTY_PATH, &attributes,
                    sizeof attributes) < 0)
            return problem("volume %s cannot be made read-only: %s", volume->name, strerror(errno));
    }
    return NULL;
}

/* The place in the image: a directory, or for a single file a file. */
static bool make_place(const char *path, bool directory)
{
    char parent[4096];
    struct stat status;
    if (stat(path, &status) == 0)
        return S_ISDIR(status.st_mode) == directory;
    if (directory)
        return make_directories(path, 0755);
    if (snprintf(parent, sizeof parent, "%s", path) >= (int)sizeof parent)
        return false;
    *strrchr(parent, '/') = 0;
    if (parent[0] && !make_directories(parent, 0755))
        return false;
    int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (file >= 0)
        close(file);
    return file >= 0;
}

const char *volumes_attach(const struct container *container, const int trees[MOUNT_LIMIT])
{
    for (size_t i = 0; i < container->mount_count; i++) {
        const struct mount_place *place = &container->mounts[i];
        struct stat status;
        if (fstat(trees[i], &status) < 0 || !make_place(place->path, S_ISDIR(status.st_mode)))
            return problem("volume %s: the image has no place for it at %s", place->volume,
                           place->path);
        if (syscall(SYS_move_mount, trees[i], "", AT_FDCWD, place->path, MOVE_MOUNT_F_EMPTY_PATH) < 0)
            return problem("volume %s: cannot mount it at %s: %s", place->volume, place->path,
                           strerror(errno));
        close(trees[i]);
    }
    return NULL;
}
