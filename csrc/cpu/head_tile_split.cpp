// Entry points of head_tile_statistics and head_tile_gradient on a CPU.
#include "../abi.h"
#include "head_tile_split_rows.h"

int32_t fastalign_head_tile_statistics_cpu(const float* x, int64_t num_rows, int64_t num_columns,
                                           int64_t row_stride, float softcap, float logit_scale,
                                           const float* temperature, const int64_t* targets,
                                           const uint8_t* ignored, float* maximum, float* total,
                                           float* weighted, float* target_u, int32_t num_threads,
                                           int32_t isa) {
    const fastalign::SplitTile tile = {const_cast<float*>(x), num_columns, row_stride, softcap,
                                       logit_scale,           temperature, targets,    ignored};
    const fastalign::TileStatistics found = {maximum, total, weighted, target_u};
    auto* const function = FASTALIGN_CHOOSE(isa, run_head_tile_statistics);
    if (function == nullptr) return 1;
    fastalign::for_each_span(num_rows, num_columns, num_threads, [&](int64_t first, int64_t last) {
        function(tile, found, first, last);
    });
    return 0;
}

int32_t fastalign_head_tile_gradient_cpu(
    float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    const float* maximum, const float* log_total, const float* entropy, void* gradient,
    int32_t gradient_dtype, int64_t gradient_stride, const float* grad_logprob,
    const float* grad_entropy, int32_t num_threads, int32_t isa) {
    if (gradient_dtype < 0 || gradient_dtype > 1) return 2;
    const fastalign::SplitTile tile = {x,           num_columns, row_stride, softcap,
                                       logit_scale, temperature, targets,    ignored};
    const fastalign::TileGradient wanted = {maximum,      log_total,      entropy,
                                            gradient,     gradient_dtype, gradient_stride,
                                            grad_logprob, grad_entropy};
    auto* const function = FASTALIGN_CHOOSE(isa, run_head_tile_gradient);
    if (function == nullptr) return 1;
    fastalign::for_each_span(num_rows, num_columns, num_threads, [&](int64_t first, int64_t last) {
        function(tile, wanted, first, last);
    });
    return 0;
}
