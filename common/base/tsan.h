/*
 * tsan: hand-overs between threads that ThreadSanitizer cannot see, because
 * they lie in a library that is not instrumented: gRPC's queues, OpenMP's fork
 * and join.
 *
 * What a thread did before RELEASE happens before what another does behind
 * ACQUIRE of the same address. Nothing at all in other builds.
 */
#ifndef RK_COMMON_BASE_TSAN_H
#define RK_COMMON_BASE_TSAN_H

#ifndef __has_feature
#define __has_feature(feature) 0
#endif

#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define RK_TSAN_ACQUIRE(address) __tsan_acquire(address)
#define RK_TSAN_RELEASE(address) __tsan_release(address)
#else
#define RK_TSAN_ACQUIRE(address) ((void)(address))
#define RK_TSAN_RELEASE(address) ((void)(address))
#endif

#endif
