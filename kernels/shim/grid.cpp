// A block at a time, its threads as fibers. A warp runs lane by lane until each lane waits or has ended; when all wait for each
// other they go on, and when every warp is at a barrier or has ended, the barrier opens.

#include "grid.hpp"

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <vector>

#include "fibers.hpp"
#include "sanitizers.hpp"

namespace shim {

Running running;

namespace {

constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t MAX_WARPS = MAX_THREADS / WARP;
// More than any device has, with room for what lies between the arrays.
constexpr size_t ARENA_BYTES = 512 << 10;
constexpr size_t RED_ZONE = 64;
constexpr int LAUNCH_FAILED = 719;

enum class State : uint8_t { fresh, ready, meets, at_barrier, ended };

struct Thread {
    Fiber fiber;
    bool has_stack;
    // Its fiber waits at the end of a kernel for the next one; else it has to be prepared.
    bool is_idle;
    State state;
    Meeting meeting;
    // Under way, in the order they were begun.
    std::deque<Copy> copies;
};

struct Warp {
    // By turns: a lane may hand in the next value before another has read this one.
    uint64_t values[2][WARP];
    uint32_t meetings;
    // Every lane has ended or is at the barrier.
    bool is_parked;
};

Thread threads[MAX_THREADS];
Warp warps[MAX_WARPS];
alignas(64) unsigned char arena[ARENA_BYTES];

// The block that runs.
const Launch *current;
uint64_t block_number;
// All of it, so that the first block finds it clean too.
size_t arena_used = ARENA_BYTES;
size_t shared_bytes;
Outcome outcome;
uint64_t barriers;

// What ThreadSanitizer knows meetings by. Two of a kind by turns: who comes to the next one early has not met, in this one,
// those who still are to leave it.
char block_begins, block_ends, barrier_places[2];

Order order = Order::forward;
uint64_t random_state = 1;

// xorshift64*
uint32_t random_below(uint32_t bound) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return uint32_t((random_state * 0x2545f4914f6cdd1d >> 32) * bound >> 32);
}

const char *name(Meeting meeting) {
    switch (meeting) {
        case Meeting::shuffle: return "in a shuffle";
        case Meeting::ballot: return "in a ballot";
        case Meeting::mma: return "in an mma";
        case Meeting::load_matrices: return "in a load of matrices";
        case Meeting::warp_barrier: return "at a barrier of its warp";
    }
    return "";
}

std::string where(const Thread &thread) {
    if (thread.state == State::meets) return name(thread.meeting);
    return thread.state == State::at_barrier ? "at a barrier" : "at its end";
}

void fail(int status, uint32_t thread, const std::string &why) {
    const uint32_t *block = running.block;
    std::string place = std::to_string(block[0]) + ", " + std::to_string(block[1]) + ", " + std::to_string(block[2]);
    outcome.status = status;
    outcome.why = std::string("kernel ") + current->kernel->name + ", block (" + place + "), thread " +
                  std::to_string(thread) + ": " + why;
}

void body() {
    for (;;) {
        depart(&block_begins);
        current->kernel->run(current->arguments);
        arrive(&block_ends);
        Thread &thread = threads[running.thread];
        if (!thread.copies.empty()) fail(LAUNCH_FAILED, running.thread, "ends before its copies");
        thread.state = State::ended;
        thread.is_idle = true;
        leave(thread.fiber);
    }
}

// Runs each lane until it waits or ends.
void run_lanes(uint32_t warp) {
    uint8_t lanes[WARP];
    std::iota(lanes, lanes + WARP, 0);
    if (order == Order::reverse) std::reverse(lanes, lanes + WARP);
    if (order == Order::random) {
        for (uint32_t left = WARP; left > 1; left--) std::swap(lanes[left - 1], lanes[random_below(left)]);
    }
    for (uint8_t lane : lanes) {
        Thread &thread = threads[warp * WARP + lane];
        if (thread.state == State::fresh) {
            if (!thread.is_idle) prepare(thread.fiber, body);
            thread.is_idle = false;
            thread.state = State::ready;
        }
        if (thread.state != State::ready) continue;
        running.thread = warp * WARP + lane;
        enter(thread.fiber);
        if (outcome.status != 0) return;
    }
}

// All lanes have stopped: those that meet go on, or the warp is parked.
void open_meeting(uint32_t number) {
    Warp &warp = warps[number];
    Thread *lanes = &threads[number * WARP];
    Thread *meets = std::find_if(lanes, lanes + WARP, [](const Thread &lane) { return lane.state == State::meets; });
    if (meets == lanes + WARP) {
        warp.is_parked = true;
        return;
    }
    for (Thread *lane = lanes; lane < lanes + WARP; lane++) {
        if (lane->state != State::meets || lane->meeting != meets->meeting) {
            std::string other = "while thread " + std::to_string(lane - threads) + " of its warp is " + where(*lane);
            return fail(LAUNCH_FAILED, uint32_t(meets - threads), "waits " + where(*meets) + " " + other);
        }
    }
    for (Thread *lane = lanes; lane < lanes + WARP; lane++) lane->state = State::ready;
    warp.meetings++;
}

// Runs every warp until it is parked. In random order, warps take turns wherever their lanes meet.
void run_warps(uint32_t count) {
    uint32_t left = count;
    uint32_t live[MAX_WARPS];
    std::iota(live, live + count, 0);
    while (left > 0) {
        uint32_t chosen = order == Order::forward ? 0 : order == Order::reverse ? left - 1 : random_below(left);
        uint32_t warp = live[chosen];
        run_lanes(warp);
        if (outcome.status == 0) open_meeting(warp);
        if (outcome.status != 0) return;
        if (!warps[warp].is_parked) continue;
        std::copy(live + chosen + 1, live + left, live + chosen);
        left--;
    }
}

void run_block(uint32_t count) {
    block_number++;
    unpoison(arena, arena_used);
    memset(arena, 0xff, arena_used);
    poison(arena, arena_used);
    arena_used = 0;
    shared_bytes = 0;
    for (uint32_t thread = 0; thread < count; thread++) {
        threads[thread].state = State::fresh;
        // Those of a launch that failed.
        threads[thread].copies.clear();
    }
    arrive(&block_begins);
    bool at_barrier;
    do {
        for (uint32_t warp = 0; warp < count / WARP; warp++) warps[warp].is_parked = false;
        run_warps(count / WARP);
        if (outcome.status != 0) return;
        barriers++;
        at_barrier = false;
        for (uint32_t thread = 0; thread < count; thread++) {
            if (threads[thread].state != State::at_barrier) continue;
            threads[thread].state = State::ready;
            at_barrier = true;
        }
    } while (at_barrier);
    depart(&block_ends);
}

// The `step`-th of the blocks to run, of `count`.
struct BlockOrder {
    uint64_t count, stride, first;

    explicit BlockOrder(uint64_t count) : count(count), stride(1), first(0) {
        if (order == Order::reverse) stride = count - 1, first = count - 1;
        if (order == Order::random) {
            // Any stride without a common divisor comes past every block once.
            first = random_below(uint32_t(std::min<uint64_t>(count, UINT32_MAX)));
            do stride = 1 + random_below(uint32_t(std::min<uint64_t>(count, 1 << 16)));
            while (std::gcd(stride, count) != 1 || (stride == 1 && count > 2));
        }
    }

    uint64_t at(uint64_t step) const { return (first + step * stride) % count; }
};

}  // namespace

void set_order(Order new_order, uint64_t seed) {
    order = new_order;
    // A state of zero would stay zero.
    random_state = seed * 0x9e3779b97f4a7c15 | 1;
}

Outcome run(const Launch &launch) {
    uint32_t count = launch.kernel->threads;
    for (uint32_t thread = 0; thread < count; thread++) {
        if (threads[thread].has_stack) continue;
        if (!allocate(threads[thread].fiber, thread)) return {2, "no memory for the stacks of a block"};
        threads[thread].has_stack = true;
    }
    current = &launch;
    outcome = {0, ""};
    std::copy(launch.grid, launch.grid + 3, running.grid);
    BlockOrder blocks(uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
    for (uint64_t step = 0; step < blocks.count && outcome.status == 0; step++) {
        uint64_t block = blocks.at(step);
        running.block[0] = uint32_t(block % launch.grid[0]);
        running.block[1] = uint32_t(block / launch.grid[0] % launch.grid[1]);
        running.block[2] = uint32_t(block / launch.grid[0] / launch.grid[1]);
        run_block(count);
    }
    return outcome;
}

const uint64_t *meet(Meeting meeting, uint64_t value) {
    Thread &thread = threads[running.thread];
    Warp &warp = warps[running.thread / WARP];
    uint64_t *values = warp.values[warp.meetings % 2];
    values[running.thread % WARP] = value;
    thread.state = State::meets;
    thread.meeting = meeting;
    arrive(values);
    leave(thread.fiber);
    depart(values);
    return values;
}

void wait_for_block() {
    Thread &thread = threads[running.thread];
    thread.state = State::at_barrier;
    char *place = &barrier_places[barriers % 2];
    arrive(place);
    leave(thread.fiber);
    depart(place);
}

void begin_copy(const Copy &copy) { threads[running.thread].copies.push_back(copy); }

bool take_copy(Copy &copy) {
    std::deque<Copy> &copies = threads[running.thread].copies;
    if (copies.empty()) return false;
    copy = copies.front();
    copies.pop_front();
    return true;
}

void *shared_array(Site &site, size_t bytes, size_t alignment) {
    if (site.block == block_number) return site.array;
    shared_bytes = (shared_bytes + alignment - 1) / alignment * alignment + bytes;
    if (shared_bytes > current->shared_limit) {
        stop(LAUNCH_FAILED, "more shared memory than a block may have");
    }
    // Off the boundary above its own, for whoever relies on more than the type promises.
    size_t begin = (arena_used + RED_ZONE - 1) / RED_ZONE * RED_ZONE + RED_ZONE;
    if (alignment < 16) begin += alignment;
    if (begin + bytes + RED_ZONE > ARENA_BYTES) stop(LAUNCH_FAILED, "too many shared arrays");
    unpoison(arena + begin, bytes);
    arena_used = begin + bytes;
    site = {block_number, arena + begin};
    return site.array;
}

void stop(int status, const char *why) {
    fail(status, running.thread, why);
    // The scheduler does not come back to a launch that failed.
    leave(threads[running.thread].fiber);
    __builtin_trap();
}

static const Kernel *kernels;

Kernel::Kernel(const char *name, size_t argument_bytes, uint32_t threads, void (*run)(const void *))
    : name(name), argument_bytes(argument_bytes), threads(threads), run(run), next(kernels) {
    kernels = this;
}

const Kernel *find_kernel(const char *name) {
    for (const Kernel *kernel = kernels; kernel != nullptr; kernel = kernel->next) {
        if (strcmp(kernel->name, name) == 0) return kernel;
    }
    return nullptr;
}

}  // namespace shim
