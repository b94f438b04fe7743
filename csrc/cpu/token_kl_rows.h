// What the rows of token_kl work on, and their entry point for each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

struct KLRows {
    const void *logits, *reference;
    int32_t dtype, reference_dtype;
    int64_t num_rows, num_columns, row_stride, reference_stride;
    float softcap;
    int32_t over_reference;
    const float* temperature;
    const uint8_t* ignored;
    // written forward, read backward
    float *kl, *maximum, *log_total, *reference_maximum, *reference_log_total;
    // NULL in the forward
    const float* grad_kl;
    void* gradient;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_token_kl, (const KLRows& rows, int64_t first, int64_t last))
