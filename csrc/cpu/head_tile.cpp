// Entry point of head_tile on a CPU.
#include "../abi.h"
#include "head_tile_rows.h"

int32_t fastalign_head_tile_cpu(float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                                float softcap, float logit_scale, const float* temperature,
                                const int64_t* targets, const uint8_t* ignored, float* logprob,
                                float* entropy, uint8_t* is_argmax, void* gradient,
                                int32_t gradient_dtype, int64_t gradient_stride,
                                const float* grad_logprob, const float* grad_entropy,
                                int32_t num_threads, int32_t isa) {
    if (gradient_dtype < 0 || gradient_dtype > 1) return 2;
    const fastalign::HeadTile tile = {
        x,           num_rows,       num_columns,     row_stride,   softcap,     logit_scale,
        temperature, targets,        ignored,         logprob,      entropy,     is_argmax,
        gradient,    gradient_dtype, gradient_stride, grad_logprob, grad_entropy};
    auto* const function = FASTALIGN_CHOOSE(isa, run_head_tile);
    if (function == nullptr) return 1;
    fastalign::for_each_span(num_rows, num_columns, num_threads,
                             [&](int64_t first, int64_t last) { function(tile, first, last); });
    return 0;
}
