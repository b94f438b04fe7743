// The rows of head_tile_statistics and head_tile_gradient for one instruction set. A row stays in
// the second-level cache between the readings of one pass.
#include "head_tile_split_rows.h"

#include "head_tile_row.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

Row row_of(const SplitTile& tile, int64_t index) {
    return make_row(tile.x + index * tile.row_stride, tile.num_columns, tile.targets[index],
                    tile.softcap, tile.logit_scale,
                    tile.temperature ? tile.temperature[index] : 1.0f);
}

template <bool SOFTCAP>
float u_of(const Row& row, float x) {
    return OnTheFly<SOFTCAP>::u(row, splat(x))[0];
}

template <bool SOFTCAP>
void run_statistics(const SplitTile& tile, const TileStatistics& found, int64_t index) {
    typedef OnTheFly<SOFTCAP> Reading;
    Row row = row_of(tile, index);
    const float maximum = u_of<SOFTCAP>(row, row_maximum<Float32>(row.x, row.num_columns));
    // nothing but -inf: the sums are 0, where -inf - -inf would be NaN
    row.maximum = maximum == -INFINITY ? 0.0f : maximum;
    found.weighted ? read_sums<Reading, false, true>(row) : read_sums<Reading, false, false>(row);
    found.maximum[index] = maximum;
    found.total[index] = static_cast<float>(row.total);
    if (found.weighted) found.weighted[index] = static_cast<float>(row.weighted);
    found.target[index] = holds_target(row) ? u_of<SOFTCAP>(row, row.x[row.target]) : 0.0f;
}

void write_zeros(const TileStatistics& found, int64_t index) {
    for (float* value : {found.maximum, found.total, found.weighted, found.target})
        if (value) value[index] = 0;
}

template <typename Type>
void run_gradient(const SplitTile& tile, const TileGradient& wanted, int64_t index) {
    auto* gradient =
        static_cast<typename Type::Element*>(wanted.gradient) + index * wanted.gradient_stride;
    if (tile.ignored[index]) {
        memset(gradient, 0, tile.num_columns * sizeof(*gradient));
        return;
    }
    const bool softcap = tile.softcap > 0, of_entropy = wanted.grad_entropy != nullptr;
    Row row = row_of(tile, index);
    row.grad_logprob = wanted.grad_logprob ? wanted.grad_logprob[index] : 1.0f;
    row.grad_entropy = of_entropy ? wanted.grad_entropy[index] : 0.0f;
    row.entropy = of_entropy ? wanted.entropy[index] : 0.0f;
    row.maximum = wanted.maximum[index];
    row.log_total = wanted.log_total[index];
    row.total = std::exp(row.log_total);
    if (holds_target(row)) {
        const float x = row.x[row.target], u = softcap ? u_of<true>(row, x) : u_of<false>(row, x);
        row.logprob = (u - row.maximum) * row.gain - row.log_total;
    }
    write_any_gradient<OnTheFly, Type>(row, softcap, of_entropy, gradient);
}

}  // namespace

void run_head_tile_statistics(const SplitTile& tile, const TileStatistics& found, int64_t first,
                              int64_t last) {
    for (int64_t index = first; index < last; ++index) {
        if (tile.ignored[index]) {
            write_zeros(found, index);
        } else if (tile.softcap > 0) {
            run_statistics<true>(tile, found, index);
        } else {
            run_statistics<false>(tile, found, index);
        }
    }
}

void run_head_tile_gradient(const SplitTile& tile, const TileGradient& wanted, int64_t first,
                            int64_t last) {
    for (int64_t index = first; index < last; ++index) {
        if (wanted.gradient_dtype == 0) {
            run_gradient<Float32>(tile, wanted, index);
        } else {
            run_gradient<BFloat16>(tile, wanted, index);
        }
    }
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
