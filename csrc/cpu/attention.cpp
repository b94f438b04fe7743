// Entry points of attention on a CPU.
#include "../abi.h"
#include "attention_rows.h"

namespace {

using fastalign::AttentionRows;

int32_t run(const AttentionRows& rows, int64_t num_groups, int32_t num_threads, int32_t isa) {
    auto* const function = FASTALIGN_CHOOSE(isa, run_attention);
    if (function == nullptr) return 1;
    fastalign::for_each_task(num_groups * rows.num_key_heads, num_threads,
                             [&](int64_t task) { function(rows, task, task + 1); });
    return 0;
}

}  // namespace

int32_t fastalign_attention_forward_cpu(const float* query, const float* key, const float* value,
                                        int64_t query_stride, int64_t key_stride,
                                        int64_t value_stride, int64_t num_heads,
                                        int64_t num_key_heads, int64_t key_size, int64_t value_size,
                                        const int64_t* segments, const int64_t* group_bounds,
                                        int64_t num_groups, float scale, int64_t window,
                                        float* output, int32_t num_threads, int32_t isa) {
    return run(
        {query, key, value, query_stride, key_stride, value_stride, num_heads, num_key_heads,
         key_size, value_size, reinterpret_cast<const fastalign::AttentionSegment*>(segments),
         group_bounds, scale, window, output, nullptr, nullptr, nullptr, nullptr},
        num_groups, num_threads, isa);
}

int32_t fastalign_attention_backward_cpu(
    const float* query, const float* key, const float* value, int64_t query_stride,
    int64_t key_stride, int64_t value_stride, int64_t num_heads, int64_t num_key_heads,
    int64_t key_size, int64_t value_size, const int64_t* segments, const int64_t* group_bounds,
    int64_t num_groups, float scale, int64_t window, const float* grad_output, float* grad_query,
    float* grad_key, float* grad_value, int32_t num_threads, int32_t isa) {
    return run(
        {query, key, value, query_stride, key_stride, value_stride, num_heads, num_key_heads,
         key_size, value_size, reinterpret_cast<const fastalign::AttentionSegment*>(segments),
         group_bounds, scale, window, nullptr, grad_output, grad_query, grad_key, grad_value},
        num_groups, num_threads, isa);
}
