/* Frames of the shm socket: any bytes are a frame, a need for more, or refused. */
#include "common/transport/shm_wire_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct rk_extent scratch[SHM_EXTENTS_MAX];
    struct shm_frame frame;
    size_t needed = 0;
    size_t at = 0;
    while (at <= size) {
        enum rk_status status =
            shm_frame_parse(data + at, size - at, SHM_REQUEST_BYTES_MAX, &frame, &needed);
        if (status == RK_ERR_BUSY) {
            RK_ASSERT(needed > size - at && needed <= SHM_REQUEST_BYTES_MAX);
        }
        if (status != RK_OK) {
            break;
        }
        struct rk_get get;
        RK_ASSERT(frame.bytes <= size - at);
        if (shm_get_parse(&frame, 4096, scratch, &get) == RK_OK) {
            RK_ASSERT(get.pages_max > 0 && get.pages_max <= 4096 && get.num_extents > 0);
        }
        at += frame.bytes;
    }
    return 0;
}
