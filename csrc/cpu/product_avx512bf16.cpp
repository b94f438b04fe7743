// The product by AVX-512's bfloat16 instructions: dot products of pairs, a tile of C in registers.
#include "product_blocks.h"

namespace fastalign {
namespace {

inline __m512bh as_pairs(__m512i value) { return reinterpret_cast<__m512bh>(value); }

struct Avx512 {
    static constexpr int64_t TILE_VECTORS = 3;
    static constexpr int64_t TILE_ROWS = 8, TILE_COLUMNS = TILE_VECTORS * LANES;
    static constexpr int64_t BLOCK_DEPTH = 1024, PAIRS_AT_ONCE = 1;

    // A's panels are like B's.
    static void pack_rows(const uint16_t* from, int64_t row_stride, int64_t depth_stride,
                          int64_t rows, int64_t depth, int64_t pairs, uint32_t* panels) {
        pack(from, row_stride, depth_stride, rows, depth, pairs, TILE_ROWS, panels);
    }

    // C's tile of TILE_ROWS x TILE_COLUMNS, of which rows x columns exist.
    static inline void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                                     int64_t stride, int64_t rows, int64_t columns, Store store) {
        __m512 sums[TILE_ROWS][TILE_VECTORS];
        for (auto& row : sums)
            for (auto& sum : row) sum = _mm512_setzero_ps();
        for (int64_t pair = 0; pair < pairs; ++pair, a += TILE_ROWS, b += TILE_COLUMNS) {
            __m512bh right[TILE_VECTORS];
            for (int64_t j = 0; j < TILE_VECTORS; ++j) {
                right[j] = as_pairs(_mm512_load_si512(b + j * LANES));
            }
            for (int64_t i = 0; i < TILE_ROWS; ++i) {
                const __m512bh left = as_pairs(_mm512_set1_epi32(static_cast<int>(a[i])));
                for (int64_t j = 0; j < TILE_VECTORS; ++j) {
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
                }
            }
        }
        for (int64_t i = 0; i < TILE_ROWS; ++i) {
            if (i >= rows) continue;
            for (int64_t j = 0; j < TILE_VECTORS; ++j) {
                store_vector(c + i * stride + j * LANES, sums[i][j], columns - j * LANES, store);
            }
        }
    }
};

}  // namespace

void run_product(const Product& product, int64_t first_row, int64_t last_row, int64_t first_column,
                 int64_t last_column) {
    run_blocks<Avx512>(product, first_row, last_row, first_column, last_column);
}

}  // namespace fastalign
