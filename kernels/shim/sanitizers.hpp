// What AddressSanitizer is told; nothing where it is not built in.

#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
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

}  // namespace shim
