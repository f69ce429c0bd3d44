/* The loop of init.py, compiled: the same messages, the same promises, a hundredth of the memory, and nothing to warm up.
 *
 *     init_loop CONTROL OUTPUT
 *
 * init.py sets the box up, reports to the server and becomes this program where it is there. It is PID 1 of its namespace. See
 * init.py for the messages. Built by `python -m sandbox_image.compile_init`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PACKET_BYTES 16384
/* The kernel takes 128 KiB per argument (MAX_ARG_STRLEN), the terminating NUL included. */
#define LONGEST_ARGUMENT (128 * 1024 - 1)
#define SCRIPT_FD 3

extern char **environ;

static int control, output, null_input, workspace;

/* A message: byte strings with a NUL between each two and one after the last. */
struct message {
    char *bytes;
    size_t length;
    char **parts;
    size_t count;
};

static void release(struct message *message) {
    free(message->bytes);
    free(message->parts);
    memset(message, 0, sizeof *message);
}

/* Kill and reap everything there is; the wait status of `main_pid`. */
static int clear(pid_t main_pid) {
    int status = 0, result;
    while (kill(-1, SIGKILL) == 0) {
        pid_t pid = waitpid(-1, &result, 0);
        if (pid < 0)
            break;
        while (pid > 0) {
            if (pid == main_pid)
                status = result;
            pid = waitpid(-1, &result, WNOHANG);
        }
    }
    return status;
}

static void leave(void) {
    clear(0);
    exit(0);
}

/* Read the file that comes with the next packet: a message too large for one. */
static int receive_file(struct message *message) {
    char byte, space[CMSG_SPACE(sizeof(int))];
    struct iovec io = {&byte, 1};
    struct msghdr header = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct stat found;
    int file;
    if (recvmsg(control, &header, MSG_CMSG_CLOEXEC) <= 0)
        return -1;
    struct cmsghdr *attached = CMSG_FIRSTHDR(&header);
    if (attached == NULL || attached->cmsg_type != SCM_RIGHTS)
        return -1;
    memcpy(&file, CMSG_DATA(attached), sizeof file);
    if (fstat(file, &found) < 0 || (message->bytes = malloc((size_t)found.st_size + 1)) == NULL)
        return -1;
    while (message->length < (size_t)found.st_size) {
        ssize_t got = pread(file, message->bytes + message->length, (size_t)found.st_size - message->length, (off_t)message->length);
        if (got <= 0)
            return -1;
        message->length += (size_t)got;
    }
    close(file);
    return 0;
}

/* The next message; does not return when the server is gone. */
static struct message receive(void) {
    struct message message = {0};
    if ((message.bytes = malloc(PACKET_BYTES + 1)) == NULL)
        exit(1);
    ssize_t got = recv(control, message.bytes, PACKET_BYTES, 0);
    if (got <= 0)
        leave();
    message.length = (size_t)got;
    if (message.length == 1 && message.bytes[0] == '@') {
        release(&message);
        if (receive_file(&message) < 0)
            leave();
    }
    message.bytes[message.length] = '\0';
    message.count = 1;
    for (size_t at = 0; at < message.length; at++)
        message.count += message.bytes[at] == '\0';
    if ((message.parts = calloc(message.count, sizeof *message.parts)) == NULL)
        exit(1);
    char *next = message.bytes;
    for (size_t part = 0; part < message.count; part++, next += strlen(next) + 1)
        message.parts[part] = next;
    return message;
}

static void report(const char *kind, const char *number, const char *text) {
    char packet[512];
    int length = snprintf(packet, sizeof packet, "%s%c%s%c%s", kind, 0, number, 0, text);
    if (length > 0)
        send(control, packet, (size_t)length < sizeof packet ? (size_t)length : sizeof packet - 1, MSG_NOSIGNAL);
}

/* The environment with `variables`, each NAME=VALUE, in the place of those of the same names. */
static char **environment_with(char **variables, size_t count) {
    size_t inherited = 0, used = 0;
    while (environ[inherited] != NULL)
        inherited++;
    char **merged = calloc(inherited + count + 1, sizeof *merged);
    if (merged == NULL)
        exit(1);
    for (size_t at = 0; at < inherited + count; at++) {
        char *entry = at < inherited ? environ[at] : variables[at - inherited];
        size_t name = strcspn(entry, "=") + 1, slot = 0;
        while (slot < used && strncmp(merged[slot], entry, name) != 0)
            slot++;
        merged[slot] = entry;
        used += slot == used;
    }
    return merged;
}

/* Start the command; 0 or an error number. */
static int start(const struct message *run, pid_t *pid) {
    char *command = run->parts[run->count - 1], *cwd = run->parts[2];
    size_t length = strlen(command);
    char *argv[] = {"sh", "-c", command, NULL}, *script_argv[] = {"sh", "/dev/fd/3", NULL};
    int script = -1, error = 0;
    char **environment = run->count > 4 ? environment_with(run->parts + 3, run->count - 4) : environ;
    posix_spawn_file_actions_t streams;
    posix_spawnattr_t attributes;

    posix_spawn_file_actions_init(&streams);
    posix_spawn_file_actions_adddup2(&streams, null_input, 0);
    posix_spawn_file_actions_adddup2(&streams, output, 1);
    posix_spawn_file_actions_adddup2(&streams, output, 2);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
    /* An earlier command may have made the pipe non-blocking, as Node.js does; that is a property of the pipe's open end. */
    fcntl(output, F_SETFL, 0);
    if (length > LONGEST_ARGUMENT) {
        script = memfd_create("command", MFD_CLOEXEC);
        for (size_t written = 0; script >= 0 && written < length;) {
            ssize_t put = pwrite(script, command + written, length - written, (off_t)written);
            if (put < 0) {
                error = errno;
                break;
            }
            written += (size_t)put;
        }
        if (script < 0)
            error = errno;
        else
            posix_spawn_file_actions_adddup2(&streams, script, SCRIPT_FD);
    }
    if (!error && *cwd && chdir(cwd) < 0)
        error = errno;
    if (!error)
        error = posix_spawn(pid, "/bin/sh", &streams, &attributes, script < 0 ? argv : script_argv, environment);
    if (*cwd && fchdir(workspace) < 0)
        exit(1);
    if (script >= 0)
        close(script);
    if (environment != environ)
        free(environment);
    posix_spawn_file_actions_destroy(&streams);
    posix_spawnattr_destroy(&attributes);
    return error;
}

/* Wait for the command itself; 0 if it is to be killed. */
static int ended_by_itself(pid_t pid, const char *number, int *status) {
    struct pollfd events[] = {{.fd = control, .events = POLLIN}, {.fd = (int)syscall(SYS_pidfd_open, pid, 0), .events = POLLIN}};
    int ended = -1;
    while (ended < 0) {
        if (poll(events, 2, -1) < 0)
            continue;
        if (events[1].revents) {
            waitpid(pid, status, 0);
            ended = 1;
        } else if (events[0].revents) {
            struct message order = receive();
            if (order.count == 2 && strcmp(order.parts[0], "kill") == 0 && strcmp(order.parts[1], number) == 0)
                ended = 0;
            release(&order);
        }
    }
    close(events[1].fd);
    return ended;
}

static void execute(const struct message *run) {
    const char *number = run->parts[1];
    pid_t pid = 0;
    int status = 0, error = start(run, &pid);
    if (error) {
        clear(0);
        report("error", number, strerror(error));
        return;
    }
    int itself = ended_by_itself(pid, number, &status), killed = clear(pid);
    if (!itself)
        status = killed;
    char code[16];
    snprintf(code, sizeof code, "%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    report("exit", number, code);
}

int main(int count, char **arguments) {
    if (count != 3 || getpid() != 1)
        return 2;
    control = atoi(arguments[1]);
    output = atoi(arguments[2]);
    fcntl(control, F_SETFD, FD_CLOEXEC);
    fcntl(output, F_SETFD, FD_CLOEXEC);
    null_input = open("/dev/null", O_RDONLY | O_CLOEXEC);
    workspace = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    /* Commands run as the same user: without this they could trace us, or take the control socket and answer in our name. */
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    /* Python ignores these two, and what is ignored stays so across exec. */
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    for (;;) {
        struct message message = receive();
        /* A `kill` that crossed the `exit` of its command on the way has nothing left to do. */
        if (message.count >= 4 && strcmp(message.parts[0], "run") == 0)
            execute(&message);
        release(&message);
    }
}
