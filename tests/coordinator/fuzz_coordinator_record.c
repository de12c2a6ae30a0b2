/*
 * Goal:   no bytes in the metadata database make the coordinator misbehave: a
 *         record is refused, or is in bounds and survives a round trip.
 * Method: decode; when that works, encode and decode again and compare.
 */
#include "common/base/alloc.h"
#include "coordinator/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct record_segment first = {0};
    struct record_segment second = {0};
    void *encoded = NULL;
    size_t encoded_bytes = 0;

    if (record_decode_segment(data, bytes, &first) != RK_OK) {
        return 0;
    }
    RK_ASSERT(record_encode_spec(&first.spec, &encoded, &encoded_bytes) == RK_OK);
    RK_ASSERT(record_decode_segment(encoded, encoded_bytes, &second) == RK_OK);
    RK_ASSERT(first.spec.generation == second.spec.generation &&
              first.spec.num_shards == second.spec.num_shards &&
              first.spec.num_tokens == second.spec.num_tokens &&
              rk_id_equal(&first.spec.id, &second.spec.id));
    rk_free(encoded);
    record_segment_free(&first);
    record_segment_free(&second);
    return 0;
}
