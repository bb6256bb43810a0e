// What AddressSanitizer and ThreadSanitizer are told; nothing where they are not built in.

#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef GEMMOE_SHIM_RACES
#include <sanitizer/tsan_interface.h>
#endif

namespace shim {

#ifdef __SANITIZE_ADDRESS__

constexpr bool ASAN = true;

inline void poison(void *memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void unpoison(void *memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }

// Before another stack is taken: where locals of this one are kept is put down in `left`.
inline void start_switch(void *&left, unsigned char *stack, size_t bytes) {
    __sanitizer_start_switch_fiber(&left, stack, bytes);
}

// On the stack that was taken, whose note is `entered`; says which one was left.
inline void finish_switch(void *entered, unsigned char *&stack, size_t &bytes) {
    const void *bottom;
    __sanitizer_finish_switch_fiber(entered, &bottom, &bytes);
    stack = static_cast<unsigned char *>(const_cast<void *>(bottom));
}

#else

constexpr bool ASAN = false;

inline void poison(void *, size_t) {}
inline void unpoison(void *, size_t) {}
inline void start_switch(void *&, unsigned char *, size_t) {}
inline void finish_switch(void *, unsigned char *&, size_t &) {}

#endif

// Only kernels are compiled with ThreadSanitizer: the shim itself takes turns, so nothing in it races.
#ifdef GEMMOE_SHIM_RACES

inline void *new_race_state() { return __tsan_create_fiber(0); }
inline void *race_state() { return __tsan_get_current_fiber(); }
// Just before a switch, which does not count as waiting.
inline void take_race_state(void *state) { __tsan_switch_to_fiber(state, __tsan_switch_to_fiber_no_sync); }
// What was done before `arrive` is seen after `depart`.
inline void arrive(void *meeting) { __tsan_release(meeting); }
inline void depart(void *meeting) { __tsan_acquire(meeting); }

#else

inline void *new_race_state() { return nullptr; }
inline void *race_state() { return nullptr; }
inline void take_race_state(void *) {}
inline void arrive(void *) {}
inline void depart(void *) {}

#endif

}  // namespace shim
