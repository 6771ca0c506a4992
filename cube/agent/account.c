#include "account.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define FIELDS 7

struct text {
    const char *at;
    size_t length;
};

/* Cuts the next line off `rest` and splits it at colons; the last field keeps what follows. */
static bool next_line(struct text *rest, struct text fields[FIELDS])
{
    if (rest->length == 0)
        return false;
    const char *end = memchr(rest->at, '\n', rest->length);
    size_t length = end ? (size_t)(end - rest->at) : rest->length;
    struct text line = {rest->at, length};
    size_t taken = length + (end != NULL);
    rest->at += taken;
    rest->length -= taken;
    for (int i = 0; i < FIELDS; i++) {
        const char *colon = line.length ? memchr(line.at, ':', line.length) : NULL;
        size_t width = colon && i < FIELDS - 1 ? (size_t)(colon - line.at) : line.length;
        fields[i] = (struct text){line.at, width};
        size_t step = width + (colon != NULL && i < FIELDS - 1);
        line.at += step;
        line.length -= step;
    }
    return true;
}

static bool equals(struct text text, const char *with)
{
    return text.length == strlen(with) && memcmp(text.at, with, text.length) == 0;
}

/* Ids are 0 to 2^32-2: the highest value means "none" to the kernel. */
static bool number_of(struct text text, uint32_t *number)
{
    if (text.length == 0 || text.length > 10)
        return false;
    uint64_t value = 0;
    for (size_t i = 0; i < text.length; i++) {
        if (text.at[i] < '0' || text.at[i] > '9')
            return false;
        value = value * 10 + (uint64_t)(text.at[i] - '0');
    }
    if (value >= UINT32_MAX)
        return false;
    *number = (uint32_t)value;
    return true;
}

static bool member_of(struct text members, const char *name)
{
    while (members.length > 0) {
        const char *comma = memchr(members.at, ',', members.length);
        size_t width = comma ? (size_t)(comma - members.at) : members.length;
        if (equals((struct text){members.at, width}, name))
            return true;
        size_t step = width + (comma != NULL);
        members.at += step;
        members.length -= step;
    }
    return false;
}

static void add_group(struct account *account, gid_t gid)
{
    for (size_t i = 0; i < account->group_count; i++)
        if (account->groups[i] == gid)
            return;
    if (account->group_count < GROUP_LIMIT)
        account->groups[account->group_count++] = gid;
}

const char *account_resolve(const char *wanted, const char *passwd, size_t passwd_length,
                            const char *group, size_t group_length, struct account *account)
{
    static char problem[320];
    char user[256], group_name[256] = "", matched[256] = "";
    *account = (struct account){.home = "/"};
    const char *colon = strchr(wanted, ':');
    size_t user_length = colon ? (size_t)(colon - wanted) : strlen(wanted);
    if (user_length >= sizeof user || (colon && strlen(colon + 1) >= sizeof group_name))
        return "the user's name is too long";
    memcpy(user, wanted, user_length);
    user[user_length] = 0;
    if (colon)
        strcpy(group_name, colon + 1);
    if (user[0] == 0)
        strcpy(user, "0");

    uint32_t uid = 0, gid = 0, found_uid, found_gid;
    bool numeric = number_of((struct text){user, strlen(user)}, &uid);
    bool found = false;
    struct text rest = {passwd, passwd_length}, fields[FIELDS];
    while (!found && next_line(&rest, fields)) {
        if (!number_of(fields[2], &found_uid) || !number_of(fields[3], &found_gid))
            continue;
        found = numeric ? found_uid == uid : equals(fields[0], user);
        if (!found)
            continue;
        account->uid = found_uid;
        account->gid = found_gid;
        if (fields[0].length < sizeof matched) {
            memcpy(matched, fields[0].at, fields[0].length);
            matched[fields[0].length] = 0;
        }
        if (fields[5].length > 0 && fields[5].length < sizeof account->home) {
            memcpy(account->home, fields[5].at, fields[5].length);
            account->home[fields[5].length] = 0;
        }
    }
    if (!found && !numeric) {
        snprintf(problem, sizeof problem, "the image's /etc/passwd has no user \"%s\"", user);
        return problem;
    }
    if (!found)
        account->uid = uid;

    bool explicit_group = group_name[0] != 0;
    bool numeric_group = number_of((struct text){group_name, strlen(group_name)}, &gid);
    bool group_found = numeric_group;
    if (numeric_group)
        account->gid = gid;
    gid_t members[GROUP_LIMIT];
    size_t member_count = 0;
    rest = (struct text){group, group_length};
    while (next_line(&rest, fields)) {
        if (!number_of(fields[2], &found_gid))
            continue;
        if (explicit_group && !group_found && equals(fields[0], group_name)) {
            account->gid = found_gid;
            group_found = true;
        }
        /* Group lines have four fields; the splitter leaves the members in the fourth. */
        if (!explicit_group && matched[0] && member_count < GROUP_LIMIT &&
            member_of(fields[3], matched))
            members[member_count++] = found_gid;
    }
    if (explicit_group && !group_found) {
        snprintf(problem, sizeof problem, "the image's /etc/group has no group \"%s\"", group_name);
        return problem;
    }
    add_group(account, account->gid);
    for (size_t i = 0; i < member_count; i++)
        add_group(account, members[i]);
    return NULL;
}
