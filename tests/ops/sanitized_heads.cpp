// The entry points that read rows of logits, under the sanitizers.
#include <cmath>

#include "abi.h"
#include "sanitized_array.h"
#include "sanitized_checks.h"
#include "sanitized_rows.h"

namespace {

template <typename T>
void token_logprob(const Shape& shape, int32_t dtype, bool options, Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns;
    auto logits = numbers<T>(shape.size(), dtype, num_columns, shape.row_stride());
    Rows rows(shape);
    Array<float> maximum(num_rows), log_total(num_rows);
    const float* temperature = options ? rows.temperature.get() : nullptr;
    const float softcap = options ? 3.0f : 0.0f;
    require(fastalign_token_logprob_forward_cpu(
                logits.get(), dtype, num_rows, num_columns, shape.row_stride(), softcap, -100,
                rows.targets.get(), temperature, rows.logprob.get(), rows.entropy.get(),
                maximum.get(), log_total.get(), setting.num_threads, setting.isa) == 0,
            "token_logprob_forward");
    for (auto* array : {&rows.logprob, &rows.entropy, &maximum, &log_total}) array->check_finite();
    Array<T> gradient(num_rows * num_columns);
    require(
        fastalign_token_logprob_backward_cpu(
            logits.get(), dtype, num_rows, num_columns, shape.row_stride(), softcap, -100,
            rows.targets.get(), temperature, rows.logprob.get(), rows.entropy.get(), maximum.get(),
            log_total.get(), rows.grad_logprob.get(), options ? rows.grad_entropy.get() : nullptr,
            gradient.get(), setting.num_threads, setting.isa) == 0,
        "token_logprob_backward");
    gradient.check_written();
}

}  // namespace

void check_token_logprob(Setting setting) {
    for (const Shape& shape : shapes_for(setting.num_threads)) {
        for (const bool options : {false, true}) {
            token_logprob<float>(shape, 0, options, setting);
            token_logprob<uint16_t>(shape, 1, options, setting);
            token_logprob<uint16_t>(shape, 2, options, setting);
        }
    }
}

namespace {

template <typename T>
void head_tile(const Shape& shape, bool with_entropy, bool softcap, bool in_place,
               Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns,
                  x_stride = shape.row_stride();
    auto x = numbers(shape.size(), 0, num_columns, x_stride);
    Rows rows(shape);
    Array<uint8_t> ignored(num_rows), is_argmax(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) {
        ignored[i] = rows.targets[i] < 0;
        if (ignored[i]) rows.targets[i] = 0;
    }
    const Shape apart = {num_rows, num_columns, 3};
    Array<T> gradient(apart.size());
    void* place = in_place ? static_cast<void*>(x.get()) : gradient.get();
    require(fastalign_head_tile_cpu(x.get(), num_rows, num_columns, x_stride, softcap ? 3.0f : 0.0f,
                                    0.5f, softcap ? rows.temperature.get() : nullptr,
                                    rows.targets.get(), ignored.get(), rows.logprob.get(),
                                    with_entropy ? rows.entropy.get() : nullptr, is_argmax.get(),
                                    place, sizeof(T) == 2, in_place ? x_stride : apart.row_stride(),
                                    softcap ? rows.grad_logprob.get() : nullptr,
                                    with_entropy ? rows.grad_entropy.get() : nullptr,
                                    setting.num_threads, setting.isa) == 0,
            "head_tile");
    rows.logprob.check_finite();
    if (with_entropy) rows.entropy.check_finite();
    is_argmax.check_written();
    x.check_written(num_columns, x_stride);
    if (!in_place) gradient.check_written(num_columns, apart.row_stride());
}

}  // namespace

void check_head_tile(Setting setting) {
    for (const Shape& shape : shapes_for(setting.num_threads)) {
        for (const bool with_entropy : {false, true}) {
            for (const bool softcap : {false, true}) {
                head_tile<float>(shape, with_entropy, softcap, true, setting);
                head_tile<float>(shape, with_entropy, softcap, false, setting);
                head_tile<uint16_t>(shape, with_entropy, softcap, false, setting);
            }
        }
    }
}

namespace {

template <typename T>
void head_tile_split(const Shape& shape, bool with_entropy, bool softcap, Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns,
                  x_stride = shape.row_stride();
    auto x = numbers(shape.size(), 0, num_columns, x_stride);
    Rows rows(shape);
    Array<uint8_t> ignored(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) {
        ignored[i] = rows.targets[i] < 0;
        if (i % 4 == 3) rows.targets[i] = num_columns + i;  // another process's
    }
    Array<float> maximum(num_rows), total(num_rows), weighted(num_rows), target_u(num_rows);
    const float* temperature = softcap ? rows.temperature.get() : nullptr;
    const float cap = softcap ? 3.0f : 0.0f;
    require(
        fastalign_head_tile_statistics_cpu(
            x.get(), num_rows, num_columns, x_stride, cap, 0.5f, temperature, rows.targets.get(),
            ignored.get(), maximum.get(), total.get(), with_entropy ? weighted.get() : nullptr,
            target_u.get(), setting.num_threads, setting.isa) == 0,
        "head_tile_statistics");
    for (auto* array : {&maximum, &total, &target_u}) array->check_finite();
    if (with_entropy) weighted.check_finite();
    Array<float> log_total(num_rows), entropy(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) {
        log_total[i] = ignored[i] ? 0.0f : std::log(total[i]);
        entropy[i] = 1.0f;
    }
    const Shape apart = {num_rows, num_columns, 3};
    Array<T> gradient(apart.size());
    require(fastalign_head_tile_gradient_cpu(
                x.get(), num_rows, num_columns, x_stride, cap, 0.5f, temperature,
                rows.targets.get(), ignored.get(), maximum.get(), log_total.get(),
                with_entropy ? entropy.get() : nullptr, gradient.get(), sizeof(T) == 2,
                apart.row_stride(), softcap ? rows.grad_logprob.get() : nullptr,
                with_entropy ? rows.grad_entropy.get() : nullptr, setting.num_threads,
                setting.isa) == 0,
            "head_tile_gradient");
    gradient.check_written(num_columns, apart.row_stride());
}

}  // namespace

void check_head_tile_split(Setting setting) {
    for (const Shape& shape : shapes_for(setting.num_threads)) {
        for (const bool with_entropy : {false, true}) {
            for (const bool softcap : {false, true}) {
                head_tile_split<float>(shape, with_entropy, softcap, setting);
                head_tile_split<uint16_t>(shape, with_entropy, softcap, setting);
            }
        }
    }
}

namespace {

// Each operand straight and transposed, c overwritten and added to, its rows 3
// apart.
}  // namespace

void check_product(Setting setting) {
    if (!fastalign_product_bf16_usable_cpu() || setting.isa == 0 || setting.isa == 1) return;
    // num_rows, num_columns, depth
    const int64_t sizes[][3] = {{0, 3, 5},   {1, 1, 1},     {5, 17, 31},   {33, 2, 70},
                                {70, 65, 1}, {200, 97, 33}, {31, 300, 129}};
    for (const auto& [num_rows, num_columns, depth] : sizes) {
        const Shape shape = {num_rows, num_columns, 3};
        for (int flags = 0; flags < 8; ++flags) {
            const bool a_turned = flags & 1, b_turned = flags & 2, add = flags & 4;
            auto a = numbers<uint16_t>(num_rows * depth, 1);
            auto b = numbers<uint16_t>(depth * num_columns, 1);
            Array<float> c(shape.size());
            if (add) c = numbers(shape.size(), 0, num_columns, shape.row_stride());
            require(fastalign_product_bf16_cpu(a.get(), a_turned ? 1 : depth,
                                               a_turned ? num_rows : 1, b.get(),
                                               b_turned ? 1 : num_columns, b_turned ? depth : 1,
                                               c.get(), shape.row_stride(), num_rows, num_columns,
                                               depth, add, setting.num_threads, setting.isa) == 0,
                    "product_bf16");
            c.check_written(num_columns, shape.row_stride());
        }
    }
}
