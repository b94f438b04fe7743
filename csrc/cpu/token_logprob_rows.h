// What the rows of token_logprob work on, and their entry point for each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

struct Rows {
    const void* logits;
    int32_t dtype;
    int64_t num_rows, num_columns, row_stride;
    float softcap;
    int64_t ignore_index;
    const int64_t* targets;
    const float* temperature;
    float *logprob, *entropy, *maximum, *log_total;  // written forward, read backward
    // NULL in the forward
    const float *grad_logprob, *grad_entropy;
    void* gradient;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_token_logprob, (const Rows& rows, int64_t first, int64_t last))
