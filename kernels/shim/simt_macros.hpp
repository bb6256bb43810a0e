// How the functions and arrays of kernels are declared.

#pragma once

// Inlined always, as on the device: functions of one name in two files would otherwise become one.
#define DEVICE inline __attribute__((always_inline))

// Before a loop: nothing here.
#define UNROLL

// KERNEL(norm, NormArguments, 256) { ... arguments.x ... }: a kernel of blocks of 256 threads, to be launched by its name with
// one NormArguments.
#define KERNEL(name, Arguments, threads_of_block)                                                                      \
    static_assert((threads_of_block) % shim::WARP == 0 && (threads_of_block) <= 1024, "whole warps, 1024 at most");    \
    static void kernel_##name(const Arguments &arguments);                                                             \
    static const shim::Kernel registered_##name(                                                                       \
        #name, sizeof(Arguments), threads_of_block,                                                                    \
        [](const void *arguments) {                                                                                    \
            let_next_grid_begin();                                                                                     \
            wait_for_grid_before();                                                                                    \
            kernel_##name(*static_cast<const Arguments *>(arguments));                                                 \
        });                                                                                                            \
    static void kernel_##name([[maybe_unused]] const Arguments &arguments)

// SHARED(float, sums, 8); in a kernel or a DEVICE function: an array that the threads of a block share, all bits set when the
// block begins. It is aligned as its type and no better: a float's array cannot be read sixteen bytes at a time.
#define SHARED(type, name, count)                                                                                      \
    static shim::Site site_of_##name;                                                                                  \
    [[maybe_unused]] type(&name)[count] =                                                                              \
        *static_cast<type(*)[count]>(shim::shared_array(site_of_##name, sizeof(type[count]), alignof(type)))
