// What the rows of kl_tile work on, and their entry point for each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

struct KLTile {
    float *policy, *reference;
    int64_t num_rows, num_columns, row_stride;
    float softcap, logit_scale;
    int32_t over_reference;
    const float* temperature;
    const int64_t* targets;
    const uint8_t* ignored;
    float *logprob, *reference_logprob, *entropy, *kl;
    // NULL, both for brackets, or the first alone for their sum times what comes from upstream
    void *gradient, *kl_gradient;
    int32_t gradient_dtype;
    int64_t gradient_stride;
    const float *grad_logprob, *grad_entropy, *grad_kl;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_kl_tile, (const KLTile& tile, int64_t first, int64_t last))
