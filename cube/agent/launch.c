#include "launch.h"

#include "account.h"
#include "cgroup.h"
#include "guest.h"
#include "root.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define OWN_BUSYBOX "cube:busybox" /* the agent's, for images that lack the tool */
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define ORDER_GROUP 1
#define ACCOUNT_FILE_LIMIT (4u << 20)

static _Noreturn void give_up(const struct launch *launch, int code, const char *text)
{
    struct start_failure failure = {.code = code};
    snprintf(failure.text, sizeof failure.text, "%s", text);
    if (write(launch->failure, &failure, sizeof failure) < 0)
        console_line(failure.text);
    _exit(code);
}

static size_t read_account_file(const char *path, char **text)
{
    *text = NULL;
    /* O_NONBLOCK: an image may hold a fifo by that name. */
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat status;
    if (file < 0)
        return 0;
    if (fstat(file, &status) < 0 || !S_ISREG(status.st_mode) || status.st_size <= 0 ||
        status.st_size > (off_t)ACCOUNT_FILE_LIMIT) {
        close(file);
        return 0;
    }
    *text = must_allocate((size_t)status.st_size);
    size_t length = 0;
    ssize_t got;
    while (length < (size_t)status.st_size &&
           (got = read(file, *text + length, (size_t)status.st_size - length)) > 0)
        length += (size_t)got;
    close(file);
    return length;
}

static const char *resolve_account(const char *wanted, struct account *account)
{
    char *passwd, *group;
    size_t passwd_length = read_account_file("/etc/passwd", &passwd);
    size_t group_length = read_account_file("/etc/group", &group);
    const char *error = account_resolve(wanted ? wanted : "", passwd, passwd_length, group,
                                        group_length, account);
    free(passwd);
    free(group);
    return error;
}

/* Root keeps only what the configuration grants; others lose all by changing their uid. */
static const char *drop_privileges(const struct container *container,
                                   const struct account *account)
{
    uint64_t keep = container->capabilities;
    for (unsigned number = 0; number < 64; number++)
        if (!(keep >> number & 1) && prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0 && errno == EINVAL)
            break; /* past the kernel's last capability */
    if (container->no_new_privileges && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return problem("cannot give up new privileges: %s", strerror(errno));
    if (setgroups(account->group_count, account->groups) < 0 || setgid(account->gid) < 0 ||
        setuid(account->uid) < 0)
        return problem("cannot become user %u: %s", account->uid, strerror(errno));
    if (account->uid != 0)
        return NULL;
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2], had[2];
    if (syscall(SYS_capget, &header, had) < 0)
        return problem("cannot read the capabilities: %s", strerror(errno));
    for (int i = 0; i < 2; i++) {
        uint32_t bits = (uint32_t)(keep >> (32 * i)) & had[i].permitted;
        sets[i] = (struct __user_cap_data_struct){.effective = bits, .permitted = bits};
    }
    if (syscall(SYS_capset, &header, sets) < 0)
        return problem("cannot drop capabilities: %s", strerror(errno));
    return NULL;
}

static const char *variable(char *const *environment, const char *name)
{
    const char *value = NULL;
    size_t length = strlen(name);
    for (; *environment; environment++)
        if (strncmp(*environment, name, length) == 0 && (*environment)[length] == '=')
            value = *environment + length + 1;
    return value;
}

static void add_variable(char **environment, size_t *count, const char *name, const char *value)
{
    if (variable(environment, name))
        return;
    size_t size = strlen(name) + strlen(value) + 2;
    environment[*count] = must_allocate(size);
    snprintf(environment[(*count)++], size, "%s=%s", name, value);
}

/* HOME comes from the image's account when neither image nor caller sets it. An exec's
 * variables replace its container's of the same name.
 */
static char **complete_environment(const struct launch *launch, const struct account *account)
{
    const struct program *program = &launch->program;
    char **complete = must_allocate((program->environment_count + 3) * sizeof(char *));
    size_t count = 0;
    for (size_t i = 0; i < program->environment_count; i++) {
        size_t length = strcspn(program->environment[i], "=") + 1, at = launch->joined < 0 ? count : 0;
        while (at < count && strncmp(complete[at], program->environment[i], length) != 0)
            at++;
        complete[at] = program->environment[i];
        count += at == count;
    }
    add_variable(complete, &count, "HOME", account->home);
    if (program->tty)
        add_variable(complete, &count, "TERM", "xterm");
    return complete;
}

static _Noreturn void exec_or_give_up(const struct launch *launch, const char *path, char **argv,
                                      char **environment)
{
    struct stat status;
    execve(path, argv, environment);
    int cause = errno;
    if (cause == ENOENT && stat(path, &status) == 0)
        give_up(launch, NOT_FOUND,
                problem("cannot run \"%s\": its interpreter or loader is not in the image", path));
    if (cause == ENOENT || cause == ENOTDIR)
        give_up(launch, NOT_FOUND, problem("cannot run \"%s\": no such file in the image", path));
    if (cause == ENOEXEC)
        give_up(launch, CANNOT_RUN,
                problem("cannot run \"%s\": not a program for this machine", path));
    if (cause == EACCES && stat(path, &status) == 0 && S_ISDIR(status.st_mode))
        give_up(launch, CANNOT_RUN, problem("cannot run \"%s\": it is a directory", path));
    give_up(launch, CANNOT_RUN, problem("cannot run \"%s\": %s", path, strerror(cause)));
}

static _Noreturn void run_program(const struct launch *launch, const struct account *account)
{
    char **argv = launch->program.arguments;
    char **environment = complete_environment(launch, account);
    if (strcmp(argv[0], OWN_BUSYBOX) == 0) {
        argv[0] = (char[]){"busybox"};
        syscall(SYS_execveat, guest_busybox(), "", argv, environment, AT_EMPTY_PATH);
        give_up(launch, NOT_FOUND, "this machine's agent has no busybox");
    }
    if (strchr(argv[0], '/'))
        exec_or_give_up(launch, argv[0], argv, environment);
    const char *search = variable(environment, "PATH");
    if (search == NULL)
        search = DEFAULT_PATH;
    char candidate[4096], refused[4096] = "";
    for (const char *at = search;; at++) {
        size_t length = strcspn(at, ":");
        struct stat status;
        int printed = length ? snprintf(candidate, sizeof candidate, "%.*s/%s", (int)length, at, argv[0])
                             : snprintf(candidate, sizeof candidate, "./%s", argv[0]);
        if (printed > 0 && (size_t)printed < sizeof candidate && stat(candidate, &status) == 0 &&
            S_ISREG(status.st_mode)) {
            if (access(candidate, X_OK) == 0)
                exec_or_give_up(launch, candidate, argv, environment);
            strcpy(refused, candidate);
        }
        at += length;
        if (*at == 0)
            break;
    }
    if (refused[0])
        give_up(launch, CANNOT_RUN, problem("cannot run \"%s\": not executable", refused));
    give_up(launch, NOT_FOUND, problem("cannot run \"%s\": not found in PATH (%s)", argv[0], search));
}

static void restore_defaults(void)
{
    sigset_t none;
    struct sigaction plain = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++)
        sigaction(number, &plain, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    struct rlimit files = {.rlim_cur = 1024, .rlim_max = 524288};
    setrlimit(RLIMIT_NOFILE, &files);
}

/* PID 1 of the container: passes signals on, reaps, and ends with its program's status. Its own
 * end takes everything left in the namespace with it.
 */
static _Noreturn void supervise(const struct launch *launch, pid_t program)
{
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int children = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    for (;;) {
        struct pollfd wanted[2] = {{.fd = children, .events = POLLIN},
                                   {.fd = launch->control, .events = POLLIN}};
        int status;
        pid_t ended;
        while ((ended = waitpid(-1, &status, WNOHANG)) > 0)
            if (ended == program) {
                int32_t message = status;
                if (write(launch->control, &message, sizeof message) < 0)
                    _exit(START_FAILED);
                _exit(0);
            }
        poll(wanted, 2, -1);
        struct signalfd_siginfo drained;
        while (read(children, &drained, sizeof drained) > 0)
            continue;
        int32_t order[2];
        if (wanted[1].revents &&
            recv(launch->control, order, sizeof order, MSG_DONTWAIT) == (ssize_t)sizeof order)
            if (order[1] != ORDER_GROUP || kill(-program, order[0]) < 0)
                kill(program, order[0]); /* alone, or its session is not made yet */
    }
}

/* The namespaces of a running container. The caller stays in its own PID namespace: its next child
 * is the one that is inside.
 */
static const char *join_container(const struct launch *launch)
{
    if (setns(launch->joined, CLONE_NEWNS | CLONE_NEWPID) < 0)
        return problem("the container is not running: %s", strerror(errno));
    umask(022);
    return NULL;
}

static const char *add_groups(const struct container *container, struct account *account)
{
    for (size_t i = 0; i < container->group_count; i++) {
        if (account->group_count == GROUP_LIMIT)
            return "the user has too many groups";
        account->groups[account->group_count++] = container->groups[i];
    }
    return NULL;
}

static const char *enter_directory(const char *directory)
{
    if (directory == NULL || directory[0] == 0)
        directory = "/";
    if (directory[0] != '/')
        return problem("the working directory \"%s\" is not absolute", directory);
    if (!make_directories(directory, 0755) || chdir(directory) < 0)
        return problem("cannot enter the working directory \"%s\": %s", directory,
                       errno == EEXIST ? "not a directory" : strerror(errno));
    return NULL;
}

static void set_up_streams(struct launch *launch, const struct account *account)
{
    const struct program *program = &launch->program;
    if (program->tty) {
        int near, far;
        if (!terminal_make(program->rows, program->columns, &near, &far) ||
            fchown(near, account->uid, (gid_t)-1) < 0 || !send_descriptor(launch->control, 0, far))
            give_up(launch, START_FAILED, problem("cannot make a terminal: %s", strerror(errno)));
        close(far);
        for (int i = 0; i < 3; i++)
            launch->standard[i] = near;
    }
    for (int i = 0; i < 3; i++) {
        /* The program must be able to reopen /dev/stdout, which leads to these pipes. */
        if (!program->tty && (i > 0 || program->wants_stdin))
            if (fchown(launch->standard[i], account->uid, account->gid) < 0)
                give_up(launch, START_FAILED, problem("cannot hand over a pipe: %s", strerror(errno)));
        if (dup2(launch->standard[i], i) < 0)
            give_up(launch, START_FAILED, problem("cannot set up a stream: %s", strerror(errno)));
    }
}

_Noreturn void launch_container(struct launch *launch, bool supervised)
{
    const struct container *container = launch->container;
    static struct account account;
    bool joins = launch->joined >= 0;
    int group = cgroup_open(container->id);
    if (!joins) {
        cgroup_enter(group);
        unshare(CLONE_NEWCGROUP); /* its /sys/fs/cgroup is its own; old kernels have none */
    }
    const char *error = joins ? join_container(launch) : root_enter(container, launch->config);
    if (error == NULL)
        error = resolve_account(launch->program.user, &account);
    if (error == NULL)
        error = add_groups(container, &account);
    if (error == NULL)
        error = enter_directory(launch->program.directory);
    if (error == NULL && !joins && container->read_only_root)
        error = root_seal();
    if (error)
        give_up(launch, START_FAILED, error);
    set_up_streams(launch, &account);
    if (supervised) {
        pid_t program = fork();
        if (program < 0)
            give_up(launch, START_FAILED, problem("cannot fork: %s", strerror(errno)));
        if (program > 0) {
            /* Our copies would keep the program's streams open after its end. */
            close(launch->failure);
            for (int i = 0; i < 3; i++) {
                close(i);
                close(launch->standard[i]);
            }
            supervise(launch, program);
        }
        if (joins)
            cgroup_enter(group);
    }
    close(group);
    setsid();
    if (launch->program.tty)
        ioctl(0, TIOCSCTTY, 0);
    restore_defaults();
    error = drop_privileges(container, &account);
    if (error)
        give_up(launch, START_FAILED, error);
    run_program(launch, &account);
}
