// What kernels see of the block that runs them: where it stands in the grid, the meetings of its threads, its shared memory.
//
// One launch runs at a time and its blocks one after the other, so all of this is global. driver.hpp's lock keeps it so.

#pragma once

#include <cstddef>
#include <cstdint>

namespace shim {

constexpr uint32_t WARP = 32;

// Of the thread that runs.
struct Running {
    uint32_t thread;
    uint32_t block[3];
    uint32_t grid[3];
};

extern Running running;

// What the lanes of a warp meet for. Lanes that meet for different things would hang on a GPU.
enum class Meeting : uint8_t { shuffle, ballot, mma, load_matrices, warp_barrier };

// Waits until the 32 lanes of the warp have come, each with eight bytes; those of all lanes, which stay as they are until this
// lane meets the others again.
const uint64_t *meet(Meeting meeting, uint64_t value);

// Waits until every thread of the block that has not ended has come.
void wait_for_block();

// An array in shared memory, as its declaration knows it: every thread of a block gets the same bytes.
struct Site {
    uint64_t block;
    void *array;
};

void *shared_array(Site &site, size_t bytes, size_t alignment);

// A copy that a thread has begun; zeros where it is from nowhere.
struct Copy {
    void *to;
    const void *from;
    uint32_t bytes;
};

void begin_copy(const Copy &copy);

// The oldest copy of the thread that runs, which is over then; false where there is none.
bool take_copy(Copy &copy);

// Ends the launch with a status of the driver. What the kernel was doing is dropped where it stands.
[[noreturn]] void stop(int status, const char *why);

// A kernel by name. The KERNEL macro makes one of each, before main.
struct Kernel {
    const char *name;
    size_t argument_bytes;
    uint32_t threads;
    void (*run)(const void *arguments);
    const Kernel *next;

    Kernel(const char *name, size_t argument_bytes, uint32_t threads, void (*run)(const void *));
};

const Kernel *find_kernel(const char *name);

}  // namespace shim
