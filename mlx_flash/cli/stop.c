// Ends the process some seconds after a stop signal, even if its threads hang.
//
// Python runs its signal handlers in the main thread, between two instructions. They do not run while that thread waits
// in C, for a disk or a full pipe. They do not run either while any thread keeps the interpreter's lock, as a
// tokenizer's regular expression may for ever. This file needs neither. Python's own C handler writes the number of
// every signal into a pipe (signal.set_wakeup_fd). A thread here reads it, waits, and calls _exit. stopping.py is the
// only caller.

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SIGNALS 128
#define SETTINGS 0    // a byte that is not a signal's number: read the settings again
#define NOT_A_STOP -1  // an exit code

static struct {
    int told;  // the pipe's reading end
    int64_t grace_ms;
    char message[512];
    atomic_int codes[SIGNALS];  // exit code by signal
    atomic_int patience;        // how many SIGINTs do not count as a stop
    atomic_int renewed;         // 1: forget the SIGINTs so far
    atomic_int ended;           // the command's own exit code once it has ended, else NOT_A_STOP
    double lifeline_s;
} stop = {.ended = NOT_A_STOP};

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void end(int code) {
    struct pollfd error = {2, POLLOUT, 0};
    // A full pipe must not block here.
    if (poll(&error, 1, 0) == 1 && error.revents == POLLOUT) {
        ssize_t written = write(2, stop.message, strlen(stop.message));
        (void)written;
    }
    _exit(code);
}

static void *watch(void *unused) {
    int64_t deadline = -1;
    int code = 0, interrupts = 0, by_interrupt = 0;
    for (;;) {
        struct pollfd told = {stop.told, POLLIN, 0};
        int64_t left = deadline < 0 ? -1 : deadline - now_ms();
        if (deadline >= 0 && left <= 0) end(code);
        if (poll(&told, 1, (int)left) <= 0) continue;
        unsigned char bytes[64];
        ssize_t got = read(stop.told, bytes, sizeof bytes);
        if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN)) return unused;  // the pipe is closed
        for (ssize_t i = 0; i < got; i++) {
            int new = NOT_A_STOP;
            if (bytes[i] == SETTINGS) {
                if (atomic_exchange(&stop.renewed, 0)) {
                    interrupts = 0;
                    if (by_interrupt) deadline = -1;
                }
                new = atomic_load(&stop.ended);
            } else if (bytes[i] < SIGNALS) {
                new = atomic_load(&stop.codes[bytes[i]]);
                if (bytes[i] == SIGINT && ++interrupts <= atomic_load(&stop.patience)) new = NOT_A_STOP;
            }
            if (new == NOT_A_STOP || deadline >= 0) continue;
            code = new;
            by_interrupt = bytes[i] == SIGINT;
            deadline = now_ms() + stop.grace_ms;
        }
    }
}

// Signals the whole group if this process leads it. For process 1, kill(-1) would mean every other process.
static void signal_all(int number) { kill(getpgrp() == getpid() && getpid() != 1 ? -getpid() : getpid(), number); }

static void *hold_lifeline(void *unused) {
    char bytes[4096];
    ssize_t got;
    while ((got = read(0, bytes, sizeof bytes)) > 0 || (got < 0 && (errno == EINTR || errno == EAGAIN))) {
        struct pollfd input = {0, POLLIN, 0};
        if (got < 0) poll(&input, 1, -1);
    }
    signal_all(SIGTERM);
    struct timespec rest = {(time_t)stop.lifeline_s, (long)((stop.lifeline_s - (time_t)stop.lifeline_s) * 1e9)};
    nanosleep(&rest, NULL);
    signal_all(SIGKILL);
    return unused;
}

static int start(void *(*work)(void *)) {
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's threads
    int error = pthread_create(&thread, NULL, work, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) pthread_detach(thread);
    return error;
}

// Call this once. told: the reading end of the pipe. Returns 0 or an errno.
int mf_stop_watch(int told, int64_t grace_ms, const char *message) {
    stop.told = told;
    stop.grace_ms = grace_ms;
    strncpy(stop.message, message, sizeof stop.message - 1);
    for (int i = 0; i < SIGNALS; i++) atomic_store(&stop.codes[i], NOT_A_STOP);
    return start(watch);
}

// Settings take effect with the next byte in the pipe. After the last two functions the caller writes SETTINGS into it.
void mf_stop_code(int number, int code) { atomic_store(&stop.codes[number], code); }

void mf_stop_patience(int interrupts) {
    atomic_store(&stop.patience, interrupts);
    atomic_store(&stop.renewed, 1);
}

void mf_stop_ended(int code) { atomic_store(&stop.ended, code); }

// At the end of standard input, sends SIGTERM, then SIGKILL after some seconds. Returns 0 or an errno.
int mf_stop_with_stdin(double seconds) {
    stop.lifeline_s = seconds;
    return start(hold_lifeline);
}
