/* Test driver of the parsers: "config FILE...", "request FILE...", "account USER PASSWD GROUP",
 * "channel KEY FILE..." and "listen PATH HOSTS". Prints one line
 * per answer; exits 0 unless a sanitizer ends it.
 */
#include "account.h"
#include "channel.h"
#include "config.h"
#include "request.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static uint8_t *read_file(const char *path, size_t *length)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(1);
    }
    struct buffer bytes = {0};
    uint8_t chunk[65536];
    size_t got;
    while ((got = fread(chunk, 1, sizeof chunk, file)) > 0)
        buffer_append(&bytes, chunk, got);
    fclose(file);
    /* An allocation of exactly this size lets the sanitizer see the first byte too many. */
    uint8_t *exact = must_allocate(bytes.length);
    if (bytes.length)
        memcpy(exact, bytes.bytes, bytes.length);
    *length = bytes.length;
    buffer_free(&bytes);
    return exact;
}

static void print_config(const struct config *config)
{
    printf("ok hostname=%s containers=%zu", config->hostname ? config->hostname : "-",
           config->container_count);
    for (size_t i = 0; i < config->module_set_count; i++)
        printf(" modules=%s", config->module_sets[i]);
    for (size_t i = 0; i < config->container_count; i++)
        printf(" [%u %s %s args=%zu env=%zu first=%s]", config->containers[i].id,
               config->containers[i].root_disk, config->containers[i].root_fs,
               config->containers[i].argument_count, config->containers[i].environment_count,
               config->containers[i].arguments[0]);
    for (size_t i = 0; i < config->volume_count; i++)
        printf(" volume=%s/%d/%zu", config->volumes[i].name, (int)config->volumes[i].kind,
               config->volumes[i].file_count);
    for (size_t i = 0; i < config->interface_count; i++)
        printf(" interface=%s/%zu", config->interfaces[i].name, config->interfaces[i].address_count);
    for (size_t i = 0; i < config->container_count; i++)
        for (size_t j = 0; j < config->containers[i].mount_count; j++)
            printf(" mount=%zu:%s", config->containers[i].mounts[j].index,
                   config->containers[i].mounts[j].path);
    putchar('\n');
}

static void check_request(const char *path)
{
    size_t length;
    uint8_t *record = read_file(path, &length);
    struct request request;
    const char *error = request_parse(record, length, &request);
    if (error)
        printf("error %s\n", error);
    else
        printf("ok container=%u args=%zu env=%zu port=%u size=%ux%u tty=%d\n", request.container,
               request.argument_count, request.environment_count, request.port, request.rows,
               request.columns, request.tty);
    request_free(&request);
    free(record);
}

static void check_config(const char *path)
{
    size_t length;
    uint8_t *disk = read_file(path, &length);
    struct config config = {0};
    const char *error = NULL;
    if (length < CONFIG_HEADER) {
        puts("error too short for a header");
    } else {
        size_t body = config_body_length(disk, &error);
        if (error == NULL && body > length - CONFIG_HEADER)
            error = "shorter than its header says";
        if (error == NULL)
            error = config_parse(disk, disk + CONFIG_HEADER, body, &config);
        if (error)
            printf("error %s\n", error);
        else
            print_config(&config);
        config_free(&config);
    }
    free(disk);
}

static void check_account(char **paths)
{
    size_t passwd_length, group_length;
    char *passwd = (char *)read_file(paths[1], &passwd_length);
    char *group = (char *)read_file(paths[2], &group_length);
    struct account account;
    const char *error =
        account_resolve(paths[0], passwd, passwd_length, group, group_length, &account);
    if (error)
        printf("error %s\n", error);
    else {
        printf("ok uid=%u gid=%u home=%s groups=", account.uid, account.gid, account.home);
        for (size_t i = 0; i < account.group_count; i++)
            printf("%s%u", i ? "," : "", account.groups[i]);
        putchar('\n');
    }
    free(passwd);
    free(group);
}

/* What the agent makes of a host's bytes. */
static void check_channel(const char *key, const char *path)
{
    static struct channel channel;
    channel = (struct channel){.fd = open(path, O_RDONLY), .listener = -1};
    if (strlen(key) == SYNC_KEY_BYTES)
        channel.sync_key = (const uint8_t *)key;
    struct frame frame;
    bool more = true;
    printf("ok");
    while (more && !channel.host_gone)
        if (channel_read(&channel, &frame, &more)) {
            unsigned sum = 0;
            for (size_t i = 0; i < frame.length; i++)
                sum += frame.payload[i];
            printf(" %u/%u/%u/%zu/%u", frame.type, frame.stream, frame.process, frame.length, sum);
        }
    printf(channel.host_gone ? " gone\n" : "\n");
    close(channel.fd);
}

/* Takes so many hosts, one after the other, and sends every frame back. */
static int serve_hosts(const char *path, int hosts)
{
    static struct channel channel;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    channel = (struct channel){.fd = -1};
    channel.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(channel.listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(channel.listener, 4) < 0)
        return 1;
    channel_send(&channel, FRAME_HELLO, 0, 0, "first", 5);
    for (int seen = 0; seen < hosts || channel.fd >= 0;) {
        struct pollfd wanted[] = {{.fd = channel.listener, .events = POLLIN},
                                  {.fd = channel.fd, .events = POLLIN}};
        if (poll(wanted, 2, 60000) <= 0)
            return 1;
        if (channel_accept(&channel))
            channel_send(&channel, FRAME_HELLO, 0, 0, "again", 5);
        seen += wanted[0].revents != 0;
        struct frame frame;
        bool more = true;
        while (more && !channel.host_gone)
            if (channel_read(&channel, &frame, &more))
                channel_send(&channel, frame.type, frame.stream, frame.process, frame.payload,
                             frame.length);
        channel_write(&channel);
    }
    close(channel.listener);
    buffer_free(&channel.out);
    return 0;
}

int main(int count, char **words)
{
    if (count >= 3 && strcmp(words[1], "config") == 0)
        for (int i = 2; i < count; i++)
            check_config(words[i]);
    else if (count >= 3 && strcmp(words[1], "request") == 0)
        for (int i = 2; i < count; i++)
            check_request(words[i]);
    else if (count >= 4 && strcmp(words[1], "channel") == 0)
        for (int i = 3; i < count; i++)
            check_channel(words[2], words[i]);
    else if (count == 4 && strcmp(words[1], "listen") == 0)
        return serve_hosts(words[2], atoi(words[3]));
    else if (count == 5 && strcmp(words[1], "account") == 0)
        check_account(words + 2);
    else {
        fputs("usage: check-parsers config|request FILE... | account USER PASSWD GROUP |\n"
              "       channel KEY FILE... | listen PATH HOSTS\n",
              stderr);
        return 2;
    }
    return 0;
}
