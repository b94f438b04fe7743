// What the kernels of a model's layers work on, and their entry points for each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

// Rows whose part of a weight's gradient is added up before it is written: the blocks, and with
// them the order of the additions, do not depend on the number of threads.
constexpr int64_t NORM_BLOCK = 64;

struct NormRows {
    const float *x, *weight;
    float offset, epsilon;
    int64_t num_rows, num_columns;
    float* output;  // the backward's: the gradient of x
    float* scale;   // written forward, read backward
    // NULL in the forward
    const float* gradient;
    float* partial;  // (blocks, num_columns), or NULL: the weight has no gradient
};

struct GateElements {
    const void *gate, *up;
    int32_t dtype, activation;
    void* output;  // NULL in the backward
    // NULL in the forward
    const void* gradient;
    void *grad_gate, *grad_up;
};

struct RotaryRows {
    const void* x;
    int32_t dtype, output_dtype;
    const float *cos, *sin;
    int64_t num_heads, head_dim;
    int32_t transposed;
    void* output;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_rms_norm, (const NormRows& rows, int64_t first, int64_t last))
FASTALIGN_DECLARE(void, run_rms_norm_backward, (const NormRows& rows, int64_t first, int64_t last))
FASTALIGN_DECLARE(void, run_gated_activation,
                  (const GateElements& elements, int64_t first, int64_t last))
FASTALIGN_DECLARE(void, run_rotary, (const RotaryRows& rows, int64_t first, int64_t last))
