// What the rows of head_tile_statistics and head_tile_gradient work on, and their entry points for
// each instruction set.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace fastalign {

// A tile of products as both passes read it.
struct SplitTile {
    float* x;
    int64_t num_columns, row_stride;
    float softcap, logit_scale;
    const float* temperature;
    const int64_t* targets;
    const uint8_t* ignored;
};

struct TileStatistics {
    float *maximum, *total, *weighted, *target;
};

struct TileGradient {
    const float *maximum, *log_total, *entropy;
    void* gradient;
    int32_t gradient_dtype;
    int64_t gradient_stride;
    const float *grad_logprob, *grad_entropy;
};

}  // namespace fastalign

FASTALIGN_DECLARE(void, run_head_tile_statistics,
                  (const SplitTile& tile, const TileStatistics& found, int64_t first, int64_t last))
FASTALIGN_DECLARE(void, run_head_tile_gradient,
                  (const SplitTile& tile, const TileGradient& wanted, int64_t first, int64_t last))
