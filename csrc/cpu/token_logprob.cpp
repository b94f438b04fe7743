// Entry points of token_logprob on a CPU.
#include "../abi.h"
#include "token_logprob_rows.h"

namespace {

using fastalign::Rows;

int32_t run(const Rows& rows, int32_t num_threads, int32_t isa) {
    if (rows.dtype < 0 || rows.dtype > 2) return 2;
    auto* const function = FASTALIGN_CHOOSE(isa, run_token_logprob);
    if (function == nullptr) return 1;
    fastalign::for_each_span(rows.num_rows, rows.num_columns, num_threads,
                             [&](int64_t first, int64_t last) { function(rows, first, last); });
    return 0;
}

}  // namespace

int32_t fastalign_abi_version(void) { return FASTALIGN_ABI_VERSION; }

int32_t fastalign_cpu_isa_usable(int32_t isa) { return fastalign::isa_usable(isa); }

int32_t fastalign_token_logprob_forward_cpu(const void* logits, int32_t dtype, int64_t num_rows,
                                            int64_t num_columns, int64_t row_stride, float softcap,
                                            int64_t ignore_index, const int64_t* targets,
                                            const float* temperature, float* logprob,
                                            float* entropy, float* maximum, float* log_total,
                                            int32_t num_threads, int32_t isa) {
    const Rows rows = {logits,       dtype,   num_rows,    num_columns, row_stride, softcap,
                       ignore_index, targets, temperature, logprob,     entropy,    maximum,
                       log_total,    nullptr, nullptr,     nullptr};
    return run(rows, num_threads, isa);
}

int32_t fastalign_token_logprob_backward_cpu(const void* logits, int32_t dtype, int64_t num_rows,
                                             int64_t num_columns, int64_t row_stride, float softcap,
                                             int64_t ignore_index, const int64_t* targets,
                                             const float* temperature, const float* logprob,
                                             const float* entropy, const float* maximum,
                                             const float* log_total, const float* grad_logprob,
                                             const float* grad_entropy, void* gradient,
                                             int32_t num_threads, int32_t isa) {
    const Rows rows = {logits,
                       dtype,
                       num_rows,
                       num_columns,
                       row_stride,
                       softcap,
                       ignore_index,
                       targets,
                       temperature,
                       const_cast<float*>(logprob),
                       const_cast<float*>(entropy),
                       const_cast<float*>(maximum),
                       const_cast<float*>(log_total),
                       grad_logprob,
                       grad_entropy,
                       gradient};
    return run(rows, num_threads, isa);
}
