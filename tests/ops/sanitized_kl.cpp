// The entry points that read two sets of logits, under the sanitizers.
#include "abi.h"
#include "sanitized_array.h"
#include "sanitized_checks.h"
#include "sanitized_rows.h"

namespace {

Array<uint8_t> ignored_of(Rows& rows, int64_t num_rows) {
    Array<uint8_t> ignored(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) {
        ignored[i] = rows.targets[i] < 0;
        if (ignored[i]) rows.targets[i] = 0;
    }
    return ignored;
}

template <typename T>
void token_kl(const Shape& shape, int32_t dtype, int32_t over_reference, bool options,
              Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns;
    const Shape apart = {num_rows, num_columns, 3};  // the reference's rows
    auto logits = numbers<T>(shape.size(), dtype, num_columns, shape.row_stride());
    auto reference = numbers<uint16_t>(apart.size(), 1, num_columns, apart.row_stride());
    Rows rows(shape);
    auto ignored = ignored_of(rows, num_rows);
    Array<float> kl(num_rows), maximum(num_rows), log_total(num_rows);
    Array<float> reference_maximum(num_rows), reference_log_total(num_rows);
    const float* temperature = options ? rows.temperature.get() : nullptr;
    const uint8_t* skipped = options ? ignored.get() : nullptr;
    const float softcap = options ? 3.0f : 0.0f;
    require(fastalign_token_kl_forward_cpu(
                logits.get(), dtype, shape.row_stride(), reference.get(), 1, apart.row_stride(),
                num_rows, num_columns, softcap, over_reference, temperature, skipped, kl.get(),
                maximum.get(), log_total.get(), reference_maximum.get(), reference_log_total.get(),
                setting.num_threads, setting.isa) == 0,
            "token_kl_forward");
    kl.check_finite();
    Array<T> gradient(num_rows * num_columns);
    require(fastalign_token_kl_backward_cpu(
                logits.get(), dtype, shape.row_stride(), reference.get(), 1, apart.row_stride(),
                num_rows, num_columns, softcap, over_reference, temperature, skipped, kl.get(),
                maximum.get(), log_total.get(), reference_maximum.get(), reference_log_total.get(),
                rows.grad_logprob.get(), gradient.get(), setting.num_threads, setting.isa) == 0,
            "token_kl_backward");
    gradient.check_written();
}

// Both brackets, in place or in places of their own, or one gradient weighted
// from upstream.
template <typename T>
void kl_tile(const Shape& shape, int32_t over_reference, bool brackets, bool in_place, bool softcap,
             Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns,
                  stride = shape.row_stride();
    auto policy = numbers(shape.size(), 0, num_columns, stride);
    auto reference = numbers(shape.size(), 0, num_columns, stride);
    Rows rows(shape);
    auto ignored = ignored_of(rows, num_rows);
    auto grad_kl = numbers(num_rows);
    Array<float> reference_logprob(num_rows), kl(num_rows);
    const Shape apart = {num_rows, num_columns, 3};
    Array<T> gradient(apart.size()), kl_gradient(apart.size());
    void* place = in_place ? static_cast<void*>(policy.get()) : gradient.get();
    void* kl_place = in_place ? static_cast<void*>(reference.get()) : kl_gradient.get();
    require(
        fastalign_kl_tile_cpu(
            policy.get(), reference.get(), num_rows, num_columns, stride, softcap ? 3.0f : 0.0f,
            0.5f, over_reference, softcap ? rows.temperature.get() : nullptr, rows.targets.get(),
            ignored.get(), rows.logprob.get(), reference_logprob.get(), rows.entropy.get(),
            kl.get(), place, brackets ? kl_place : nullptr, sizeof(T) == 2,
            in_place ? stride : apart.row_stride(), brackets ? nullptr : rows.grad_logprob.get(),
            brackets ? nullptr : rows.grad_entropy.get(), brackets ? nullptr : grad_kl.get(),
            setting.num_threads, setting.isa) == 0,
        "kl_tile");
    for (auto* array : {&rows.logprob, &reference_logprob, &rows.entropy, &kl})
        array->check_finite();
    if (in_place) {
        policy.check_written(num_columns, stride);
        return;
    }
    gradient.check_written(num_columns, apart.row_stride());
    if (brackets) kl_gradient.check_written(num_columns, apart.row_stride());
}

}  // namespace

void check_token_kl(Setting setting) {
    for (const Shape& shape : shapes_for(setting.num_threads)) {
        for (const int32_t over_reference : {0, 1}) {
            for (const bool options : {false, true}) {
                token_kl<float>(shape, 0, over_reference, options, setting);
                token_kl<uint16_t>(shape, 1, over_reference, options, setting);
                token_kl<uint16_t>(shape, 2, over_reference, options, setting);
            }
        }
    }
}

void check_kl_tile(Setting setting) {
    for (const Shape& shape : shapes_for(setting.num_threads)) {
        for (const int32_t over_reference : {0, 1}) {
            for (const bool brackets : {false, true}) {
                const bool softcap = brackets != (over_reference == 0);
                kl_tile<float>(shape, over_reference, brackets, true, softcap, setting);
                kl_tile<float>(shape, over_reference, brackets, false, !softcap, setting);
                kl_tile<uint16_t>(shape, over_reference, brackets, false, softcap, setting);
            }
        }
    }
}
