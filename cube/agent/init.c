/* cube-agent: PID 1 of a microVM. Mounts what containers need, runs them, carries their streams
 * and exit statuses to the host, and powers off. See PROTOCOL.md.
 */
#include "cgroup.h"
#include "guest.h"
#include "network.h"
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define PORT_NAME "cubecache.agent"
#define VSOCK_PORT 1024 /* where "cube.vsock" on the kernel's command line makes us listen */

static struct session session = {.channel = {.fd = -1, .listener = -1}};

static int watch_children(void)
{
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
}

static _Noreturn void fail(const char *text)
{
    console_line(text);
    if (session.channel.fd >= 0 || session.channel.listener >= 0) {
        struct buffer record = {0};
        append_text(&record, KEY_TEXT, text);
        channel_send(&session.channel, FRAME_FAILED, 0, 0, record.bytes, record.length);
        buffer_free(&record);
        uint64_t end = monotonic_ns() + 10000000000u;
        while (!session.shutdown_asked && !session.channel.host_gone && monotonic_ns() < end)
            session_turn(&session, 200);
    }
    guest_power_off();
}

static void open_channel(void)
{
    if (guest_cmdline_word("cube.vsock") == NULL) {
        if (!channel_open(&session.channel, PORT_NAME, 5000))
            fail("this machine has no virtio-serial port named " PORT_NAME);
        return;
    }
    const char *error = guest_load_modules("vsock");
    if (error == NULL && !channel_listen(&session.channel, VSOCK_PORT))
        error = problem("cannot listen on vsock port %d: %s", VSOCK_PORT, strerror(errno));
    if (error)
        fail(error);
}

static void read_configuration(void)
{
    uint8_t header[CONFIG_HEADER], *body = NULL;
    size_t length = 0;
    const char *error = guest_read_config(header, &body, &length);
    if (error == NULL)
        error = config_parse(header, body, length, &session.config);
    if (error)
        fail(error);
    free(body);
    if (session.config.has_sync_key)
        session.channel.sync_key = session.config.sync_key;
}

static void set_up_machine(void)
{
    const struct config *config = &session.config;
    const char *error = NULL;
    for (size_t i = 0; error == NULL && i < config->module_set_count; i++)
        error = guest_load_modules(config->module_sets[i]);
    if (config->clock_ns && !session.host_said_hello)
        guest_set_clock(config->clock_ns + monotonic_ns());
    if (config->hostname && sethostname(config->hostname, strlen(config->hostname)) < 0)
        session_log(&session, "the host name was not accepted");
    guest_loopback_up();
    cgroup_mount();
    for (size_t i = 0; error == NULL && i < config->interface_count; i++)
        error = network_set_up(&config->interfaces[i]);
    if (error)
        fail(error);
}

static void start_containers(void)
{
    channel_write(&session.channel);
    for (size_t i = 0; i < session.config.container_count; i++) {
        if (session.config.containers[i].held)
            continue;
        /* The host's answer to our greeting carries the time: it has come by now, or soon. */
        for (int rounds = 0; !session.host_said_hello && !session.channel.host_gone && rounds < 50;
             rounds++)
            session_turn(&session, 10);
        const char *error = session_start(&session, i);
        if (error)
            fail(error);
    }
}

int main(void)
{
    session.started = monotonic_ns();
    guest_mount_base();
    for (int fd = open("/dev/null", O_RDWR); fd >= 0 && fd < 2; fd = open("/dev/null", O_RDWR))
        continue; /* 0, 1 and 2 must be taken, or a pipe would land there */
    if (guest_cmdline_word("cube.probe")) {
        console_line("probe-ok");
        guest_power_off();
    }
    session.children = watch_children();
    const char *error = guest_load_boot_modules();
    uint64_t loaded = monotonic_ns();
    if (error == NULL)
        error = guest_leave_initramfs();
    if (error)
        fail(error);
    open_channel();
    session_hello(&session);
    channel_event(&session.channel, 0, "modules-loaded", loaded);
    read_configuration();
    set_up_machine();
    start_containers();
    while (!session.shutdown_asked && !session.channel.host_gone)
        session_turn(&session, -1);
    session_end(&session);
    guest_power_off();
}
