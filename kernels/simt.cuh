// The one way from a kernel to the machine it runs on. The same text of a kernel is compiled by NVRTC for a GPU and by a C++
// compiler for the CPU: each side of this header implements the same names (shim/simt_host.hpp documents them), and
// kernels use no built-in of CUDA past them.

#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "simt/device.cuh"
#else
#include "shim/simt_host.hpp"
#endif

#include "arguments.h"
