// Copies to shared memory that go on while their thread does (cp.async): what is copied is there after the thread's
// next wait, for itself, and for the others after a barrier too. Until then its place is not a number here, and a
// thread that touches it is a race. A kernel that ends before its copies have is stopped.

#pragma once

#include <cstdint>
#include <cstring>

#include "block.hpp"
#include "simt_macros.hpp"

// BYTES bytes, 4, 8 or 16, on a boundary of as many on both sides; zeros where they are not wanted: nothing is read
// then.
template <uint32_t BYTES>
DEVICE void copy_async(void *to, const void *from, bool wanted) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "4, 8 or 16 bytes");
    if (reinterpret_cast<uintptr_t>(to) % BYTES != 0) shim::stop(716, "copy_async: to no boundary of its size");
    if (wanted && reinterpret_cast<uintptr_t>(from) % BYTES != 0) shim::stop(716, "copy_async: from no boundary");
    memset(to, 0xff, BYTES);
    shim::begin_copy({to, wanted ? from : nullptr, BYTES});
}

DEVICE void wait_for_copies() {
    shim::Copy copy;
    while (shim::take_copy(copy)) {
        auto *to = static_cast<unsigned char *>(copy.to);
        const auto *from = static_cast<const unsigned char *>(copy.from);
        // Byte by byte, so that sanitizers see the kernel do it.
        for (uint32_t i = 0; i < copy.bytes; i++) to[i] = from == nullptr ? 0 : from[i];
    }
}
