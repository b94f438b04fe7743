// What the rows of head_tile work on, and their entry point for each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

struct HeadTile {
    float* x;
    int64_t num_rows, num_columns, row_stride;
    float softcap, logit_scale;
    const float* temperature;
    const int64_t* targets;
    const uint8_t* ignored;
    float *logprob, *entropy;
    uint8_t* is_argmax;
    void* gradient;
    int32_t gradient_dtype;
    int64_t gradient_stride;
    const float *grad_logprob, *grad_entropy;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_head_tile, (const HeadTile& tile, int64_t first, int64_t last))
