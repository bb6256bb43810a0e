// A switch saves the registers that a call preserves on the stack that is left and takes those of the other: some twenty
// instructions on x86-64 and AArch64, and ucontext elsewhere (or with GEMMOE_SHIM_UCONTEXT), which also asks the system.
//
// The floating-point modes are left alone: no kernel changes them.

#include "fibers.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "sanitizers.hpp"

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(GEMMOE_SHIM_UCONTEXT)
#define GEMMOE_SHIM_UCONTEXT
#endif

#ifdef GEMMOE_SHIM_UCONTEXT
#include <ucontext.h>

#include <new>
#endif

namespace shim {

namespace {

// The sanitizers' frames are several times as large.
constexpr size_t STACK_BYTES = ASAN ? 512 << 10 : 64 << 10;

// Whoever entered the fiber that runs.
Fiber outside;

}  // namespace

bool allocate(Fiber &fiber, size_t number) {
    // Below each stack is a page that faults.
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    void *memory = mmap(nullptr, page + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return false;
    if (mprotect(memory, page, PROT_NONE) != 0) return false;
    fiber.stack = static_cast<unsigned char *>(memory) + page;
    // Tops that differ in their low bits, or all fibers of a block would meet in the same few lines of the first cache.
    fiber.stack_bytes = STACK_BYTES - number % 16 * 256;
    fiber.race_state = new_race_state();
    return true;
}

#ifdef GEMMOE_SHIM_UCONTEXT

static void switch_to(Fiber &from, Fiber &to) {
    if (from.position == nullptr) from.position = new ucontext_t;
    swapcontext(static_cast<ucontext_t *>(from.position), static_cast<ucontext_t *>(to.position));
}

static void set_start(Fiber &fiber, void (*begin)()) {
    if (fiber.position == nullptr) fiber.position = new ucontext_t;
    auto *context = static_cast<ucontext_t *>(fiber.position);
    getcontext(context);
    context->uc_stack.ss_sp = fiber.stack;
    context->uc_stack.ss_size = fiber.stack_bytes;
    context->uc_link = nullptr;
    makecontext(context, begin, 0);
}

#else

// Saves the registers, `*left = sp`, `sp = entered`, takes the registers from there.
extern "C" void gemmoe_shim_switch(void **left, void *entered);

#if defined(__x86_64__)

// A jump, since a return to where nothing was called from is always predicted wrong: three times as slow.
asm(R"(
.text
.hidden gemmoe_shim_switch
.globl gemmoe_shim_switch
.type gemmoe_shim_switch, @function
gemmoe_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size gemmoe_shim_switch, . - gemmoe_shim_switch
)");

// Six registers, then the address that the switch returns to; above it an empty place for the caller's, as after a call.
constexpr size_t FRAME_WORDS = 8, BEGIN_WORD = 6;

#else

asm(R"(
.text
.hidden gemmoe_shim_switch
.globl gemmoe_shim_switch
.type gemmoe_shim_switch, %function
gemmoe_shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size gemmoe_shim_switch, . - gemmoe_shim_switch
)");

// Twenty registers; the link register, which the switch returns to, is x30.
constexpr size_t FRAME_WORDS = 20, BEGIN_WORD = 11;

#endif

static void switch_to(Fiber &from, Fiber &to) { gemmoe_shim_switch(&from.position, to.position); }

static void set_start(Fiber &fiber, void (*begin)()) {
    auto *frame = reinterpret_cast<uintptr_t *>(fiber.stack + fiber.stack_bytes) - FRAME_WORDS;
    for (size_t word = 0; word < FRAME_WORDS; word++) frame[word] = 0;
    frame[BEGIN_WORD] = reinterpret_cast<uintptr_t>(begin);
    fiber.position = frame;
}

#endif

// What the next fiber that begins is to run.
static void (*next_body)();

static void begin() {
    finish_switch(nullptr, outside.stack, outside.stack_bytes);
    next_body();
    __builtin_trap();
}

void prepare(Fiber &fiber, void (*body)()) {
    // Frames that were dropped have left their marks.
    unpoison(fiber.stack, fiber.stack_bytes);
    fiber.fake_stack = nullptr;
    next_body = body;
    set_start(fiber, begin);
}

void enter(Fiber &fiber) {
    outside.race_state = race_state();
    start_switch(outside.fake_stack, fiber.stack, fiber.stack_bytes);
    take_race_state(fiber.race_state);
    switch_to(outside, fiber);
    unsigned char *stack;
    size_t stack_bytes;
    finish_switch(outside.fake_stack, stack, stack_bytes);
}

void leave(Fiber &fiber) {
    start_switch(fiber.fake_stack, outside.stack, outside.stack_bytes);
    take_race_state(outside.race_state);
    switch_to(fiber, outside);
    finish_switch(fiber.fake_stack, outside.stack, outside.stack_bytes);
}

}  // namespace shim
