// The entry points of a model's layers, under the sanitizers.
#include <cstdint>

#include "abi.h"
#include "sanitized_array.h"
#include "sanitized_checks.h"

namespace {

// Rows and columns; the last have enough elements for threads.
constexpr int64_t SIZES[][2] = {{0, 8}, {1, 1}, {65, 37}, {130, 1601}};

void rms_norm(int64_t num_rows, int64_t num_columns, bool trains, Setting setting) {
    const int64_t size = num_rows * num_columns;
    auto x = numbers(size), weight = numbers(num_columns), gradient = numbers(size);
    Array<float> output(size), scale(num_rows);
    require(fastalign_rms_norm_forward_cpu(x.get(), weight.get(), 1.0f, 1e-5f, num_rows,
                                           num_columns, output.get(), scale.get(),
                                           setting.num_threads, setting.isa) == 0,
            "rms_norm_forward");
    output.check_finite();
    scale.check_finite();
    Array<float> grad_x(size), grad_weight(num_columns),
        partial((num_rows + 63) / 64 * num_columns);
    require(fastalign_rms_norm_backward_cpu(
                x.get(), weight.get(), 1.0f, scale.get(), gradient.get(), num_rows, num_columns,
                grad_x.get(), trains ? grad_weight.get() : nullptr,
                trains ? partial.get() : nullptr, setting.num_threads, setting.isa) == 0,
            "rms_norm_backward");
    grad_x.check_finite();
    if (trains) grad_weight.check_finite();
}

template <typename T>
void gated_activation(int64_t size, int32_t dtype, int32_t activation, Setting setting) {
    auto gate = numbers<T>(size, dtype), up = numbers<T>(size, dtype),
         gradient = numbers<T>(size, dtype);
    Array<T> output(size), grad_gate(size), grad_up(size);
    require(
        fastalign_gated_activation_forward_cpu(gate.get(), up.get(), dtype, activation, size,
                                               output.get(), setting.num_threads, setting.isa) == 0,
        "gated_activation_forward");
    require(fastalign_gated_activation_backward_cpu(gate.get(), up.get(), dtype, activation, size,
                                                    gradient.get(), grad_gate.get(), grad_up.get(),
                                                    setting.num_threads, setting.isa) == 0,
            "gated_activation_backward");
    for (auto* array : {&output, &grad_gate, &grad_up}) array->check_written();
}

template <typename From, typename To>
void rotary(int64_t num_rows, int64_t head_dim, int32_t dtype, int32_t output_dtype,
            Setting setting) {
    constexpr int64_t NUM_HEADS = 3;
    const int64_t size = num_rows * NUM_HEADS * head_dim;
    auto x = numbers<From>(size, dtype);
    auto cos = numbers(num_rows * head_dim), sin = numbers(num_rows * head_dim);
    for (int32_t transposed = 0; transposed < 2; ++transposed) {
        Array<To> output(size);
        require(fastalign_rotary_cpu(x.get(), dtype, cos.get(), sin.get(), num_rows, NUM_HEADS,
                                     head_dim, transposed, output.get(), output_dtype,
                                     setting.num_threads, setting.isa) == 0,
                "rotary");
        output.check_written();
    }
}

// Two groups, the first of a prompt with two responses, the second of one that stands alone.
void attention(int64_t prompt, int64_t own, int64_t num_heads, int64_t num_key_heads,
               int64_t key_size, int64_t value_size, int64_t window, Setting setting) {
    const int64_t table[4][4] = {{0, prompt, 0, 0},
                                 {prompt, own, 0, prompt},
                                 {prompt + own, 1, 0, prompt},
                                 {prompt + own + 1, own, 0, 0}};
    const int64_t limits[3] = {0, 3, 4}, num_tokens = prompt + 2 * own + 1;
    Array<int64_t> segments(16), bounds(3);
    for (int64_t i = 0; i < 16; ++i) segments[i] = table[i / 4][i % 4];
    for (int64_t i = 0; i < 3; ++i) bounds[i] = limits[i];
    const int64_t of_query = num_heads * key_size, of_key = num_key_heads * key_size,
                  of_value = num_key_heads * value_size, of_output = num_heads * value_size;
    auto query = numbers(num_tokens * of_query), key = numbers(num_tokens * of_key),
         value = numbers(num_tokens * of_value), gradient = numbers(num_tokens * of_output);
    Array<float> output(num_tokens * of_output), grad_query(num_tokens * of_query),
        grad_key(num_tokens * of_key), grad_value(num_tokens * of_value);
    require(fastalign_attention_forward_cpu(
                query.get(), key.get(), value.get(), of_query, of_key, of_value, num_heads,
                num_key_heads, key_size, value_size, segments.get(), bounds.get(), 2, 0.3f, window,
                output.get(), setting.num_threads, setting.isa) == 0,
            "attention_forward");
    output.check_finite();
    require(fastalign_attention_backward_cpu(
                query.get(), key.get(), value.get(), of_query, of_key, of_value, num_heads,
                num_key_heads, key_size, value_size, segments.get(), bounds.get(), 2, 0.3f, window,
                gradient.get(), grad_query.get(), grad_key.get(), grad_value.get(),
                setting.num_threads, setting.isa) == 0,
            "attention_backward");
    for (auto* array : {&grad_query, &grad_key, &grad_value}) array->check_finite();
}

}  // namespace

void check_attention(Setting setting) {
    for (const int64_t window : {0, 1, 9}) {
        attention(1, 1, 1, 1, 1, 1, window, setting);
        attention(37, 70, 6, 2, 16, 24, window, setting);
        attention(5, 130, 2, 2, 33, 7, window, setting);
    }
}

void check_rms_norm(Setting setting) {
    for (const auto& [num_rows, num_columns] : SIZES) {
        for (const bool trains : {false, true}) rms_norm(num_rows, num_columns, trains, setting);
    }
}

void check_gated_activation(Setting setting) {
    for (const int64_t size : {0, 1, 1025, 140'001}) {
        for (int32_t activation = 0; activation < 2; ++activation) {
            gated_activation<float>(size, 0, activation, setting);
            for (const int32_t dtype : {1, 2})
                gated_activation<uint16_t>(size, dtype, activation, setting);
        }
    }
}

void check_rotary(Setting setting) {
    for (const int64_t head_dim : {2, 38, 128}) {
        for (const int64_t num_rows : {0, 1, 400}) {
            rotary<float, float>(num_rows, head_dim, 0, 0, setting);
            rotary<float, uint16_t>(num_rows, head_dim, 0, 1, setting);
            rotary<uint16_t, float>(num_rows, head_dim, 1, 0, setting);
            rotary<uint16_t, uint16_t>(num_rows, head_dim, 1, 1, setting);
        }
    }
}
