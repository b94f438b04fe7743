// The rows of token_logprob for one instruction set: compiled once for each, with FASTALIGN_ISA
// naming it.
#include "token_logprob_rows.h"

#include <cmath>

#include "vector_loops.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

// What turns a logit x into z = gain u: u is x, or with a softcap a tanh. The row's maximum is
// subtracted from u: the rounding error of a product with a large z could exceed differences of z.
struct Transform {
    float softcap, gain;
    Transform(const Rows& rows, int64_t index) : softcap(rows.softcap) {
        gain = rows.temperature ? 1.0f / rows.temperature[index] : 1.0f;
        if (softcap > 0) gain *= softcap;
    }
    Float u(Float x) const { return softcap > 0 ? tanh(x / softcap) : x; }
    Float slope(Float u) const {  // dz / dx
        return softcap > 0 ? gain / softcap * (1.0f - u * u) : splat(gain);
    }
};

template <typename Type>
void forward_row(const Rows& rows, int64_t index) {
    const auto* row =
        static_cast<const typename Type::Element*>(rows.logits) + index * rows.row_stride;
    const Transform transform(rows, index);
    // u rises with x
    const float maximum = transform.u(splat(row_maximum<Type>(row, rows.num_columns)))[0];
    double total = 0, weighted = 0;
    for (int64_t start = 0; start < rows.num_columns; start += BLOCK) {
        const int64_t stop = start + BLOCK < rows.num_columns ? start + BLOCK : rows.num_columns;
        Float sum_of_exp = splat(0), sum_of_product = splat(0);
        visit_vectors(start, stop, [&](int64_t column, auto count) {
            const Float u = transform.u(load_count<Type>(row + column, count, -INFINITY));
            Float shifted = (u - maximum) * transform.gain;
            for (int64_t i = count; i < WIDTH; ++i) shifted[i] = LOWEST;
            const Float e = exp(shifted);
            sum_of_exp += e;
            sum_of_product += e * (shifted < LOWEST ? splat(LOWEST) : shifted);
        });
        total += sum(sum_of_exp);
        weighted += sum(sum_of_product);
    }
    const double log_total = std::log(total);
    rows.maximum[index] = maximum;
    rows.log_total[index] = static_cast<float>(log_total);
    const int64_t target = rows.targets[index];
    if (target == rows.ignore_index) {
        rows.logprob[index] = rows.entropy[index] = 0;
        return;
    }
    // a number from another row would look like a log-prob
    const bool inside = holds(target, rows.num_columns);
    const float u = inside ? transform.u(load_count<Type>(row + target, 1))[0] : NAN;
    const float entropy = static_cast<float>(log_total - weighted / total);
    rows.logprob[index] = static_cast<float>((u - maximum) * transform.gain - log_total);
    rows.entropy[index] = entropy < 0 ? 0 : entropy;
}

template <typename Type>
void backward_row(const Rows& rows, int64_t index) {
    typedef typename Type::Element Element;
    const auto* row = static_cast<const Element*>(rows.logits) + index * rows.row_stride;
    auto* gradient = static_cast<Element*>(rows.gradient) + index * rows.num_columns;
    const int64_t target = rows.targets[index];
    if (target == rows.ignore_index) {
        memset(gradient, 0, rows.num_columns * sizeof(Element));
        return;
    }
    const Transform transform(rows, index);
    const float maximum = rows.maximum[index], log_total = rows.log_total[index];
    const bool inside = holds(target, rows.num_columns);
    const float g = inside ? rows.grad_logprob[index] : NAN, entropy = rows.entropy[index];
    const float e = rows.grad_entropy ? rows.grad_entropy[index] : 0.0f;
    // 1 - p from the log-prob: exact where p is near 1
    const float rest = -std::expm1(rows.logprob[index]);
    const auto write = [&](int64_t column, auto count, bool at_target) {
        const Float u = transform.u(load_count<Type>(row + column, count));
        const Float log_p = (u - maximum) * transform.gain - log_total;
        const Float p = exp(log_p);
        Float result = g * (at_target ? splat(rest) : -p);
        if (rows.grad_entropy)
            result -= e * p * ((log_p < LOWEST ? splat(LOWEST) : log_p) + entropy);
        store_count<Type>(gradient + column, result * transform.slope(u), count);
    };
    visit_vectors(0, rows.num_columns,
                  [&](int64_t column, auto count) { write(column, count, false); });
    if (inside) write(target, int64_t{1}, true);
}

}  // namespace

void run_token_logprob(const Rows& rows, int64_t first, int64_t last) {
    void (*const functions[2][3])(const Rows&, int64_t) = {
        {forward_row<Float32>, forward_row<BFloat16>, forward_row<Float16>},
        {backward_row<Float32>, backward_row<BFloat16>, backward_row<Float16>},
    };
    auto* const function = functions[rows.gradient != nullptr][rows.dtype];
    for (int64_t index = first; index < last; ++index) function(rows, index);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
