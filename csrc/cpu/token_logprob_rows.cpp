// The rows of token_logprob for one instruction set: compiled once for each, with FASTALIGN_ISA
// naming it.
#include "token_logprob_rows.h"

#include <cmath>

#include "vector.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

struct Transform {
    float softcap, scale;
    Float operator()(Float x) const {
        return (softcap > 0 ? softcap * tanh(x / softcap) : x) * scale;
    }
};

template <typename Type>
void forward_row(const Rows& rows, int64_t index) {
    const auto* row =
        static_cast<const typename Type::Element*>(rows.logits) + index * rows.row_stride;
    const Transform transform{rows.softcap,
                              rows.temperature ? 1.0f / rows.temperature[index] : 1.0f};
    // The transform rises, so the largest logit gives the largest z.
    const float maximum = transform(splat(row_maximum<Type>(row, rows.num_columns)))[0];
    double total = 0, weighted = 0;
    for (int64_t start = 0; start < rows.num_columns; start += BLOCK) {
        const int64_t stop = start + BLOCK < rows.num_columns ? start + BLOCK : rows.num_columns;
        Float sum_of_exp = splat(0), sum_of_product = splat(0);
        for (int64_t column = start; column < stop; column += WIDTH) {
            const bool whole = column + WIDTH <= stop;
            const Float x = whole ? Type::load(row + column)
                                  : load_tail<Type>(row + column, stop - column, -INFINITY);
            Float shifted = transform(x) - maximum;
            if (!whole) {
                for (int64_t i = stop - column; i < WIDTH; ++i) shifted[i] = LOWEST;
            }
            const Float e = exp(shifted);
            sum_of_exp += e;
            sum_of_product += e * (shifted < LOWEST ? splat(LOWEST) : shifted);
        }
        total += sum(sum_of_exp);
        weighted += sum(sum_of_product);
    }
    const double log_total = std::log(total);
    const int64_t target = rows.targets[index];
    const bool ignored = target == rows.ignore_index;
    rows.logsumexp[index] = static_cast<float>(maximum + log_total);
    if (ignored) {
        rows.logprob[index] = 0;
        rows.entropy[index] = 0;
        return;
    }
    const float z = transform(load_tail<Type>(row + target, 1, 0))[0];
    const float entropy = static_cast<float>(log_total - weighted / total);
    rows.logprob[index] = static_cast<float>((z - maximum) - log_total);
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
    const float scale = rows.temperature ? 1.0f / rows.temperature[index] : 1.0f;
    const float g = rows.grad_logprob[index], logsumexp = rows.saved_logsumexp[index];
    const float e = rows.grad_entropy ? rows.grad_entropy[index] : 0.0f;
    const float entropy = rows.saved_entropy[index];
    const bool of_entropy = rows.grad_entropy != nullptr;
    // `at_target` is 1 for the target's own column.
    auto compute = [&](Float x, Float at_target) {
        Float slope = splat(scale), value = x;
        if (rows.softcap > 0) {
            const Float t = tanh(x / rows.softcap);
            value = rows.softcap * t;
            slope = scale * (1.0f - t * t);
        }
        const Float log_p = value * scale - logsumexp;
        const Float p = exp(log_p);
        Float result = g * (at_target - p);
        if (of_entropy) result -= e * p * ((log_p < LOWEST ? splat(LOWEST) : log_p) + entropy);
        return result * slope;
    };
    int64_t column = 0;
    for (; column + WIDTH <= rows.num_columns; column += WIDTH) {
        Type::store(gradient + column, compute(Type::load(row + column), splat(0)));
    }
    if (column < rows.num_columns) {
        Element buffer[WIDTH];
        const int64_t count = rows.num_columns - column;
        Type::store(buffer, compute(load_tail<Type>(row + column, count, 0), splat(0)));
        memcpy(gradient + column, buffer, count * sizeof(Element));
    }
    Element buffer[WIDTH];
    Type::store(buffer, compute(load_tail<Type>(row + target, 1, 0), splat(1)));
    gradient[target] = buffer[0];
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
