// Functions that can be left in the middle and taken up again, each on a stack of its own.

#pragma once

#include <cstddef>

namespace shim {

struct Fiber {
    // Where it was left.
    void *position;
    unsigned char *stack;
    size_t stack_bytes;
    // AddressSanitizer's, when it keeps locals elsewhere.
    void *fake_stack;
    // ThreadSanitizer's: what this fiber has seen of the others.
    void *race_state;
};

// A fiber with a stack, which is never given back: the `number`-th of a pool. Null where there is no memory for one.
bool allocate(Fiber &fiber, size_t number);

// The next `enter` calls `body`, which never returns. Whatever the fiber was doing is dropped.
void prepare(Fiber &fiber, void (*body)());

// Goes on in the fiber until it leaves.
void enter(Fiber &fiber);

// Goes back to whoever entered this fiber.
void leave(Fiber &fiber);

}  // namespace shim
