/*
 * Goal:   as many requests are inside as places and holds allow, in the order in which they came;
 *         a wait ends by its cancellation or deadline; a full queue is said at once; a reader that
 *         stalls gives its place away.
 * Method: threads that enter, and a load that the test makes up.
 */
#include "worker/api/admission.h"

#include "common/base/clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define LONG_MS 20000
#define SOON_NS INT64_C(1000000000)
#define THREADS 6

static atomic_uint stalled;
static atomic_uint queued;
static atomic_bool cancelled;
static atomic_uint arrived; /* order of entering */

static void load(void *context, uint32_t *ret_stalled, uint32_t *ret_queued)
{
    (void)context;
    *ret_stalled = atomic_load(&stalled);
    *ret_queued = atomic_load(&queued);
}

static bool is_cancelled(void *context)
{
    (void)context;
    return atomic_load(&cancelled);
}

static struct admission *make(uint32_t places, uint32_t holds_max, uint32_t waiting_max)
{
    struct admission_options options = {
        .places = places, .holds_max = holds_max, .waiting_max = waiting_max, .load = load};
    struct admission *admission = NULL;
    atomic_store(&stalled, 0);
    atomic_store(&queued, 0);
    atomic_store(&cancelled, false);
    atomic_store(&arrived, 0);
    assert_int_equal(admission_create(&options, &admission, NULL), RK_OK);
    return admission;
}

static struct rk_until until_ms(int64_t ms)
{
    return (struct rk_until){.deadline_ns = rk_deadline_in_ms(ms), .cancelled = is_cancelled};
}

struct guest {
    struct admission *admission;
    uint32_t holds;
    pthread_t thread;
    enum rk_status status;
    unsigned order;
};

static void *guest_main(void *context)
{
    struct guest *guest = context;
    struct rk_until until = until_ms(LONG_MS);
    guest->status = admission_enter(guest->admission, guest->holds, &until, NULL);
    guest->order = atomic_fetch_add(&arrived, 1);
    return NULL;
}

/* Returns once the guest waits. */
static void guest_send(struct guest *guest, struct admission *admission, uint32_t holds)
{
    uint32_t waiting = admission_waiting(admission);
    int64_t deadline = rk_deadline_in_ms(LONG_MS);
    *guest = (struct guest){.admission = admission, .holds = holds};
    assert_int_equal(pthread_create(&guest->thread, NULL, guest_main, guest), 0);
    while (admission_waiting(admission) == waiting) {
        assert_true(rk_deadline_left_ms(deadline) > 0);
        rk_clock_sleep_ms(1);
    }
}

static void guest_join(struct guest *guest, enum rk_status wanted)
{
    pthread_join(guest->thread, NULL);
    assert_int_equal(guest->status, wanted);
}

static void places_go_in_order(void **state)
{
    (void)state;
    struct admission *admission = make(2, 100, 64);
    struct rk_until until = until_ms(LONG_MS);
    struct guest guests[THREADS];
    assert_int_equal(admission_enter(admission, 1, &until, NULL), RK_OK);
    assert_int_equal(admission_enter(admission, 1, &until, NULL), RK_OK);
    for (int i = 0; i < THREADS; i++) {
        guest_send(&guests[i], admission, 1);
    }
    for (int i = 0; i < THREADS; i++) {
        admission_leave(admission, 1);
        guest_join(&guests[i], RK_OK);
        assert_int_equal(guests[i].order, i);
        assert_int_equal(admission_waiting(admission), THREADS - 1 - i);
    }
    admission_leave(admission, 1);
    admission_leave(admission, 1);
    admission_destroy(admission);
}

/* Nobody passes one that waits for holds; one that is too big for all comes in alone. */
static void holds_are_counted(void **state)
{
    (void)state;
    struct admission *admission = make(10, 100, 64);
    struct rk_until until = until_ms(LONG_MS);
    struct guest big;
    struct guest small;
    assert_int_equal(admission_enter(admission, 60, &until, NULL), RK_OK);
    assert_int_equal(admission_enter(admission, 40, &until, NULL), RK_OK);
    guest_send(&big, admission, 150);
    guest_send(&small, admission, 1);
    admission_leave(admission, 60);
    rk_clock_sleep_ms(3 * RK_UNTIL_SLICE_MS);
    assert_int_equal(admission_waiting(admission), 2);
    admission_leave(admission, 40);
    guest_join(&big, RK_OK);
    assert_int_equal(admission_waiting(admission), 1);
    admission_leave(admission, 150);
    guest_join(&small, RK_OK);
    admission_leave(admission, 1);
    admission_destroy(admission);
}

static void waits_end(void **state)
{
    (void)state;
    struct admission *admission = make(1, 100, 64);
    struct rk_until until = until_ms(LONG_MS);
    struct rk_error error = {.text = ""};
    struct guest guest;
    assert_int_equal(admission_enter(admission, 0, &until, NULL), RK_OK);
    until = until_ms(100);
    assert_int_equal(admission_enter(admission, 0, &until, &error), RK_ERR_DEADLINE);
    guest_send(&guest, admission, 0);
    int64_t begin = rk_clock_ns();
    atomic_store(&cancelled, true);
    guest_join(&guest, RK_ERR_CANCELLED);
    assert_true(rk_clock_ns() - begin < SOON_NS);
    assert_int_equal(admission_waiting(admission), 0);
    admission_leave(admission, 0);
    admission_destroy(admission);
}

static void a_full_queue_is_said_at_once(void **state)
{
    (void)state;
    struct admission *admission = make(1, 100, 2);
    struct rk_until until = until_ms(LONG_MS);
    struct rk_error error = {.text = ""};
    struct guest guest;
    atomic_store(&queued, 1); /* One more in the engine's queue. */
    assert_int_equal(admission_enter(admission, 0, &until, NULL), RK_OK);
    guest_send(&guest, admission, 0);
    int64_t begin = rk_clock_ns();
    assert_int_equal(admission_enter(admission, 0, &until, &error), RK_ERR_FULL);
    assert_true(rk_clock_ns() - begin < SOON_NS);
    assert_non_null(strstr(error.text, "--queue-max"));
    assert_non_null(strstr(error.text, "2 requests wait"));
    admission_leave(admission, 0);
    guest_join(&guest, RK_OK);
    admission_leave(admission, 0);
    admission_destroy(admission);
}

static void stalled_readers_make_room(void **state)
{
    (void)state;
    struct admission *admission = make(1, 100, 64);
    struct rk_until until = until_ms(LONG_MS);
    struct guest guest;
    assert_int_equal(admission_enter(admission, 0, &until, NULL), RK_OK);
    guest_send(&guest, admission, 0);
    atomic_store(&stalled, 1); /* Seen by itself, without anybody leaving. */
    guest_join(&guest, RK_OK);
    admission_leave(admission, 0);
    admission_leave(admission, 0);
    admission_destroy(admission);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(places_go_in_order),
        cmocka_unit_test(holds_are_counted),
        cmocka_unit_test(waits_end),
        cmocka_unit_test(a_full_queue_is_said_at_once),
        cmocka_unit_test(stalled_readers_make_room),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
