// Runs a kernel over a grid.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "block.hpp"

namespace shim {

// In which order lanes, warps and blocks run where nothing makes one wait for another. Results must not depend on it.
enum class Order { forward, reverse, random };

struct Launch {
    const Kernel *kernel;
    const void *arguments;
    uint32_t grid[3];
    // Bytes of shared memory a block may have.
    size_t shared_limit;
};

// How the driver's status came about; 0 and nothing where all went well.
struct Outcome {
    int status;
    std::string why;
};

void set_order(Order order, uint64_t seed);

Outcome run(const Launch &launch);

}  // namespace shim
