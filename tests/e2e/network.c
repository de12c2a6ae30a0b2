#include "tests/e2e/network.h"

#include "common/base/clock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cmocka.h>

#define PREFIX "redknot-test-"
#define DEVICE "rk0"

/* 0: it worked. */
static int command_run(const char *format, va_list arguments, char *ret_command,
                       size_t command_bytes)
{
    (void)vsnprintf(ret_command, command_bytes, format, arguments);
    return system(ret_command); /* Words of this file and its tests alone. */
}

__attribute__((format(printf, 1, 2))) static void command(const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    int rc = command_run(format, arguments, text, sizeof(text));
    va_end(arguments);
    if (rc != 0) {
        fail_msg("`%s` ended with wait status %d", text, rc);
    }
}

__attribute__((format(printf, 1, 2))) static bool command_works(const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    int rc = command_run(format, arguments, text, sizeof(text));
    va_end(arguments);
    return rc == 0;
}

/* ---- What is needed ---- */

static bool process_lives(pid_t pid)
{
    char path[64];
    char line[256] = "";
    (void)snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) {
        return errno != ENOENT;
    }
    bool read = fgets(line, sizeof(line), file) != NULL;
    (void)fclose(file);
    return read && !strstr(line, ") Z "); /* Dead, and not waited for yet. */
}

static void remove_stale(void)
{
    DIR *folder = opendir("/run/netns");
    if (!folder) {
        return;
    }
    for (struct dirent *entry = readdir(folder); entry; entry = readdir(folder)) {
        if (strncmp(entry->d_name, PREFIX, strlen(PREFIX)) != 0) {
            continue;
        }
        pid_t pid = (pid_t)strtol(entry->d_name + strlen(PREFIX), NULL, 10);
        if (pid > 0 && !process_lives(pid)) {
            (void)command_works("ip netns delete %s", entry->d_name);
        }
    }
    closedir(folder);
}

static bool netns_was_mounted;

static bool netns_mounted(void)
{
    char line[1024];
    bool found = false;
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    while (mounts && !found && fgets(line, sizeof(line), mounts)) {
        found = strstr(line, " /run/netns ") != NULL;
    }
    if (mounts) {
        (void)fclose(mounts);
    }
    return found;
}

void network_done(void)
{
    if (!netns_was_mounted && netns_mounted()) {
        (void)umount2("/run/netns", MNT_DETACH);
    }
}

const char *network_missing(void)
{
    netns_was_mounted = netns_mounted();
    static const struct {
        const char *command;
        const char *missing;
    } steps[] = {
        {"ip netns add %s >/dev/null 2>&1", "ip netns (iproute2, CAP_SYS_ADMIN)"},
        {"ip -n %s link add " DEVICE " type veth peer name rk1 >/dev/null 2>&1", "veth devices"},
        {"tc -n %s qdisc add dev " DEVICE
         " root tbf rate 20mbit burst 32kbit latency 400ms >/dev/null 2>&1",
         "tc with tbf (iproute2)"},
        {"ip netns exec %s iptables -w -A INPUT -m statistic --mode random --probability 0.5 -j "
         "DROP "
         ">/dev/null 2>&1",
         "iptables with its statistic module"},
    };
    const char *missing = NULL;
    char name[64];
    if (geteuid() != 0) {
        return "root";
    }
    remove_stale();
    (void)snprintf(name, sizeof(name), PREFIX "%d-probe", getpid());
    for (size_t i = 0; !missing && i < sizeof(steps) / sizeof(steps[0]); i++) {
        char text[512];
        const char *place = strstr(steps[i].command, "%s");
        (void)snprintf(text, sizeof(text), "%.*s%s%s", (int)(place - steps[i].command),
                       steps[i].command, name, place + 2);
        missing = command_works("%s", text) ? NULL : steps[i].missing;
    }
    (void)command_works("ip netns delete %s >/dev/null 2>&1", name);
    return missing;
}

/* ---- Life ---- */

/* The kernel may take a second to say so, and UCX uses no device that does not. */
static void wait_for_carrier(const char *side)
{
    for (int i = 0; i < 100; i++) {
        if (command_works("ip -n %s link show " DEVICE " | grep -q 'state UP'", side)) {
            return;
        }
        rk_clock_sleep_ms(50);
    }
    fail_msg("the device in %s does not come up", side);
}

void network_make(struct network *network)
{
    static unsigned number;
    unsigned subnet = ++number % 250;
    *network = (struct network){.server_side = ""};
    (void)snprintf(network->server_host, sizeof(network->server_host), "10.77.%u.1", subnet);
    (void)snprintf(network->client_host, sizeof(network->client_host), "10.77.%u.2", subnet);
    (void)snprintf(network->server_side, sizeof(network->server_side), PREFIX "%d-%u-s", getpid(),
                   number);
    command("ip netns add %s", network->server_side);
    (void)snprintf(network->client_side, sizeof(network->client_side), PREFIX "%d-%u-c", getpid(),
                   number);
    command("ip netns add %s", network->client_side);
    command("ip link add " DEVICE " netns %s type veth peer name " DEVICE " netns %s",
            network->server_side, network->client_side);
    command("ip -n %s address add %s/24 dev " DEVICE, network->server_side, network->server_host);
    command("ip -n %s address add %s/24 dev " DEVICE, network->client_side, network->client_host);
    const char *sides[] = {network->server_side, network->client_side};
    for (size_t i = 0; i < 2; i++) {
        command("ip -n %s link set lo up", sides[i]);
        command("ip -n %s link set " DEVICE " up", sides[i]);
    }
    wait_for_carrier(network->server_side);
    wait_for_carrier(network->client_side);
}

void network_remove(struct network *network)
{
    const char *sides[] = {network->server_side, network->client_side};
    for (size_t i = 0; i < 2; i++) {
        if (sides[i][0] != '\0') {
            (void)command_works("ip netns delete %s >/dev/null 2>&1", sides[i]);
        }
    }
    *network = (struct network){.server_side = ""};
}

bool network_enter(const char *name)
{
    char path[128];
    (void)snprintf(path, sizeof(path), "/run/netns/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool entered = fd >= 0 && setns(fd, CLONE_NEWNET) == 0 && unshare(CLONE_NEWNS) == 0 &&
                   mount("", "/", NULL, MS_SLAVE | MS_REC, NULL) == 0 &&
                   mount("sysfs", "/sys", "sysfs", 0, NULL) == 0;
    if (fd >= 0) {
        close(fd);
    }
    return entered;
}

/* ---- Faults ---- */

void network_cut(const struct network *network, enum network_cut cut)
{
    if (cut == NETWORK_LINK_DOWN) {
        command("ip -n %s link set " DEVICE " down", network->server_side);
    } else {
        command("ip netns exec %s iptables -w -A INPUT -i " DEVICE " -j DROP",
                network->server_side);
    }
}

void network_mend(const struct network *network, enum network_cut cut)
{
    if (cut == NETWORK_LINK_DOWN) {
        command("ip -n %s link set " DEVICE " up", network->server_side);
    } else {
        command("ip netns exec %s iptables -w -D INPUT -i " DEVICE " -j DROP",
                network->server_side);
    }
}

void network_slow(const struct network *network, const char *rate, const char *burst)
{
    const char *sides[] = {network->server_side, network->client_side};
    for (size_t i = 0; i < 2; i++) {
        command("tc -n %s qdisc replace dev " DEVICE " root tbf rate %s burst %s latency 400ms",
                sides[i], rate, burst);
    }
}

void network_speed_up(const struct network *network)
{
    const char *sides[] = {network->server_side, network->client_side};
    for (size_t i = 0; i < 2; i++) {
        command("tc -n %s qdisc delete dev " DEVICE " root", sides[i]);
    }
}

void network_lose(const struct network *network, const char *probability)
{
    const char *sides[] = {network->server_side, network->client_side};
    for (size_t i = 0; i < 2; i++) {
        command("ip netns exec %s iptables -w -A INPUT -i " DEVICE
                " -m statistic --mode random --probability %s -j DROP",
                sides[i], probability);
    }
}
