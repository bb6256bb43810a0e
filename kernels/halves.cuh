// Numbers of sixteen bits for tensor cores.

#pragma once

#include "simt.cuh"

DEVICE uint16_t to_half(float value, uint32_t is_f16) { return is_f16 ? float_to_f16(value) : float_to_bf16(value); }
