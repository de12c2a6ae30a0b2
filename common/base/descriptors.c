#include "common/base/descriptors.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define LIMIT_MAX   (1u << 20)
#define RESERVE_MIN 8
#define RESERVE_MAX 256

void rk_descriptors_raise(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) {
        return;
    }
    rlim_t wanted = limit.rlim_max < LIMIT_MAX ? limit.rlim_max : LIMIT_MAX;
    if (limit.rlim_cur < wanted) {
        limit.rlim_cur = wanted;
        (void)setrlimit(RLIMIT_NOFILE, &limit); /* Else it stays as it is. */
    }
}

uint32_t rk_descriptors_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) {
        return RK_DESCRIPTORS_MIN;
    }
    return limit.rlim_cur < LIMIT_MAX ? (uint32_t)limit.rlim_cur : LIMIT_MAX;
}

uint32_t rk_descriptors_reserve(void)
{
    uint32_t reserve = rk_descriptors_limit() / 8;
    return reserve < RESERVE_MIN ? RESERVE_MIN : reserve > RESERVE_MAX ? RESERVE_MAX : reserve;
}

bool rk_descriptors_admit(int fd, bool of_reserve)
{
    uint32_t reserve = rk_descriptors_reserve();
    return (uint32_t)fd + (of_reserve ? reserve / 2 : reserve) < rk_descriptors_limit();
}

static void spare_refill(int *spare)
{
    if (*spare < 0) {
        *spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
}

static int take(int listener)
{
    return accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
}

enum rk_status rk_descriptors_accept(int listener, int *spare, int *ret_fd)
{
    spare_refill(spare);
    int fd = take(listener);
    if (fd >= 0) {
        *ret_fd = fd;
        return RK_OK;
    }
    switch (errno) {
    case EBADF:
    case EINVAL:
    case ENOTSOCK:
    case EFAULT:
    case EOPNOTSUPP:
        return RK_ERR_IO;
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
        break;
    default: /* EAGAIN, or what became of one connection: accept(2) passes on its errors. */
        return RK_ERR_NOT_FOUND;
    }
    if (*spare < 0) {
        return RK_ERR_BUSY;
    }
    (void)close(*spare);
    *spare = -1;
    fd = take(listener); /* Unless another thread was faster. */
    if (fd >= 0) {
        (void)close(fd);
    }
    spare_refill(spare);
    return fd >= 0 ? RK_ERR_FULL : RK_ERR_BUSY;
}
