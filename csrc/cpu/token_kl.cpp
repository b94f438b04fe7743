// Entry points of token_kl on a CPU.
#include "../abi.h"
#include "token_kl_rows.h"

namespace {

using fastalign::KLRows;

int32_t run(const KLRows& rows, int32_t num_threads, int32_t isa) {
    if (rows.dtype < 0 || rows.dtype > 2 || rows.reference_dtype < 0 || rows.reference_dtype > 2)
        return 2;
    auto* const function = FASTALIGN_CHOOSE(isa, run_token_kl);
    if (function == nullptr) return 1;
    fastalign::for_each_span(rows.num_rows, 2 * rows.num_columns, num_threads,
                             [&](int64_t first, int64_t last) { function(rows, first, last); });
    return 0;
}

}  // namespace

int32_t fastalign_token_kl_forward_cpu(const void* logits, int32_t dtype, int64_t row_stride,
                                       const void* reference, int32_t reference_dtype,
                                       int64_t reference_stride, int64_t num_rows,
                                       int64_t num_columns, float softcap, int32_t over_reference,
                                       const float* temperature, const uint8_t* ignored, float* kl,
                                       float* maximum, float* log_total, float* reference_maximum,
                                       float* reference_log_total, int32_t num_threads,
                                       int32_t isa) {
    const KLRows rows = {logits,
                         reference,
                         dtype,
                         reference_dtype,
                         num_rows,
                         num_columns,
                         row_stride,
                         reference_stride,
                         softcap,
                         over_reference,
                         temperature,
                         ignored,
                         kl,
                         maximum,
                         log_total,
                         reference_maximum,
                         reference_log_total,
                         nullptr,
                         nullptr};
    return run(rows, num_threads, isa);
}

int32_t fastalign_token_kl_backward_cpu(const void* logits, int32_t dtype, int64_t row_stride,
                                        const void* reference, int32_t reference_dtype,
                                        int64_t reference_stride, int64_t num_rows,
                                        int64_t num_columns, float softcap, int32_t over_reference,
                                        const float* temperature, const uint8_t* ignored,
                                        const float* kl, const float* maximum,
                                        const float* log_total, const float* reference_maximum,
                                        const float* reference_log_total, const float* grad_kl,
                                        void* gradient, int32_t num_threads, int32_t isa) {
    const KLRows rows = {logits,
                         reference,
                         dtype,
                         reference_dtype,
                         num_rows,
                         num_columns,
                         row_stride,
                         reference_stride,
                         softcap,
                         over_reference,
                         temperature,
                         ignored,
                         const_cast<float*>(kl),
                         const_cast<float*>(maximum),
                         const_cast<float*>(log_total),
                         const_cast<float*>(reference_maximum),
                         const_cast<float*>(reference_log_total),
                         grad_kl,
                         gradient};
    return run(rows, num_threads, isa);
}
