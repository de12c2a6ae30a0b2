#include "client/redknot_internal.h"

static size_t sequence_bytes(uint8_t lead)
{
    if ((lead & 0xE0) == 0xC0) {
        return 2;
    }
    if ((lead & 0xF0) == 0xE0) {
        return 3;
    }
    return (lead & 0xF8) == 0xF0 ? 4 : 1;
}

size_t rk_utf8_whole(const uint8_t *bytes, size_t count)
{
    for (size_t back = 1; back < RK_UTF8_CARRY_BYTES && back <= count; back++) {
        uint8_t byte = bytes[count - back];
        if ((byte & 0xC0) != 0x80) { /* A lead byte or ASCII: is its sequence complete? */
            return sequence_bytes(byte) > back ? count - back : count;
        }
    }
    return count;
}
