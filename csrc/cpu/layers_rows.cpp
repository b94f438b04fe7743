// RMSNorm, gated activations and rotary embeddings for one instruction set.
#include "layers_rows.h"

#include <cmath>

#include "vector_loops.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

// The sum of term(column, count), a vector, over a row.
template <typename Term>
double sum_row(int64_t num_columns, const Term& term) {
    double total = 0;
    for (int64_t start = 0; start < num_columns; start += BLOCK) {
        Float sums = splat(0.0f);
        const int64_t stop = start + BLOCK < num_columns ? start + BLOCK : num_columns;
        visit_vectors(start, stop,
                      [&](int64_t column, auto count) { sums = sums + term(column, count); });
        total += sum(sums);
    }
    return total;
}

__attribute__((always_inline)) inline Float load(const float* from, int64_t count) {
    return load_count<Float32>(from, count);
}

struct Silu {
    // The activation of x and its derivative.
    static void at(Float x, Float& value, Float& slope) {
        const Float sigmoid = 1.0f / (1.0f + exp(-x));
        value = x * sigmoid;
        slope = sigmoid + value * (1.0f - sigmoid);
    }
};

// By its approximation with tanh.
struct Gelu {
    static void at(Float x, Float& value, Float& slope) {
        constexpr float SCALE = 0.7978845608028654f, CUBIC = 0.044715f;  // sqrt(2 / pi)
        const Float square = x * x;
        const Float t = tanh(SCALE * x * (1.0f + CUBIC * square));
        const Float half = 0.5f * (1.0f + t);
        value = x * half;
        slope = half + 0.5f * SCALE * x * (1.0f - t * t) * (1.0f + 3.0f * CUBIC * square);
    }
};

template <typename Type, typename Activation>
void run_elements(const GateElements& elements, int64_t first, int64_t last) {
    typedef typename Type::Element Element;
    const auto* gate = static_cast<const Element*>(elements.gate);
    const auto* up = static_cast<const Element*>(elements.up);
    const auto* gradient = static_cast<const Element*>(elements.gradient);
    auto* output = static_cast<Element*>(elements.output);
    auto* grad_gate = static_cast<Element*>(elements.grad_gate);
    auto* grad_up = static_cast<Element*>(elements.grad_up);
    visit_vectors(first, last, [&](int64_t i, auto count) {
        Float value, slope;
        Activation::at(load_count<Type>(gate + i, count), value, slope);
        const Float factor = load_count<Type>(up + i, count);
        if (gradient == nullptr) {
            store_count<Type>(output + i, value * factor, count);
            return;
        }
        const Float upstream = load_count<Type>(gradient + i, count);
        store_count<Type>(grad_gate + i, upstream * factor * slope, count);
        store_count<Type>(grad_up + i, upstream * value, count);
    });
}

template <typename From, typename To>
void run_rows(const RotaryRows& rows, int64_t first, int64_t last) {
    const int64_t half = rows.head_dim / 2, size = rows.num_heads * rows.head_dim;
    for (int64_t row = first; row < last; ++row) {
        const float *cos = rows.cos + row * rows.head_dim, *sin = rows.sin + row * rows.head_dim;
        const auto* x = static_cast<const typename From::Element*>(rows.x) + row * size;
        auto* output = static_cast<typename To::Element*>(rows.output) + row * size;
        for (int64_t head = 0; head < size; head += rows.head_dim) {
            visit_vectors(0, half, [&](int64_t i, auto count) {
                const int64_t low = head + i, high = head + half + i;
                const Float a = load_count<From>(x + low, count);
                const Float b = load_count<From>(x + high, count);
                const Float sin_low = load(sin + i, count), sin_high = load(sin + half + i, count);
                const Float to_low = rows.transposed ? b * sin_high : -b * sin_low;
                const Float to_high = rows.transposed ? -a * sin_low : a * sin_high;
                store_count<To>(output + low, a * load(cos + i, count) + to_low, count);
                store_count<To>(output + high, b * load(cos + half + i, count) + to_high, count);
            });
        }
    }
}

}  // namespace

void run_rms_norm(const NormRows& rows, int64_t first, int64_t last) {
    const int64_t size = rows.num_columns;
    for (int64_t row = first; row < last; ++row) {
        const float* x = rows.x + row * size;
        float* output = rows.output + row * size;
        const double squares = sum_row(size, [&](int64_t column, auto count) {
            const Float value = load(x + column, count);
            return value * value;
        });
        const auto scale = static_cast<float>(1.0 / std::sqrt(squares / size + rows.epsilon));
        rows.scale[row] = scale;
        visit_vectors(0, size, [&](int64_t column, auto count) {
            const Float weight = load(rows.weight + column, count) + rows.offset;
            store_count<Float32>(output + column, load(x + column, count) * scale * weight, count);
        });
    }
}

// Of blocks of rows.
void run_rms_norm_backward(const NormRows& rows, int64_t first, int64_t last) {
    const int64_t size = rows.num_columns;
    for (int64_t block = first; block < last; ++block) {
        float* partial = rows.partial ? rows.partial + block * size : nullptr;
        if (partial) memset(partial, 0, size * sizeof(float));
        const int64_t begin = block * NORM_BLOCK;
        const int64_t end = std::min(begin + NORM_BLOCK, rows.num_rows);
        for (int64_t row = begin; row < end; ++row) {
            const float *x = rows.x + row * size, *gradient = rows.gradient + row * size;
            float* output = rows.output + row * size;
            const float scale = rows.scale[row];
            const double dot = sum_row(size, [&](int64_t column, auto count) {
                const Float weight = load(rows.weight + column, count) + rows.offset;
                return load(gradient + column, count) * weight * load(x + column, count);
            });
            const auto along =
                static_cast<float>(dot / size * (double(scale) * double(scale) * double(scale)));
            visit_vectors(0, size, [&](int64_t column, auto count) {
                const Float weight = load(rows.weight + column, count) + rows.offset;
                const Float value = load(x + column, count);
                const Float upstream = load(gradient + column, count);
                store_count<Float32>(output + column, upstream * weight * scale - value * along,
                                     count);
                if (partial) {
                    const Float before = load(partial + column, count);
                    store_count<Float32>(partial + column, before + upstream * value * scale,
                                         count);
                }
            });
        }
    }
}

void run_gated_activation(const GateElements& elements, int64_t first, int64_t last) {
    typedef void (*Run)(const GateElements&, int64_t, int64_t);
    const Run functions[2][3] = {
        {run_elements<Float32, Silu>, run_elements<BFloat16, Silu>, run_elements<Float16, Silu>},
        {run_elements<Float32, Gelu>, run_elements<BFloat16, Gelu>, run_elements<Float16, Gelu>}};
    functions[elements.activation][elements.dtype](elements, first, last);
}

void run_rotary(const RotaryRows& rows, int64_t first, int64_t last) {
    typedef void (*Run)(const RotaryRows&, int64_t, int64_t);
    const Run functions[2][2] = {{run_rows<Float32, Float32>, run_rows<Float32, BFloat16>},
                                 {run_rows<BFloat16, Float32>, run_rows<BFloat16, BFloat16>}};
    functions[rows.dtype][rows.output_dtype](rows, first, last);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
