/*
 * descriptors: what a peer sends beside the bytes of a Unix socket.
 *
 * The kernel gives this process as many descriptors as there is room for, also
 * those that padding makes room for, and whoever does not close them keeps them
 * for good. So the room is for all that one message can carry, and all but the
 * one that is wanted are closed.
 */
#ifndef RK_COMMON_TRANSPORT_DESCRIPTORS_INTERNAL_H
#define RK_COMMON_TRANSPORT_DESCRIPTORS_INTERNAL_H

#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define DESCRIPTORS_MAX 253 /* SCM_MAX_FD: Linux sends no more beside one message */

union descriptors_room {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
};

/*
 * Of a message that recvmsg(2) brought into such a room. *ret_fd is the caller's, -1: there was
 * none. False: there was more than one, or one that could not be given to us (this process has as
 * many as it may); then none is left open.
 */
static inline bool descriptors_take(struct msghdr *message, int *ret_fd)
{
    int first = -1;
    bool good = (message->msg_flags & MSG_CTRUNC) == 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd = -1;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
            if (first < 0) {
                first = fd;
            } else {
                (void)close(fd);
                good = false;
            }
        }
    }
    if (!good && first >= 0) {
        (void)close(first);
        first = -1;
    }
    *ret_fd = first;
    return good;
}

#endif
