// Entry points of token_logprob on a CPU: chooses the instruction set at run time and shares the
// rows among threads.
#include <algorithm>
#include <functional>
#include <thread>
#include <vector>

#include "../abi.h"
#include "token_logprob_rows.h"

namespace {

using fastalign::Rows;
typedef int (*RunRows)(const Rows&, int64_t, int64_t);

// Fewer elements than this a thread are done sooner than the thread has started.
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 16;

RunRows run_rows_of(int32_t isa) {
    switch (isa) {
        case 0:
            return fastalign::portable::run_rows;
#ifdef FASTALIGN_X86
        case 1:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                       ? fastalign::avx2::run_rows
                       : nullptr;
        case 2:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                       ? fastalign::avx512::run_rows
                       : nullptr;
#endif
        default:
            return nullptr;
    }
}

int32_t run(const Rows& rows, int32_t num_threads, int32_t isa) {
    if (rows.dtype < 0 || rows.dtype > 2) return 2;
    RunRows function = run_rows_of(isa);
    for (int32_t best = 2; isa == -1 && function == nullptr; --best) function = run_rows_of(best);
    if (function == nullptr) return 1;
    const int64_t worth = rows.num_rows * rows.num_columns / MIN_ELEMENTS_PER_THREAD;
    const int64_t count =
        std::max<int64_t>(1, std::min<int64_t>({num_threads, worth, rows.num_rows}));
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < count; ++i) {
        threads.emplace_back(function, std::cref(rows), rows.num_rows * i / count,
                             rows.num_rows * (i + 1) / count);
    }
    function(rows, 0, rows.num_rows / count);
    for (auto& thread : threads) thread.join();
    return 0;
}

}  // namespace

int32_t fastalign_abi_version(void) { return FASTALIGN_ABI_VERSION; }

int32_t fastalign_cpu_isa_usable(int32_t isa) { return run_rows_of(isa) != nullptr; }

int32_t fastalign_token_logprob_forward_cpu(const void* logits, int32_t dtype, int64_t num_rows,
                                            int64_t num_columns, int64_t row_stride, float softcap,
                                            int64_t ignore_index, const int64_t* targets,
                                            const float* temperature, float* logprob,
                                            float* entropy, float* logsumexp, int32_t num_threads,
                                            int32_t isa) {
    const Rows rows = {logits,       dtype,   num_rows,    num_columns, row_stride, softcap,
                       ignore_index, targets, temperature, logprob,     entropy,    logsumexp,
                       nullptr,      nullptr, nullptr,     nullptr,     nullptr};
    return run(rows, num_threads, isa);
}

int32_t fastalign_token_logprob_backward_cpu(const void* logits, int32_t dtype, int64_t num_rows,
                                             int64_t num_columns, int64_t row_stride, float softcap,
                                             int64_t ignore_index, const int64_t* targets,
                                             const float* temperature, const float* logsumexp,
                                             const float* entropy, const float* grad_logprob,
                                             const float* grad_entropy, void* gradient,
                                             int32_t num_threads, int32_t isa) {
    const Rows rows = {logits,       dtype,   num_rows,     num_columns,  row_stride, softcap,
                       ignore_index, targets, temperature,  nullptr,      nullptr,    nullptr,
                       logsumexp,    entropy, grad_logprob, grad_entropy, gradient};
    return run(rows, num_threads, isa);
}
