/* A wire between network namespaces: it carries packets from one to another, each after a fixed time.
 *
 *     wire DELAY_NS MTU NAMESPACE...
 *
 * The program makes a device "wire0" in each namespace, writes a line once all are there, and carries packets until it is
 * ended; then the devices vanish. The namespace number i (from 0) has the address 10.77.0.(i + 1), by which a packet
 * finds its way. namespaces.py builds and starts it. It runs at the highest priority, because a real wire needs no
 * processor.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { MOST_ENDS = 16, QUEUE = 8192, DESTINATION = 16 }; /* DESTINATION: offset of the address in an IPv4 header */

struct packet {
    int64_t due_ns;
    int to, length;
    unsigned char *bytes;
};

static struct packet queue[QUEUE]; /* in order of due_ns, because all packets take equally long */
static unsigned head, tail;        /* packets tail..head are under way */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Makes the device in a namespace and returns its file. */
static int end_in(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "/var/run/netns/%s", name);
    int space = open(path, O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNET) < 0)
        fail(path);
    close(space);
    int file = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, "wire0");
    if (file < 0 || ioctl(file, TUNSETIFF, &request) < 0)
        fail("/dev/net/tun");
    return file;
}

/* Takes all packets that a namespace has sent. One for an unknown address, or beyond the queue, is lost. */
static void take(int file, int ends, int mtu, int64_t delay_ns)
{
    while (head - tail < QUEUE) {
        struct packet *slot = &queue[head % QUEUE];
        if (slot->bytes == NULL && (slot->bytes = malloc((size_t)mtu)) == NULL)
            fail("malloc");
        ssize_t length = read(file, slot->bytes, (size_t)mtu);
        if (length < 0)
            return;
        int to = length > DESTINATION + 3 && slot->bytes[0] >> 4 == 4 ? slot->bytes[DESTINATION + 3] - 1 : -1;
        if (to < 0 || to >= ends)
            continue;
        slot->due_ns = now_ns() + delay_ns;
        slot->to = to;
        slot->length = (int)length;
        head++;
    }
}

int main(int count, char **words)
{
    if (count < 4 || count > 3 + MOST_ENDS)
        return 2;
    int64_t delay_ns = atoll(words[1]);
    int mtu = atoi(words[2]), ends = count - 3;
    struct pollfd files[MOST_ENDS];
    for (int i = 0; i < ends; i++)
        files[i] = (struct pollfd){.fd = end_in(words[3 + i]), .events = POLLIN};
    setpriority(PRIO_PROCESS, 0, -20);
    prctl(PR_SET_TIMERSLACK, 1);
    prctl(PR_SET_PDEATHSIG, 9);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int64_t wait_ns = head == tail ? 1000000000 : queue[tail % QUEUE].due_ns - now_ns();
        struct timespec wait = {wait_ns > 0 ? wait_ns / 1000000000 : 0, wait_ns > 0 ? wait_ns % 1000000000 : 0};
        if (ppoll(files, (nfds_t)ends, &wait, NULL) < 0 && errno != EINTR)
            fail("ppoll");
        for (int i = 0; i < ends; i++)
            take(files[i].fd, ends, mtu, delay_ns);
        for (; head != tail && queue[tail % QUEUE].due_ns <= now_ns(); tail++) {
            struct packet *slot = &queue[tail % QUEUE];
            if (write(files[slot->to].fd, slot->bytes, (size_t)slot->length) < 0 && errno != EAGAIN && errno != ENOBUFS &&
                errno != EIO) /* EIO: the device is not up yet */
                fail("write");
        }
    }
}
