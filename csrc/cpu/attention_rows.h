// What attention of packed sequences works on, and its entry point for each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

// A prompt or a response: the keys of its prompt's tokens, if it has one, precede its own.
struct AttentionSegment {
    int64_t start, length, prompt_start, prompt_length;
};

struct AttentionRows {
    const float *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;  // between tokens
    int64_t num_heads, num_key_heads, key_size, value_size;
    const AttentionSegment* segments;
    const int64_t* group_bounds;  // segments of a group have one prompt
    float scale;
    int64_t window;  // 0: none
    float* output;   // NULL in the backward
    // NULL in the forward
    const float* grad_output;
    float *grad_query, *grad_key, *grad_value;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_attention, (const AttentionRows& rows, int64_t first, int64_t last))
