// The rows of head_tile for one instruction set: a row stays in the second-level cache between its
// three readings (maximum; sums of exponentials; gradient), so that memory sees one read and one
// write.
#include "head_tile_rows.h"

#include "head_tile_row.h"

namespace fastalign {
namespace FASTALIGN_ISA {
namespace {

void apply_softcap(Row& row) {
    visit_vectors(0, row.num_columns, [&](int64_t column, auto count) {
        const Float x = load_count<Float32>(row.x + column, count);
        store_count<Float32>(row.x + column, tanh(x * row.cap_scale), count);
    });
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

template <typename Type>
void write_row_gradient(const HeadTile& tile, const Row& row, int64_t index) {
    auto* gradient =
        static_cast<typename Type::Element*>(tile.gradient) + index * tile.gradient_stride;
    write_any_gradient<InPlace, Type>(row, tile.softcap > 0, tile.grad_entropy != nullptr,
                                      gradient);
}

void run_row(const HeadTile& tile, int64_t index) {
    if (tile.ignored[index]) return write_zeros(tile, index);
    const bool softcap = tile.softcap > 0, of_entropy = tile.grad_entropy != nullptr;
    Row row =
        make_row(tile.x + index * tile.row_stride, tile.num_columns, tile.targets[index],
                 tile.softcap, tile.logit_scale, tile.temperature ? tile.temperature[index] : 1.0f);
    // NaN, and so are the log-prob and the gradient, where the target is no column
    row.grad_logprob = !holds_target(row) ? NAN : tile.grad_logprob ? tile.grad_logprob[index] : 1;
    row.grad_entropy = of_entropy ? tile.grad_entropy[index] : 0.0f;
    if (softcap) apply_softcap(row);
    row.maximum = row_maximum<Float32>(row.x, row.num_columns);
    typedef InPlace<false> Reading;
    const float at_target = holds_target(row) ? row.x[row.target] : NAN;
    const float shifted = (at_target - row.maximum) * row.gain;
    const bool keep = tile.gradient && !softcap && !of_entropy;
    if (tile.entropy || of_entropy) {
        keep ? read_sums<Reading, true, true>(row) : read_sums<Reading, false, true>(row);
    } else {
        keep ? read_sums<Reading, true, false>(row) : read_sums<Reading, false, false>(row);
    }
    row.log_total = std::log(row.total);
    row.entropy = row.log_total - row.weighted / row.total;
    row.logprob = shifted - row.log_total;
    tile.logprob[index] = static_cast<float>(row.logprob);
    tile.is_argmax[index] = shifted >= 0;
    // rounding may leave a sure row a hair below zero
    if (tile.entropy) tile.entropy[index] = row.entropy < 0 ? 0 : static_cast<float>(row.entropy);
    if (!tile.gradient) return;
    if (tile.gradient_dtype == 0) {
        write_row_gradient<Float32>(tile, row, index);
    } else {
        write_row_gradient<BFloat16>(tile, row, index);
    }
}

}  // namespace

void run_head_tile(const HeadTile& tile, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) run_row(tile, index);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
