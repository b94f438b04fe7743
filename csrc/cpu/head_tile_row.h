// One row of a head's tile, for one instruction set: what the fused pass (head_tile) and the split
// ones (head_tile_statistics, head_tile_gradient) share. They differ in how a row is read: see
// InPlace and OnTheFly.
#pragma once

#include <cmath>
#include <cstdint>

#include "vector.h"
#include "vector_loops.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

struct Row {
    float* x;  // products; in the fused pass with a softcap, later their tanh
    int64_t num_columns, target;
    float cap_scale;    // the tanh is of cap_scale * x
    float gain, slope;  // z = gain * u, u being the tanh or x; dz / dx, less the tanh's derivative
    float grad_logprob, grad_entropy;
    // found by the first two readings, or given
    float maximum;  // of u
    double total, weighted, log_total, entropy, logprob;
};

// A row's numbers that follow from its transform.
inline Row make_row(float* x, int64_t num_columns, int64_t target, float softcap, float logit_scale,
                    float temperature) {
    const float cooling = 1.0f / temperature;
    Row row{};
    row.x = x;
    row.num_columns = num_columns;
    row.target = target;
    row.slope = logit_scale * cooling;
    row.cap_scale = softcap > 0 ? logit_scale / softcap : 0.0f;
    row.gain = softcap > 0 ? softcap * cooling : row.slope;
    return row;
}

inline bool holds_target(const Row& row) { return holds(row.target, row.num_columns); }

// The fused pass: the row holds u already, and may become e.
template <bool SOFTCAP>
struct InPlace {
    static constexpr bool KEEPS = true;
    static Float u(const Row&, Float x) { return x; }
};

// The split passes: the row holds x.
template <bool SOFTCAP>
struct OnTheFly {
    static constexpr bool KEEPS = false;
    static Float u(const Row& row, Float x) { return SOFTCAP ? tanh(x * row.cap_scale) : x; }
};

// The sums of e = exp(z - max z) and of e (z - max z); with KEEP the row becomes e.
template <typename Reading, bool KEEP, bool ENTROPY>
void read_sums(Row& row) {
    double total = 0, weighted = 0;
    for (int64_t start = 0; start < row.num_columns; start += BLOCK) {
        const int64_t stop = start + BLOCK < row.num_columns ? start + BLOCK : row.num_columns;
        Float sum_of_exp = splat(0), sum_of_product = splat(0);
        visit_vectors(start, stop, [&](int64_t column, auto count) {
            const Float x = Reading::u(row, load_count<Float32>(row.x + column, count, -INFINITY));
            const Float shifted = (x - row.maximum) * row.gain;
            Float e = exp(shifted);
            // where every x is -inf, the padding would be NaN as well
            for (int64_t i = count; i < WIDTH; ++i) e[i] = 0;
            sum_of_exp += e;
            if (ENTROPY) sum_of_product += e * (shifted < LOWEST ? splat(LOWEST) : shifted);
            if (KEEP) store_count<Float32>(row.x + column, e, count);
        });
        total += sum(sum_of_exp);
        weighted += sum(sum_of_product);
    }
    row.total = total;
    row.weighted = weighted;
}

// The coefficient of p_v at one column: -(g + e (log p + H)).
struct Coefficient {
    float g, e, log_total, entropy;
    template <typename T>
    T operator()(T shifted) const {
        return -(g + e * ((shifted < LOWEST ? T{} + LOWEST : shifted) - log_total + entropy));
    }
};

// `kept`: x holds e already.
template <typename Reading, typename Type, bool SOFTCAP, bool ENTROPY>
void write_gradient(const Row& row, typename Type::Element* gradient) {
    const bool kept = Reading::KEEPS && !SOFTCAP && !ENTROPY;
    const float scale = static_cast<float>(row.slope / row.total);
    const Coefficient coefficient{row.grad_logprob, row.grad_entropy,
                                  static_cast<float>(row.log_total),
                                  static_cast<float>(row.entropy)};
    const bool has_target = holds_target(row);
    const float at_target_x = has_target ? Reading::u(row, splat(row.x[row.target]))[0] : 0.0f;
    const float plain = -row.grad_logprob * scale;
    visit_vectors(0, row.num_columns, [&](int64_t column, auto count) {
        const Float x = Reading::u(row, load_count<Float32>(row.x + column, count));
        Float result;
        if (kept) {
            result = x * plain;
        } else {
            const Float shifted = (x - row.maximum) * row.gain;
            result = exp(shifted) * scale;
            if (ENTROPY) {
                result = result * coefficient(shifted);
            } else {
                result = result * -row.grad_logprob;
            }
            if (SOFTCAP) result = result * (1.0f - x * x);
        }
        store_count<Type>(gradient + column, result, count);
    });
    if (!has_target) return;
    // 1 - p from the log-prob: exact where p is near 1
    double at_target = -row.grad_logprob * std::expm1(row.logprob);
    if (ENTROPY) {
        const double bounded = row.logprob < LOWEST ? LOWEST : row.logprob;  // a banned target
        at_target -= row.grad_entropy * std::exp(row.logprob) * (bounded + row.entropy);
    }
    at_target *= row.slope;
    if (SOFTCAP) at_target *= 1.0f - at_target_x * at_target_x;
    store_count<Type>(gradient + row.target, splat(static_cast<float>(at_target)), 1);
}

template <template <bool> class Reading, typename Type>
void write_any_gradient(const Row& row, bool softcap, bool entropy,
                        typename Type::Element* gradient) {
    if (softcap) {
        entropy ? write_gradient<Reading<true>, Type, true, true>(row, gradient)
                : write_gradient<Reading<true>, Type, true, false>(row, gradient);
    } else {
        entropy ? write_gradient<Reading<false>, Type, false, true>(row, gradient)
                : write_gradient<Reading<false>, Type, false, false>(row, gradient);
    }
}

}  // namespace
}  // namespace FASTALIGN_ISA
}  // namespace fastalign
