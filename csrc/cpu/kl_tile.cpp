// Entry point of kl_tile on a CPU.
#include "../abi.h"
#include "kl_tile_rows.h"

int32_t fastalign_kl_tile_cpu(float* policy, float* reference, int64_t num_rows,
                              int64_t num_columns, int64_t row_stride, float softcap,
                              float logit_scale, int32_t over_reference, const float* temperature,
                              const int64_t* targets, const uint8_t* ignored, float* logprob,
                              float* reference_logprob, float* entropy, float* kl, void* gradient,
                              void* kl_gradient, int32_t gradient_dtype, int64_t gradient_stride,
                              const float* grad_logprob, const float* grad_entropy,
                              const float* grad_kl, int32_t num_threads, int32_t isa) {
    if (gradient_dtype < 0 || gradient_dtype > 1) return 2;
    const fastalign::KLTile tile = {
        policy,       reference,   num_rows,          num_columns,     row_stride,
        softcap,      logit_scale, over_reference,    temperature,     targets,
        ignored,      logprob,     reference_logprob, entropy,         kl,
        gradient,     kl_gradient, gradient_dtype,    gradient_stride, grad_logprob,
        grad_entropy, grad_kl};
    auto* const function = FASTALIGN_CHOOSE(isa, run_kl_tile);
    if (function == nullptr) return 1;
    fastalign::for_each_span(num_rows, 2 * num_columns, num_threads,
                             [&](int64_t first, int64_t last) { function(tile, first, last); });
    return 0;
}
