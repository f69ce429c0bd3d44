/* The init of a box, compiled: does the same as init.py with a hundredth of its memory, and starts commands faster.
 *
 *     LD_PRELOAD=libinit.so /bin/sh -c "CONTROL OUTPUT LIMITS"
 *
 * A library that turns /bin/sh into PID 1 of a box. Its constructor runs when the shell is loaded and linked, before its main
 * function, and never returns in PID 1. A command is a fork of that process in which the constructor returns, so that the shell
 * starts with the command among its arguments: a fresh shell without the cost of loading one. See init.py for the messages. Built by
 * `python -m sandbox_image.compile_init`.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PACKET_BYTES 16384
#define MOST_KEPT 8
#define MOST_DESCRIPTORS 16
#define MOST_PASSES 500
#define PASS_PAUSE_US 1000

/* A message: byte strings with a NUL between each two and one after the last, and the descriptors that came with it. */
struct message {
    char *bytes;
    size_t length;
    char **parts;
    size_t count;
    int descriptors[MOST_DESCRIPTORS];
    size_t descriptor_count;
};

/* A process that was started for the server: the running command, or the keeper of a kept one. */
struct child {
    pid_t pid;
    int status;
    int gone;
    char number[24];
};

/* Which process returns from a function that forks: the init, or a fork that is to become a shell. */
enum role { INIT, SHELL };

static int control, output, null_input, workspace;
static char **shell_arguments;
static struct child command, kept[MOST_KEPT];
static size_t kept_count;
static volatile pid_t kept_shell;
static sigset_t no_signals;

static void release(struct message *message) {
    for (size_t at = 0; at < message->descriptor_count; at++)
        close(message->descriptors[at]);
    free(message->bytes);
    free(message->parts);
    memset(message, 0, sizeof *message);
}

static void say_with(const char *kind, const char *number, const char *text, int descriptor) {
    char packet[512];
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } attached = {0};
    int length = snprintf(packet, sizeof packet, "%s%c%s%c%s", kind, 0, number, 0, text);
    struct iovec io = {packet, (size_t)length < sizeof packet ? (size_t)length : sizeof packet - 1};
    struct msghdr header = {.msg_iov = &io, .msg_iovlen = 1};
    if (descriptor >= 0) {
        header.msg_control = attached.space;
        header.msg_controllen = sizeof attached.space;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &descriptor, sizeof descriptor);
    }
    sendmsg(control, &header, MSG_NOSIGNAL);
}

static void say(const char *kind, const char *number, const char *text) {
    say_with(kind, number, text, -1);
}

static void say_exit(const char *number, int status) {
    char code[16];
    snprintf(code, sizeof code, "%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    say("exit", number, code);
}

/* -- Processes ---------------------------------------------------------------------------------------------------------------- */

static void note_end(pid_t pid, int status) {
    struct child *child = pid == command.pid ? &command : NULL;
    for (size_t at = 0; child == NULL && at < kept_count; at++)
        child = kept[at].pid == pid ? &kept[at] : NULL;
    if (child != NULL) {
        child->status = status;
        child->gone = 1;
    }
}

static void reap(int flags) {
    int status;
    pid_t pid = waitpid(-1, &status, flags);
    while (pid > 0) {
        note_end(pid, status);
        pid = waitpid(-1, &status, WNOHANG);
    }
}

static void kill_everybody(void) {
    while (kill(-1, SIGKILL) == 0)
        reap(0);
}

/* Whether a process descends from a keeper; NOT_KNOWN if its ancestors changed while they were listed. */
enum descent { NOT_ASKED, NOT_KNOWN, STRANGER, KEPT };

struct process {
    pid_t pid, parent;
    enum descent descent;
};

static int by_pid(const void *one, const void *other) {
    pid_t left = ((const struct process *)one)->pid, right = ((const struct process *)other)->pid;
    return (left > right) - (left < right);
}

/* All processes of the box but this one, by their numbers; how many, or -1 if /proc cannot be read. */
static ssize_t list_processes(struct process **list) {
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    size_t count = 0, room = 0;
    *list = NULL;
    if (proc == NULL)
        return -1;
    while ((entry = readdir(proc)) != NULL) {
        pid_t pid = (pid_t)atoi(entry->d_name);
        char path[64], line[512], *after_name;
        if (pid <= 1)
            continue;
        snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t length = file < 0 ? -1 : read(file, line, sizeof line - 1);
        if (file >= 0)
            close(file);
        if (length <= 0)
            continue;
        line[length] = '\0';
        /* The name is in brackets and may contain anything, brackets and spaces included. */
        if ((after_name = strrchr(line, ')')) == NULL || strlen(after_name) < 5)
            continue;
        if (count == room && (*list = realloc(*list, (room = 2 * room + 64) * sizeof **list)) == NULL)
            exit(1);
        (*list)[count++] = (struct process){pid, (pid_t)atoi(after_name + 4), NOT_ASKED};
    }
    closedir(proc);
    if (count > 0)
        qsort(*list, count, sizeof **list, by_pid);
    return (ssize_t)count;
}

static int is_kept(pid_t pid) {
    for (size_t at = 0; at < kept_count; at++)
        if (kept[at].pid == pid && !kept[at].gone)
            return 1;
    return 0;
}

static int somebody_is_kept(void) {
    for (size_t at = 0; at < kept_count; at++)
        if (!kept[at].gone)
            return 1;
    return 0;
}

static struct process *parent_of(const struct process *process, struct process *list, size_t count) {
    struct process wanted = {.pid = process->parent};
    return bsearch(&wanted, list, count, sizeof *list, by_pid);
}

/* Answers for all ancestors on the way as well, so that each is asked once. */
static enum descent descent_of(struct process *process, struct process *list, size_t count) {
    struct process *at = process;
    enum descent answer = NOT_KNOWN;
    for (; at != NULL && at->descent == NOT_ASKED; at = parent_of(at, list, count)) {
        if (is_kept(at->pid))
            at->descent = KEPT;
        else
            at->descent = at->parent <= 1 ? STRANGER : NOT_KNOWN;
        if (at->descent != NOT_KNOWN)
            break;
    }
    if (at != NULL)
        answer = at->descent;
    for (; process != at && answer != NOT_KNOWN; process = parent_of(process, list, count))
        process->descent = answer;
    return answer;
}

/* Kill all processes that do not descend from a keeper; how many there were, those included of which it is not known. */
static size_t kill_strangers(void) {
    struct process *list;
    ssize_t count = list_processes(&list);
    size_t strangers = count < 0;
    for (ssize_t at = 0; at < count; at++) {
        enum descent descent = descent_of(&list[at], list, (size_t)count);
        if (descent == STRANGER)
            kill(list[at].pid, SIGKILL);
        strangers += descent != KEPT;
    }
    free(list);
    return strangers;
}

/* Kill all processes but kept ones; if that does not succeed, because others fork too fast, kill those as well. */
static void clear(void) {
    if (somebody_is_kept()) {
        for (int pass = 0; pass < MOST_PASSES; pass++) {
            if (kill_strangers() == 0)
                return;
            reap(WNOHANG);
            if (pass > 0)
                usleep(PASS_PAUSE_US);
        }
    }
    kill_everybody();
}

static void leave(void) {
    kill_everybody();
    exit(0);
}

/* -- Messages ----------------------------------------------------------------------------------------------------------------- */

/* Replace a packet by what is in the file that came with it as the first descriptor: a message too large for a packet. */
static void read_file(struct message *message) {
    struct stat found;
    int file = message->descriptors[0];
    memmove(message->descriptors, message->descriptors + 1, --message->descriptor_count * sizeof(int));
    free(message->bytes);
    if (fstat(file, &found) < 0 || (message->bytes = malloc((size_t)found.st_size + 1)) == NULL)
        leave();
    for (message->length = 0; message->length < (size_t)found.st_size;) {
        ssize_t got = pread(file, message->bytes + message->length, (size_t)found.st_size - message->length, (off_t)message->length);
        if (got <= 0)
            leave();
        message->length += (size_t)got;
    }
    close(file);
}

/* The next message; ends the process when the connection has ended. */
static struct message receive(void) {
    struct message message = {.bytes = malloc(PACKET_BYTES + 1)};
    union {
        char space[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
        struct cmsghdr aligned;
    } attached;
    struct iovec io = {message.bytes, PACKET_BYTES};
    struct msghdr header = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = attached.space, .msg_controllen = sizeof attached.space};
    ssize_t got = message.bytes == NULL ? -1 : recvmsg(control, &header, MSG_CMSG_CLOEXEC);
    if (got <= 0)
        leave();
    message.length = (size_t)got;
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    if (rights != NULL && rights->cmsg_type == SCM_RIGHTS) {
        message.descriptor_count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(message.descriptors, CMSG_DATA(rights), message.descriptor_count * sizeof(int));
    }
    if (message.length == 1 && message.bytes[0] == '@' && message.descriptor_count > 0)
        read_file(&message);
    message.bytes[message.length] = '\0';
    message.count = 1;
    for (size_t at = 0; at < message.length; at++)
        message.count += message.bytes[at] == '\0';
    if ((message.parts = calloc(message.count, sizeof *message.parts)) == NULL)
        leave();
    char *next = message.bytes;
    for (size_t part = 0; part < message.count; part++, next += strlen(next) + 1)
        message.parts[part] = next;
    return message;
}

/* -- Commands ----------------------------------------------------------------------------------------------------------------- */

/* The environment with `variables`, each NAME=VALUE and no name twice, in the place of those of the same names. */
static char **environment_with(char **variables, size_t count) {
    size_t inherited = 0, used = count;
    while (environ[inherited] != NULL)
        inherited++;
    char **merged = calloc(inherited + count + 1, sizeof *merged);
    if (merged == NULL)
        exit(1);
    memcpy(merged, variables, count * sizeof *merged);
    for (size_t at = 0; at < inherited; at++) {
        size_t name = strcspn(environ[at], "=") + 1, same = 0;
        while (same < count && strncmp(variables[same], environ[at], name) != 0)
            same++;
        if (same == count)
            merged[used++] = environ[at];
    }
    return merged;
}

/* In a fork: become a shell of its own with these descriptors and no others. `order` is `KIND NUMBER CWD NAME=VALUE... COMMAND`. */
static void become_shell(const struct message *order, const int *descriptors, size_t count) {
    char *text = order->parts[order->count - 1];
    setsid();
    /* Duplicated first: one of them may have the number that another one is to get. */
    int sources[MOST_DESCRIPTORS];
    for (size_t at = 0; at < count; at++)
        sources[at] = descriptors[at] < (int)count ? fcntl(descriptors[at], F_DUPFD, (int)count) : descriptors[at];
    for (size_t at = 0; at < count; at++)
        dup2(sources[at], (int)at);
    syscall(SYS_close_range, (unsigned)count, ~0U, 0);
    if (order->count > 4)
        environ = environment_with(order->parts + 3, order->count - 4);
    /* `ps` shows the memory in which the arguments were at the start. */
    size_t room = strlen(shell_arguments[2]);
    strncpy(shell_arguments[2], text, room);
    shell_arguments[0] = "sh";
    shell_arguments[2] = text;
    signal(SIGCHLD, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    sigprocmask(SIG_SETMASK, &no_signals, NULL);
    /* Not before the control socket is closed: from now on other commands can trace this process. */
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
}

static void fail(const struct message *order, int error) {
    if (!command.pid)
        clear();
    say("error", order->parts[1], strerror(error));
}

static void adopt(struct child *child, pid_t pid, const char *number) {
    memset(child, 0, sizeof *child);
    child->pid = pid;
    snprintf(child->number, sizeof child->number, "%s", number);
}

/* Fork in the directory that the order names; -1 with errno set. */
static pid_t fork_in(const char *cwd) {
    if (*cwd && chdir(cwd) < 0)
        return -1;
    pid_t pid = fork();
    int error = errno;
    if (pid != 0 && *cwd && fchdir(workspace) < 0)
        exit(1);
    errno = error;
    return pid;
}

static enum role run(const struct message *order) {
    const int streams[] = {null_input, output, output};
    /* An earlier command may have made the pipe non-blocking, as Node.js does; the open file description is shared. */
    fcntl(output, F_SETFL, 0);
    pid_t pid = fork_in(order->parts[2]);
    if (pid == 0) {
        become_shell(order, streams, 3);
        return SHELL;
    }
    if (pid < 0)
        fail(order, errno);
    else
        adopt(&command, pid, order->parts[1]);
    return INIT;
}

static void interrupt_kept_shell(int number) {
    /* Before the shell has a process group of its own; there the signal stays pending until it is unblocked. */
    if (kill(-kept_shell, number) < 0)
        kill(kept_shell, number);
}

/* In a fork: become the child subreaper of a kept command, and end with the exit status of its shell. */
static enum role keep_shell(const struct message *order) {
    setsid();
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    signal(SIGINT, interrupt_kept_shell);
    kept_shell = fork();
    if (kept_shell == 0) {
        become_shell(order, order->descriptors, order->descriptor_count);
        return SHELL;
    }
    if (kept_shell < 0)
        _exit(125);
    signal(SIGCHLD, SIG_DFL);
    sigprocmask(SIG_SETMASK, &no_signals, NULL);
    syscall(SYS_close_range, 0U, ~0U, 0);
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, 0);
        if (pid == kept_shell || (pid < 0 && errno == ECHILD))
            _exit(pid < 0 ? 125 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
}

static enum role keep(const struct message *order) {
    pid_t pid = -1;
    errno = EAGAIN;
    if (kept_count < MOST_KEPT)
        pid = fork_in(order->parts[2]);
    if (pid == 0)
        return keep_shell(order);
    if (pid < 0) {
        say("error", order->parts[1], strerror(errno));
    } else {
        adopt(&kept[kept_count++], pid, order->parts[1]);
        say("done", order->parts[1], "");
    }
    return INIT;
}

/* -- Other orders ------------------------------------------------------------------------------------------------------------- */

static void enter(const char *number, const char *path) {
    int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0 || fchdir(directory) < 0 || access(".", W_OK) < 0) {
        say("error", number, strerror(errno));
        return;
    }
    close(workspace);
    workspace = directory;
    say("done", number, "");
}

static void listen_on(const char *number, const char *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    int yes = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listening, (struct sockaddr *)&address, sizeof address) < 0 || listen(listening, 64) < 0) {
        say("error", number, strerror(errno));
        close(listening);
        return;
    }
    say_with("done", number, "", listening);
    close(listening);
}

static void kill_child(const char *number) {
    if (command.pid && strcmp(command.number, number) == 0) {
        kill(command.pid, SIGKILL);
        return;
    }
    for (size_t at = 0; at < kept_count; at++)
        if (strcmp(kept[at].number, number) == 0)
            kill(kept[at].pid, SIGKILL);
}

static void interrupt(const char *number) {
    for (size_t at = 0; at < kept_count; at++)
        if (strcmp(kept[at].number, number) == 0)
            kill(kept[at].pid, SIGINT);
}

static enum role obey(const struct message *order) {
    const char *kind = order->parts[0];
    const char *number = order->count > 1 ? order->parts[1] : "";
    if (strcmp(kind, "run") == 0 && order->count >= 4)
        return run(order);
    if (strcmp(kind, "keep") == 0 && order->count >= 4)
        return keep(order);
    /* The command may have ended while the order was on its way. */
    if (strcmp(kind, "kill") == 0)
        kill_child(number);
    else if (strcmp(kind, "interrupt") == 0)
        interrupt(number);
    else if (strcmp(kind, "enter") == 0 && order->count == 3)
        enter(number, order->parts[2]);
    else if (strcmp(kind, "listen") == 0 && order->count == 3)
        listen_on(number, order->parts[2]);
    return INIT;
}

/* Report the commands that have ended, after the processes that they left behind have been killed. */
static void settle(void) {
    int ended = 0;
    for (size_t at = 0; at < kept_count; at++)
        ended |= kept[at].gone;
    if (command.pid ? command.gone : ended)
        clear();
    if (command.pid && command.gone) {
        command.pid = 0;
        say_exit(command.number, command.status);
    }
    for (size_t at = 0; at < kept_count;) {
        if (!kept[at].gone || command.pid) {
            at++;
            continue;
        }
        say_exit(kept[at].number, kept[at].status);
        kept[at] = kept[--kept_count];
    }
}

static enum role serve(void) {
    struct pollfd orders = {.fd = control, .events = POLLIN};
    for (;;) {
        if (ppoll(&orders, 1, NULL, &no_signals) < 0) {
            reap(WNOHANG);
            settle();
            continue;
        }
        struct message order = receive();
        if (obey(&order) == SHELL)
            return SHELL;
        release(&order);
    }
}

/* -- The start ---------------------------------------------------------------------------------------------------------------- */

/* `RESOURCE:VALUE,RESOURCE:VALUE...`, numbers of the kernel's both. */
static void set_limits(const char *limits) {
    int kind, used;
    unsigned long long value;
    while (sscanf(limits, "%d:%llu%n", &kind, &value, &used) == 2) {
        struct rlimit limit;
        getrlimit((__rlimit_resource_t)kind, &limit);
        if (limit.rlim_max != RLIM_INFINITY && value > limit.rlim_max)
            value = limit.rlim_max;
        limit.rlim_cur = limit.rlim_max = (rlim_t)value;
        setrlimit((__rlimit_resource_t)kind, &limit);
        limits += used + (limits[used] == ',');
    }
}

/* Report what the server checks before it uses a box: see `facts` in init.py. */
static void introduce(void) {
    static const char *const closed[] = {"/", "/usr", "/etc", "/dev"};
    static const char *const namespaces[] = {"user", "pid", "net", "ipc", "uts", "mnt", "cgroup"};
    char packet[PACKET_BYTES] = "hello", path[64], link[64];
    size_t length = sizeof "hello";
    int status = open("/proc/self/status", O_RDONLY | O_CLOEXEC), probe = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ssize_t got = read(status, packet + length, 8192);
    length += got > 0 ? (size_t)got : 0;
    close(status);
#define ADD(...) length += (size_t)snprintf(packet + length, sizeof packet - length, __VA_ARGS__)
    ADD("Box-Writable:\t");
    for (size_t at = 0; at < sizeof closed / sizeof *closed; at++)
        if (access(closed[at], W_OK) == 0)
            ADD("%s ", closed[at]);
    ADD("\nBox-Workspace:\t%d\nBox-Interfaces:\t", access(".", W_OK) == 0);
    struct if_nameindex *interfaces = if_nameindex();
    for (struct if_nameindex *each = interfaces; each != NULL && each->if_index && length < PACKET_BYTES - 2048; each++) {
        struct ifreq request = {0};
        snprintf(request.ifr_name, sizeof request.ifr_name, "%s", each->if_name);
        ADD("%s%c ", each->if_name, ioctl(probe, SIOCGIFFLAGS, &request) == 0 && request.ifr_flags & IFF_UP ? '+' : '-');
    }
    if_freenameindex(interfaces);
    close(probe);
    ADD("\n");
    for (size_t at = 0; at < sizeof namespaces / sizeof *namespaces; at++) {
        snprintf(path, sizeof path, "/proc/self/ns/%s", namespaces[at]);
        ssize_t size = readlink(path, link, sizeof link - 1);
        if (size > 0)
            ADD("Namespace-%s:\t%.*s\n", namespaces[at], (int)size, link);
    }
#undef ADD
    send(control, packet, length, MSG_NOSIGNAL);
}

static void be_woken(int number) {
    (void)number;
}

__attribute__((constructor)) static void begin(int count, char **arguments, char **environment) {
    int limits = 0;
    (void)environment;
    if (count != 3 || getenv("LD_PRELOAD") == NULL)
        return;
    unsetenv("LD_PRELOAD");
    /* The check whether the shell of this machine loads this library: one that does not exits with status 1. */
    if (strcmp(arguments[2], "exit 1") == 0)
        _exit(0);
    if (getpid() != 1 || sscanf(arguments[2], "%d %d %n", &control, &output, &limits) != 2)
        _exit(2);
    shell_arguments = arguments;
    umask(022);
    set_limits(arguments[2] + limits);
    fcntl(control, F_SETFD, FD_CLOEXEC);
    fcntl(output, F_SETFD, FD_CLOEXEC);
    null_input = open("/dev/null", O_RDONLY | O_CLOEXEC);
    workspace = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int number = 1; number < 32; number++)
        signal(number, SIG_DFL);
    /* The end of a child interrupts the wait for orders, and nothing else. */
    struct sigaction on_child = {.sa_handler = be_woken};
    sigset_t on_hold;
    sigemptyset(&no_signals);
    sigemptyset(&on_hold);
    sigaddset(&on_hold, SIGCHLD);
    /* A keeper must not handle an interrupt before it knows the shell to pass it on to. */
    sigaddset(&on_hold, SIGINT);
    sigprocmask(SIG_SETMASK, &on_hold, NULL);
    sigaction(SIGCHLD, &on_child, NULL);
    introduce();
    /* Commands run as the same user: without this they could trace this process, or take the control socket and forge replies. */
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    serve();
}
