#include "network.h"

#include "channel.h"
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define INTERFACE_WAIT_NS 5000000000u

struct message {
    struct nlmsghdr header;
    char space[512];
};

static void add_attribute(struct message *message, unsigned short type, const void *value,
                          size_t length)
{
    size_t at = NLMSG_ALIGN(message->header.nlmsg_len);
    struct rtattr *attribute = (struct rtattr *)((char *)message + at);
    attribute->rta_type = type;
    attribute->rta_len = (unsigned short)RTA_LENGTH(length);
    memcpy(RTA_DATA(attribute), value, length);
    message->header.nlmsg_len = (uint32_t)(at + RTA_SPACE(length));
}

/* Sends one request and waits for the kernel's word about it. False: errno. */
static bool ask(struct message *message)
{
    int handle = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (handle < 0)
        return false;
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        char rest[1024];
    } answer;
    message->header.nlmsg_flags |= NLM_F_REQUEST | NLM_F_ACK;
    bool done = send(handle, message, message->header.nlmsg_len, 0) >= 0 &&
                recv(handle, &answer, sizeof answer, 0) >= (ssize_t)sizeof answer.header;
    if (done && answer.header.nlmsg_type == NLMSG_ERROR && answer.error.error != 0) {
        errno = -answer.error.error;
        done = errno == EEXIST;
    }
    int cause = errno;
    close(handle);
    errno = cause;
    return done;
}

static bool set_link(int index, const char *name, uint32_t mtu, bool up)
{
    struct message message = {
        .header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct ifinfomsg)), .nlmsg_type = RTM_NEWLINK},
    };
    struct ifinfomsg *link = NLMSG_DATA(&message.header);
    link->ifi_index = index;
    link->ifi_flags = up ? IFF_UP : 0;
    link->ifi_change = up ? IFF_UP : 0;
    if (name)
        add_attribute(&message, IFLA_IFNAME, name, strlen(name) + 1);
    if (mtu)
        add_attribute(&message, IFLA_MTU, &mtu, sizeof mtu);
    return ask(&message);
}

/* ADDRESS[/PREFIX]; without a prefix the whole address. */
static bool parse_address(const char *text, uint8_t address[16], int *family, unsigned *prefix)
{
    char plain[64];
    size_t length = strcspn(text, "/");
    if (length >= sizeof plain)
        return false;
    memcpy(plain, text, length);
    plain[length] = 0;
    *family = strchr(plain, ':') ? AF_INET6 : AF_INET;
    unsigned most = *family == AF_INET6 ? 128 : 32;
    char *end = NULL;
    *prefix = text[length] ? (unsigned)strtoul(text + length + 1, &end, 10) : most;
    return inet_pton(*family, plain, address) == 1 && *prefix <= most && (end == NULL || *end == 0);
}

static bool add_address(int index, const char *text)
{
    uint8_t address[16];
    int family;
    unsigned prefix;
    if (!parse_address(text, address, &family, &prefix)) {
        errno = EINVAL;
        return false;
    }
    struct message message = {
        .header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct ifaddrmsg)),
                   .nlmsg_type = RTM_NEWADDR,
                   .nlmsg_flags = NLM_F_CREATE},
    };
    struct ifaddrmsg *part = NLMSG_DATA(&message.header);
    part->ifa_family = (uint8_t)family;
    part->ifa_prefixlen = (uint8_t)prefix;
    part->ifa_index = (uint32_t)index;
    part->ifa_flags = family == AF_INET6 ? IFA_F_NODAD : 0; /* nobody else has it, and it is quick */
    size_t width = family == AF_INET6 ? 16 : 4;
    add_attribute(&message, IFA_LOCAL, address, width);
    add_attribute(&message, IFA_ADDRESS, address, width);
    return ask(&message);
}

static bool add_default_route(int index, const char *gateway)
{
    uint8_t address[16];
    int family;
    unsigned prefix;
    if (!parse_address(gateway, address, &family, &prefix)) {
        errno = EINVAL;
        return false;
    }
    struct message message = {
        .header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct rtmsg)),
                   .nlmsg_type = RTM_NEWROUTE,
                   .nlmsg_flags = NLM_F_CREATE | NLM_F_REPLACE},
    };
    struct rtmsg *route = NLMSG_DATA(&message.header);
    route->rtm_family = (uint8_t)family;
    route->rtm_table = RT_TABLE_MAIN;
    route->rtm_protocol = RTPROT_STATIC;
    route->rtm_scope = RT_SCOPE_UNIVERSE;
    route->rtm_type = RTN_UNICAST;
    route->rtm_flags = RTNH_F_ONLINK; /* the gateway may be outside a /32 */
    add_attribute(&message, RTA_GATEWAY, address, family == AF_INET6 ? 16 : 4);
    add_attribute(&message, RTA_OIF, &index, sizeof index);
    return ask(&message);
}

static bool has_address(const char *name, const char *mac)
{
    char path[320], text[64];
    snprintf(path, sizeof path, "/sys/class/net/%s/address", name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (file >= 0)
        close(file);
    if (got <= 0)
        return false;
    text[got] = 0;
    text[strcspn(text, "\n")] = 0;
    return strcasecmp(text, mac) == 0;
}

static int find_interface(const char *mac)
{
    DIR *all = opendir("/sys/class/net");
    if (all == NULL)
        return 0;
    int index = 0;
    struct dirent *entry;
    while (index == 0 && (entry = readdir(all)) != NULL)
        if (entry->d_name[0] != '.' && has_address(entry->d_name, mac))
            index = (int)if_nametoindex(entry->d_name);
    closedir(all);
    return index;
}

const char *network_set_up(const struct interface *interface)
{
    uint64_t end = monotonic_ns() + INTERFACE_WAIT_NS;
    int index;
    while ((index = find_interface(interface->mac)) == 0 && monotonic_ns() < end)
        usleep(2000);
    if (index == 0)
        return problem("this machine has no network interface with the address %s", interface->mac);
    if (strlen(interface->name) == 0 || strlen(interface->name) >= IF_NAMESIZE)
        return problem("\"%s\" cannot name an interface", interface->name);
    if (!set_link(index, interface->name, interface->mtu, false) || !set_link(index, NULL, 0, true))
        return problem("interface %s cannot be set up: %s", interface->name, strerror(errno));
    for (size_t i = 0; i < interface->address_count; i++)
        if (!add_address(index, interface->addresses[i]))
            return problem("interface %s cannot have the address %s: %s", interface->name,
                           interface->addresses[i], strerror(errno));
    const char *const gateways[] = {interface->gateway, interface->gateway6};
    for (size_t i = 0; i < 2; i++)
        if (gateways[i] && gateways[i][0] && !add_default_route(index, gateways[i]))
            return problem("interface %s cannot have the gateway %s: %s", interface->name,
                           gateways[i], strerror(errno));
    return NULL;
}

void network_traffic(uint64_t *received, uint64_t *sent)
{
    char line[512], name[32];
    unsigned long long in, out;
    *received = *sent = 0;
    FILE *table = fopen("/proc/net/dev", "re");
    if (table == NULL)
        return;
    while (fgets(line, sizeof line, table))
        if (sscanf(line, " %31[^:]: %llu %*u %*u %*u %*u %*u %*u %*u %llu", name, &in, &out) == 3 &&
            strcmp(name, "lo") != 0) {
            *received += in;
            *sent += out;
        }
    fclose(table);
}
