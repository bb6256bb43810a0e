// The part of the CUDA driver API that the shim has: its types, its statuses. Every function is in the file of its subject.

#pragma once

#include <cstddef>
#include <cstdint>

// Everything else is hidden.
#define API extern "C" __attribute__((visibility("default")))

namespace shim {
struct Context;
struct Module;
struct Function;
struct Stream;
struct Event;
struct Graph;
struct GraphExec;
}  // namespace shim

using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = shim::Context *;
using CUmodule = shim::Module *;
using CUfunction = shim::Function *;
using CUstream = shim::Stream *;
using CUevent = shim::Event *;
using CUgraph = shim::Graph *;
using CUgraphExec = shim::GraphExec *;

struct CUuuid {
    char bytes[16];
};

constexpr unsigned PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct CUlaunchAttribute {
    unsigned id, padding;
    union {
        int number;
        char bytes[64];
    } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72, "as NVIDIA has it");

struct CUlaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    CUstream stream;
    const CUlaunchAttribute *attributes;
    unsigned attribute_count;
};
static_assert(sizeof(CUlaunchConfig) == 56, "as NVIDIA has it");

// With NVIDIA's numbers; `errors.cpp` has their names.
enum CUresult : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    ECC_UNCORRECTABLE = 214,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_TIMEOUT = 702,
    HARDWARE_STACK_ERROR = 714,
    ILLEGAL_INSTRUCTION = 715,
    MISALIGNED_ADDRESS = 716,
    INVALID_ADDRESS_SPACE = 717,
    INVALID_PC = 718,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNMATCHED = 903,
    STREAM_CAPTURE_WRONG_THREAD = 908,
    UNKNOWN = 999,
};
