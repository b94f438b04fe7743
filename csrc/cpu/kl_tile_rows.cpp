// The rows of kl_tile for one instruction set: both rows stay in the second-level cache between
// their three readings (maxima; sums; gradients), so that memory sees one read and one write.
#include "kl_tile_rows.h"

#include <cmath>

#include "divergence.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

struct Row {
    float *policy, *reference;  // with a softcap, later their tanh
    int64_t num_columns, target;
    bool softcap;
    float gain, slope;  // z = gain * x up to a constant; dz / dx, less the tanh's own derivative
    float policy_maximum, reference_maximum;
    double logprob;

    Shifted read(int64_t column, int64_t count) const {
        const Float z = load_count<Float32>(policy + column, count);
        const Float r = load_count<Float32>(reference + column, count);
        return {bounded((z - policy_maximum) * gain), bounded((r - reference_maximum) * gain)};
    }
};

void apply_softcap(float* x, int64_t num_columns, float scale) {
    visit_vectors(0, num_columns, [&](int64_t column, auto count) {
        const Float value = load_count<Float32>(x + column, count);
        store_count<Float32>(x + column, tanh(value * scale), count);
    });
}

// What goes into `gradient` and, for brackets, into `kl_gradient`.
struct Written {
    Float first, second;
};

template <typename Type, bool OVER_REFERENCE, bool BRACKETS>
void write_gradients(const KLTile& tile, const Row& row, const Divergence& found, int64_t index) {
    typedef typename Type::Element Element;
    auto* first = static_cast<Element*>(tile.gradient) + index * tile.gradient_stride;
    auto* second = static_cast<Element*>(tile.kl_gradient) + index * tile.gradient_stride;
    const float scale = static_cast<float>(1.0 / found.policy_total);
    const float ratio = static_cast<float>(found.policy_total / found.reference_total);
    const float mean = static_cast<float>(found.mean);
    // 1 - p from the log-prob: exact where p is near 1
    const float rest = static_cast<float>(-std::expm1(row.logprob));
    const float offset = static_cast<float>(found.entropy - std::log(found.policy_total));
    const bool inside = holds(row.target, row.num_columns);
    const float g = !inside ? NAN : BRACKETS ? 1.0f : tile.grad_logprob[index];
    const float e = BRACKETS ? 0.0f : tile.grad_entropy[index];
    const float of_upstream = BRACKETS ? 1.0f : tile.grad_kl[index];
    const float k = found.infinite() && of_upstream != 0 ? NAN : of_upstream;
    const auto compute = [&](int64_t column, auto count, bool at_target) {
        const Shifted at = row.read(column, count);
        const Float exponential = exp(at.policy), p = exponential * scale;
        // in this order it is exactly zero where the two sides are the same
        const Float of_kl = OVER_REFERENCE ? (exponential - exp(at.reference) * ratio) * scale
                                           : p * ((at.policy - at.reference) - mean);
        const Float of_logprob = at_target ? splat(rest) : -p;
        Float slope = splat(row.slope);
        if (row.softcap) {
            const Float u = load_count<Float32>(row.policy + column, count);
            slope = row.slope * (1.0f - u * u);
        }
        if (BRACKETS) return Written{g * of_logprob * slope, of_kl * (slope * k)};
        return Written{(g * of_logprob + k * of_kl - e * p * (at.policy + offset)) * slope, slope};
    };
    Written target{};  // computed before it is overwritten
    if (inside) target = compute(row.target, int64_t{1}, true);
    visit_vectors(0, row.num_columns, [&](int64_t column, auto count) {
        const Written written = compute(column, count, false);
        store_count<Type>(first + column, written.first, count);
        if (BRACKETS) store_count<Type>(second + column, written.second, count);
    });
    if (inside) store_count<Type>(first + row.target, target.first, 1);
}

void write_zeros(const KLTile& tile, int64_t index) {
    tile.logprob[index] = tile.reference_logprob[index] = tile.entropy[index] = tile.kl[index] = 0;
    const int64_t size = tile.gradient_dtype == 0 ? 4 : 2;
    for (void* place : {tile.gradient, tile.kl_gradient}) {
        if (place == nullptr) continue;
        memset(static_cast<char*>(place) + index * tile.gradient_stride * size, 0,
               tile.num_columns * size);
    }
}

template <bool OVER_REFERENCE>
void run_row(const KLTile& tile, int64_t index) {
    if (tile.ignored[index]) return write_zeros(tile, index);
    const float cooling = tile.temperature ? 1.0f / tile.temperature[index] : 1.0f;
    Row row{};
    row.policy = tile.policy + index * tile.row_stride;
    row.reference = tile.reference + index * tile.row_stride;
    row.num_columns = tile.num_columns;
    row.target = tile.targets[index];
    row.softcap = tile.softcap > 0;
    row.slope = tile.logit_scale * cooling;
    row.gain = row.softcap ? tile.softcap * cooling : row.slope;
    if (row.softcap) {
        apply_softcap(row.policy, row.num_columns, tile.logit_scale / tile.softcap);
        apply_softcap(row.reference, row.num_columns, tile.logit_scale / tile.softcap);
    }
    row.policy_maximum = row_maximum<Float32>(row.policy, row.num_columns);
    row.reference_maximum = row_maximum<Float32>(row.reference, row.num_columns);
    const Divergence found = read_divergence<OVER_REFERENCE>(
        row.num_columns, [&](int64_t column, auto count) { return row.read(column, count); });
    // a number from another row would look like a log-prob
    const bool inside = holds(row.target, row.num_columns);
    const float z = inside ? row.policy[row.target] : NAN;
    const float r = inside ? row.reference[row.target] : NAN;
    const float shifted = (z - row.policy_maximum) * row.gain;
    const float reference_shifted = (r - row.reference_maximum) * row.gain;
    row.logprob = shifted - std::log(found.policy_total);
    tile.logprob[index] = static_cast<float>(row.logprob);
    tile.reference_logprob[index] =
        static_cast<float>(reference_shifted - std::log(found.reference_total));
    tile.entropy[index] = static_cast<float>(found.entropy);
    tile.kl[index] = static_cast<float>(found.kl);
    if (!tile.gradient) return;
    if (tile.gradient_dtype == 0) {
        tile.kl_gradient ? write_gradients<Float32, OVER_REFERENCE, true>(tile, row, found, index)
                         : write_gradients<Float32, OVER_REFERENCE, false>(tile, row, found, index);
    } else {
        tile.kl_gradient
            ? write_gradients<BFloat16, OVER_REFERENCE, true>(tile, row, found, index)
            : write_gradients<BFloat16, OVER_REFERENCE, false>(tile, row, found, index);
    }
}

}  // namespace

void run_kl_tile(const KLTile& tile, int64_t first, int64_t last) {
    auto* const function = tile.over_reference ? run_row<true> : run_row<false>;
    for (int64_t index = first; index < last; ++index) function(tile, index);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
