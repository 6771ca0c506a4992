#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

bool terminal_make(uint16_t rows, uint16_t columns, int *near, int *far)
{
    int unlocked = 0;
    *far = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*far < 0)
        return false;
    *near = ioctl(*far, TIOCSPTLCK, &unlocked) < 0
                ? -1
                : ioctl(*far, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*near < 0) {
        int cause = errno;
        close(*far);
        errno = cause;
        return false;
    }
    terminal_resize(*far, rows, columns);
    return true;
}

void terminal_resize(int far, uint16_t rows, uint16_t columns)
{
    struct winsize size = {.ws_row = rows ? rows : 24, .ws_col = columns ? columns : 80};
    ioctl(far, TIOCSWINSZ, &size);
}

bool send_descriptor(int socket, int32_t number, int descriptor)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = &number, .iov_len = sizeof number};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (descriptor >= 0) {
        message.msg_control = control.space;
        message.msg_controllen = sizeof control.space;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL) == (ssize_t)sizeof number;
}

long receive_message(int socket, int32_t *number, int *descriptor)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = number, .iov_len = sizeof *number};
    struct msghdr message = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    *descriptor = -1;
    ssize_t got = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0)
        return got;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header;
         header = CMSG_NXTHDR(&message, header))
        if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
            memcpy(descriptor, CMSG_DATA(header), sizeof *descriptor);
    return got;
}
