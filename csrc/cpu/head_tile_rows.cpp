// The rows of head_tile for one instruction set: a row stays in the second-level cache between its
// three readings (maximum; sums of exponentials; gradient), so that memory sees one read and one
// write.
#include "head_tile_rows.h"

#include <cmath>
#include <type_traits>

#include "vector.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

struct Row {
    float* x;  // with a softcap, later its tanh
    int64_t num_columns, target;
    float gain, slope;  // z = gain * x up to a constant; dz / dx, less the tanh's own derivative
    float grad_logprob, grad_entropy;
    // found by the first two readings
    float maximum;
    double total, log_total, entropy;
};

typedef std::integral_constant<int64_t, WIDTH> Whole;

// Calls visit(column, count) for whole vectors, whose count the compiler knows, and for the rest.
template <typename Visit>
inline void for_each_vector(int64_t start, int64_t stop, const Visit& visit) {
    int64_t column = start;
    for (; column + WIDTH <= stop; column += WIDTH) visit(column, Whole{});
    if (column < stop) visit(column, stop - column);
}

__attribute__((always_inline)) inline Float load(const float* from, int64_t count, float padding) {
    return count == WIDTH ? Float32::load(from) : load_tail<Float32>(from, count, padding);
}

template <typename Type>
__attribute__((always_inline)) inline void store(typename Type::Element* to, Float value,
                                                 int64_t count) {
    if (count == WIDTH) {
        Type::store(to, value);
        return;
    }
    typename Type::Element buffer[WIDTH];
    Type::store(buffer, value);
    memcpy(to, buffer, count * sizeof(*to));
}

void apply_softcap(const HeadTile& tile, Row& row) {
    const float scale = tile.logit_scale / tile.softcap;
    for_each_vector(0, row.num_columns, [&](int64_t column, auto count) {
        store<Float32>(row.x + column, tanh(load(row.x + column, count, 0) * scale), count);
    });
}

// The sums of e = exp(z - max z) and of e (z - max z); with KEEP the row becomes e.
template <bool KEEP, bool ENTROPY>
void read_sums(Row& row) {
    double total = 0, weighted = 0;
    for (int64_t start = 0; start < row.num_columns; start += BLOCK) {
        const int64_t stop = start + BLOCK < row.num_columns ? start + BLOCK : row.num_columns;
        Float sum_of_exp = splat(0), sum_of_product = splat(0);
        for_each_vector(start, stop, [&](int64_t column, auto count) {
            const Float x = load(row.x + column, count, -INFINITY);
            const Float shifted = (x - row.maximum) * row.gain;
            Float e = exp(shifted);
            // where every x is -inf, the padding would be NaN as well
            for (int64_t i = count; i < WIDTH; ++i) e[i] = 0;
            sum_of_exp += e;
            if (ENTROPY) sum_of_product += e * (shifted < LOWEST ? splat(LOWEST) : shifted);
            if (KEEP) store<Float32>(row.x + column, e, count);
        });
        total += sum(sum_of_exp);
        weighted += sum(sum_of_product);
    }
    row.total = total;
    row.log_total = std::log(total);
    row.entropy = row.log_total - weighted / total;
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
template <typename Type, bool SOFTCAP, bool ENTROPY>
void write_gradient(const Row& row, double logprob, typename Type::Element* gradient) {
    const bool kept = !SOFTCAP && !ENTROPY;
    const float scale = static_cast<float>(row.slope / row.total);
    const Coefficient coefficient{row.grad_logprob, row.grad_entropy,
                                  static_cast<float>(row.log_total),
                                  static_cast<float>(row.entropy)};
    const float at_target_x = row.x[row.target];
    const float plain = -row.grad_logprob * scale;
    for_each_vector(0, row.num_columns, [&](int64_t column, auto count) {
        const Float x = load(row.x + column, count, 0);
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
        store<Type>(gradient + column, result, count);
    });
    // 1 - p from the log-prob: exact where p is near 1
    double at_target = -row.grad_logprob * std::expm1(logprob);
    if (ENTROPY) at_target -= row.grad_entropy * std::exp(logprob) * (logprob + row.entropy);
    at_target *= row.slope;
    if (SOFTCAP) at_target *= 1.0f - at_target_x * at_target_x;
    store<Type>(gradient + row.target, splat(static_cast<float>(at_target)), 1);
}

template <typename Type>
void write_any_gradient(const HeadTile& tile, const Row& row, double logprob, int64_t index) {
    auto* gradient =
        static_cast<typename Type::Element*>(tile.gradient) + index * tile.gradient_stride;
    const bool softcap = tile.softcap > 0, entropy = tile.grad_entropy != nullptr;
    if (softcap) {
        entropy ? write_gradient<Type, true, true>(row, logprob, gradient)
                : write_gradient<Type, true, false>(row, logprob, gradient);
    } else {
        entropy ? write_gradient<Type, false, true>(row, logprob, gradient)
                : write_gradient<Type, false, false>(row, logprob, gradient);
    }
}

void write_zeros(const HeadTile& tile, int64_t index) {
    tile.logprob[index] = 0;
    if (tile.entropy) tile.entropy[index] = 0;
    tile.is_argmax[index] = 0;
    if (!tile.gradient) return;
    const int64_t size = tile.gradient_dtype == 0 ? 4 : 2;
    memset(static_cast<char*>(tile.gradient) + index * tile.gradient_stride * size, 0,
           tile.num_columns * size);
}

void run_row(const HeadTile& tile, int64_t index) {
    if (tile.ignored[index]) return write_zeros(tile, index);
    const bool softcap = tile.softcap > 0, of_entropy = tile.grad_entropy != nullptr;
    const float cooling = tile.temperature ? 1.0f / tile.temperature[index] : 1.0f;
    Row row{};
    row.x = tile.x + index * tile.row_stride;
    row.num_columns = tile.num_columns;
    row.target = tile.targets[index];
    row.slope = tile.logit_scale * cooling;
    row.gain = softcap ? tile.softcap * cooling : row.slope;
    row.grad_logprob = tile.grad_logprob ? tile.grad_logprob[index] : 1.0f;
    row.grad_entropy = of_entropy ? tile.grad_entropy[index] : 0.0f;
    if (softcap) apply_softcap(tile, row);
    row.maximum = row_maximum<Float32>(row.x, row.num_columns);
    const float shifted = (row.x[row.target] - row.maximum) * row.gain;
    const bool keep = tile.gradient && !softcap && !of_entropy;
    if (tile.entropy || of_entropy) {
        keep ? read_sums<true, true>(row) : read_sums<false, true>(row);
    } else {
        keep ? read_sums<true, false>(row) : read_sums<false, false>(row);
    }
    const double logprob = shifted - row.log_total;
    tile.logprob[index] = static_cast<float>(logprob);
    tile.is_argmax[index] = shifted >= 0;
    // rounding may leave a sure row a hair below zero
    if (tile.entropy) tile.entropy[index] = row.entropy < 0 ? 0 : static_cast<float>(row.entropy);
    if (!tile.gradient) return;
    if (tile.gradient_dtype == 0) {
        write_any_gradient<Float32>(tile, row, logprob, index);
    } else {
        write_any_gradient<BFloat16>(tile, row, logprob, index);
    }
}

}  // namespace

void run_head_tile(const HeadTile& tile, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) run_row(tile, index);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
