/* The limit: bytes of a file pushed through a unix socket by the smallest loop that keeps a number
 * of requests in flight. No protocol is checked and nothing is looked up: a request is 28 bytes, a
 * reply 16 and a block of the mapped file. What a server reaches of this is its share.
 *
 *   pushlimit FILE OFFSET LENGTH BLOCK DEPTH CONNECTIONS SECONDS random|sequential
 *
 * Prints replies per second, of all connections together.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST = 28, HEAD = 16, PARTS = 1024, BATCH_BYTES = 1 << 20 };

static const char *bytes;
static uint64_t length, block;
static int sequential;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

/* Sends the parts whole; returns 0 when the other side has gone. */
static int push(int fd, struct iovec *parts, int count)
{
    while (count > 0) {
        ssize_t sent = writev(fd, parts, count);
        if (sent < 0)
            return 0;
        while (count > 0 && (size_t)sent >= parts->iov_len) {
            sent -= parts->iov_len;
            parts++;
            count--;
        }
        if (count > 0) {
            parts->iov_base = (char *)parts->iov_base + sent;
            parts->iov_len -= sent;
        }
    }
    return 1;
}

static void serve(int fd)
{
    static char requests[REQUEST * (PARTS / 2)], head[HEAD];
    static struct iovec parts[PARTS];
    uint64_t state = 88172645463325252u, at = 0, blocks = length / block;
    size_t held = 0;
    for (;;) {
        ssize_t got = read(fd, requests + held, sizeof requests - held);
        if (got <= 0)
            exit(0);
        held += got;
        int count = 0;
        uint64_t gathered = 0;
        size_t answered = 0;
        for (; held - answered >= REQUEST; answered += REQUEST) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            at = sequential ? at + 1 : state;
            parts[count++] = (struct iovec){head, HEAD};
            parts[count++] = (struct iovec){(char *)bytes + at % blocks * block, block};
            gathered += HEAD + block;
            if (gathered >= BATCH_BYTES) {
                if (!push(fd, parts, count))
                    exit(0);
                count = 0;
                gathered = 0;
            }
        }
        memmove(requests, requests + answered, held - answered);
        held -= answered;
        if (count && !push(fd, parts, count))
            exit(0);
    }
}

/* Asks, keeping `depth` requests in flight; the number of replies received in the time. */
static uint64_t ask(int fd, int depth, double seconds)
{
    static char requests[REQUEST * 1024];
    size_t room = block + HEAD > 256 << 10 ? block + HEAD : 256 << 10;
    char *buffer = malloc(room);
    uint64_t replies = 0, part = 0;
    double end = now() + seconds;
    if (buffer == NULL || write(fd, requests, REQUEST * depth) != REQUEST * depth)
        die("ask");
    while (now() < end) {
        ssize_t got = read(fd, buffer, room);
        if (got <= 0)
            die("read");
        part += got;
        uint64_t whole = part / (block + HEAD);
        part %= block + HEAD;
        replies += whole;
        if (whole && write(fd, requests, REQUEST * whole) < 0)
            die("write");
    }
    return replies;
}

int main(int count, char **words)
{
    if (count != 9)
        return 2;
    int file = open(words[1], O_RDONLY), connections = atoi(words[6]), results[2];
    off_t offset = atoll(words[2]);
    double seconds = atof(words[7]);
    length = strtoull(words[3], NULL, 10);
    block = strtoull(words[4], NULL, 10);
    sequential = strcmp(words[8], "sequential") == 0;
    bytes = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_POPULATE, file, offset);
    if (bytes == MAP_FAILED || pipe(results) < 0)
        die(words[1]);
    for (int number = 0; number < connections; number++) {
        int ends[2], size = BATCH_BYTES;
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0)
            die("socketpair");
        setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        if (fork() == 0) {
            close(ends[1]);
            serve(ends[0]);
        }
        close(ends[0]);
        if (fork() == 0) {
            uint64_t replies = ask(ends[1], atoi(words[5]), seconds);
            if (write(results[1], &replies, sizeof replies) != sizeof replies)
                die("results");
            exit(0);
        }
        close(ends[1]);
    }
    uint64_t total = 0, one;
    close(results[1]);
    while (read(results[0], &one, sizeof one) == sizeof one)
        total += one;
    while (wait(NULL) > 0) {
    }
    printf("%.0f\n", total / seconds);
    return 0;
}
