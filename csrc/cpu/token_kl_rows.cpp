// The rows of token_kl for one instruction set.
#include "token_kl_rows.h"

#include <cmath>

#include "divergence.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

// One row of each side, and what turns a logit x into z = gain u: u is x, or with a softcap a tanh.
template <typename Policy, typename Reference>
struct Row {
    const typename Policy::Element* policy;
    const typename Reference::Element* reference;
    float softcap, scale, gain;

    Row(const KLRows& rows, int64_t index)
        : policy(static_cast<const typename Policy::Element*>(rows.logits) +
                 index * rows.row_stride),
          reference(static_cast<const typename Reference::Element*>(rows.reference) +
                    index * rows.reference_stride),
          softcap(rows.softcap),
          scale(rows.temperature ? 1.0f / rows.temperature[index] : 1.0f),
          gain(softcap > 0 ? softcap * scale : scale) {}

    Float u(Float x) const { return softcap > 0 ? tanh(x / softcap) : x; }
    Float policy_u(int64_t column, int64_t count) const {
        return u(load_count<Policy>(policy + column, count));
    }
    Float reference_u(int64_t column, int64_t count) const {
        return u(load_count<Reference>(reference + column, count));
    }
};

template <typename Policy, typename Reference>
void forward_row(const KLRows& rows, int64_t index) {
    const Row<Policy, Reference> row(rows, index);
    // u rises with x
    const float policy_maximum = row.u(splat(row_maximum<Policy>(row.policy, rows.num_columns)))[0];
    const float reference_maximum =
        row.u(splat(row_maximum<Reference>(row.reference, rows.num_columns)))[0];
    const auto read = [&](int64_t column, auto count) {
        return Shifted{bounded((row.policy_u(column, count) - policy_maximum) * row.gain),
                       bounded((row.reference_u(column, count) - reference_maximum) * row.gain)};
    };
    const Divergence found = rows.over_reference ? read_divergence<true>(rows.num_columns, read)
                                                 : read_divergence<false>(rows.num_columns, read);
    rows.kl[index] = static_cast<float>(found.kl);
    rows.maximum[index] = policy_maximum;
    rows.log_total[index] = static_cast<float>(std::log(found.policy_total));
    rows.reference_maximum[index] = reference_maximum;
    rows.reference_log_total[index] = static_cast<float>(std::log(found.reference_total));
}

template <bool OVER_REFERENCE, typename Policy, typename Reference>
void write_gradient(const KLRows& rows, int64_t index) {
    const Row<Policy, Reference> row(rows, index);
    auto* gradient =
        static_cast<typename Policy::Element*>(rows.gradient) + index * rows.num_columns;
    const float kl = rows.kl[index];
    const float maximum = rows.maximum[index], log_total = rows.log_total[index];
    const float reference_maximum = rows.reference_maximum[index];
    const float reference_log_total = rows.reference_log_total[index];
    const float coefficient = (std::isinf(kl) ? NAN : rows.grad_kl[index]) * row.scale;
    visit_vectors(0, rows.num_columns, [&](int64_t column, auto count) {
        const Float u = row.policy_u(column, count);
        const Float log_p = (u - maximum) * row.gain - log_total;
        const Float v = row.reference_u(column, count);
        const Float log_q = (v - reference_maximum) * row.gain - reference_log_total;
        const Float p = exp(log_p);
        Float bracket =
            OVER_REFERENCE ? p - exp(log_q) : p * ((bounded(log_p) - bounded(log_q)) - kl);
        if (row.softcap > 0) bracket = bracket * (1.0f - u * u);
        store_count<Policy>(gradient + column, bracket * coefficient, count);
    });
}

template <typename Policy, typename Reference>
void run_row(const KLRows& rows, int64_t index) {
    const bool ignored = rows.ignored && rows.ignored[index];
    if (rows.gradient) {
        if (ignored) {
            const int64_t size = rows.num_columns * sizeof(typename Policy::Element);
            memset(static_cast<char*>(rows.gradient) + index * size, 0, size);
        } else if (rows.over_reference) {
            write_gradient<true, Policy, Reference>(rows, index);
        } else {
            write_gradient<false, Policy, Reference>(rows, index);
        }
    } else if (ignored) {
        for (float* found : {rows.kl, rows.maximum, rows.log_total, rows.reference_maximum,
                             rows.reference_log_total})
            found[index] = 0;
    } else {
        forward_row<Policy, Reference>(rows, index);
    }
}

typedef void (*RunRow)(const KLRows&, int64_t);

template <typename Policy>
RunRow choose(int32_t reference_dtype) {
    const RunRow functions[3] = {run_row<Policy, Float32>, run_row<Policy, BFloat16>,
                                 run_row<Policy, Float16>};
    return functions[reference_dtype];
}

}  // namespace

void run_token_kl(const KLRows& rows, int64_t first, int64_t last) {
    const RunRow function = rows.dtype == 0   ? choose<Float32>(rows.reference_dtype)
                            : rows.dtype == 1 ? choose<BFloat16>(rows.reference_dtype)
                                              : choose<Float16>(rows.reference_dtype);
    for (int64_t index = first; index < last; ++index) function(rows, index);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
