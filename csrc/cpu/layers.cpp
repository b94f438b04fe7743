// Entry points of the kernels of a model's layers on a CPU.
#include "../abi.h"
#include "layers_rows.h"

int32_t fastalign_rms_norm_forward_cpu(const float* x, const float* weight, float offset,
                                       float epsilon, int64_t num_rows, int64_t num_columns,
                                       float* output, float* scale, int32_t num_threads,
                                       int32_t isa) {
    auto* const function = FASTALIGN_CHOOSE(isa, run_rms_norm);
    if (function == nullptr) return 1;
    const fastalign::NormRows rows = {x,           weight, offset, epsilon, num_rows,
                                      num_columns, output, scale,  nullptr, nullptr};
    fastalign::for_each_span(num_rows, num_columns, num_threads,
                             [&](int64_t first, int64_t last) { function(rows, first, last); });
    return 0;
}

int32_t fastalign_rms_norm_backward_cpu(const float* x, const float* weight, float offset,
                                        const float* scale, const float* gradient, int64_t num_rows,
                                        int64_t num_columns, float* grad_x, float* grad_weight,
                                        float* partial, int32_t num_threads, int32_t isa) {
    auto* const function = FASTALIGN_CHOOSE(isa, run_rms_norm_backward);
    if (function == nullptr) return 1;
    const fastalign::NormRows rows = {x,        weight,      offset, 0,
                                      num_rows, num_columns, grad_x, const_cast<float*>(scale),
                                      gradient, partial};
    const int64_t num_blocks = (num_rows + fastalign::NORM_BLOCK - 1) / fastalign::NORM_BLOCK;
    fastalign::for_each_span(num_blocks, fastalign::NORM_BLOCK * num_columns, num_threads,
                             [&](int64_t first, int64_t last) { function(rows, first, last); });
    if (grad_weight == nullptr) return 0;
    for (int64_t column = 0; column < num_columns; ++column) {
        double total = 0;
        for (int64_t block = 0; block < num_blocks; ++block)
            total += partial[block * num_columns + column];
        grad_weight[column] = static_cast<float>(total);
    }
    return 0;
}

namespace {

int32_t run(const fastalign::GateElements& elements, int64_t size, int32_t num_threads,
            int32_t isa) {
    if (elements.dtype < 0 || elements.dtype > 2 || elements.activation < 0 ||
        elements.activation > 1)
        return 2;
    auto* const function = FASTALIGN_CHOOSE(isa, run_gated_activation);
    if (function == nullptr) return 1;
    // Whole vectors in each span but the last.
    constexpr int64_t PIECE = 1024;
    fastalign::for_each_span((size + PIECE - 1) / PIECE, PIECE, num_threads,
                             [&](int64_t first, int64_t last) {
                                 function(elements, first * PIECE, std::min(last * PIECE, size));
                             });
    return 0;
}

}  // namespace

int32_t fastalign_gated_activation_forward_cpu(const void* gate, const void* up, int32_t dtype,
                                               int32_t activation, int64_t size, void* output,
                                               int32_t num_threads, int32_t isa) {
    return run({gate, up, dtype, activation, output, nullptr, nullptr, nullptr}, size, num_threads,
               isa);
}

int32_t fastalign_gated_activation_backward_cpu(const void* gate, const void* up, int32_t dtype,
                                                int32_t activation, int64_t size,
                                                const void* gradient, void* grad_gate,
                                                void* grad_up, int32_t num_threads, int32_t isa) {
    return run({gate, up, dtype, activation, nullptr, gradient, grad_gate, grad_up}, size,
               num_threads, isa);
}

int32_t fastalign_rotary_cpu(const void* x, int32_t dtype, const float* cos, const float* sin,
                             int64_t num_rows, int64_t num_heads, int64_t head_dim,
                             int32_t transposed, void* output, int32_t output_dtype,
                             int32_t num_threads, int32_t isa) {
    if (dtype < 0 || dtype > 1 || output_dtype < 0 || output_dtype > 1) return 2;
    auto* const function = FASTALIGN_CHOOSE(isa, run_rotary);
    if (function == nullptr) return 1;
    const fastalign::RotaryRows rows = {x,         dtype,    output_dtype, cos,   sin,
                                        num_heads, head_dim, transposed,   output};
    fastalign::for_each_span(num_rows, num_heads * head_dim, num_threads,
                             [&](int64_t first, int64_t last) { function(rows, first, last); });
    return 0;
}
