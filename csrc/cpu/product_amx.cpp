// The product by AMX, the matrix unit of Intel's processors since Sapphire Rapids: a tile register
// has 16 rows of 64 bytes, and one instruction multiplies 16 rows by 16 columns over 16 pairs of
// the depth. Of eight registers two hold A, two hold B and four C.
#include <sys/syscall.h>
#include <unistd.h>

#include "product_blocks.h"

namespace fastalign {
namespace {

// Intel's SDM, volume 1, 18.4: the configuration of the eight tile registers.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t SIDE = 16;           // rows of a tile, and its columns of 4 bytes
constexpr int64_t TILE = SIDE * SIDE;  // elements of 4 bytes

struct Amx {
    static constexpr int64_t TILE_ROWS = 2 * SIDE, TILE_COLUMNS = 2 * SIDE;
    // A panel of B (32 columns) stays in the first-level cache while A's pass by.
    static constexpr int64_t BLOCK_DEPTH = 640, PAIRS_AT_ONCE = SIDE;

    // Panels of 16 rows: tiles[row][pair] along the depth.
    static void pack_rows(const uint16_t* from, int64_t row_stride, int64_t depth_stride,
                          int64_t num_rows, int64_t depth, int64_t pairs, uint32_t* tiles) {
        for (int64_t row = 0; row < num_rows; row += SIDE) {
            const int64_t rows = std::min(SIDE, num_rows - row);
            const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1);
            for (int64_t pair = 0; pair < pairs; pair += SIDE, tiles += TILE) {
                const int64_t k = 2 * pair, count = std::min(depth - k, 2 * SIDE);
                const uint16_t* at = from + row * row_stride + k * depth_stride;
                __m512i v[SIDE];
                if (depth_stride == 1) {
                    const __mmask32 mask = static_cast<__mmask32>((1ull << count) - 1);
                    for (int64_t i = 0; i < SIDE; ++i) {
                        v[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, at + i * row_stride)
                                        : _mm512_setzero_si512();
                    }
                } else {
                    for (int64_t i = 0; i < SIDE; ++i) {
                        v[i] = 2 * i < count ? load_pairs(at + 2 * i * depth_stride, depth_stride,
                                                          there, 2 * i + 1 < count)
                                             : _mm512_setzero_si512();
                    }
                    transpose(v);
                }
                for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(tiles + i * SIDE, v[i]);
            }
        }
        // the second panel of a tile of C is read even where no row of it exists
        if ((num_rows + SIDE - 1) / SIDE % 2) std::memset(tiles, 0, pairs * SIDE * 4);
    }

    static inline void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                                     int64_t stride, int64_t rows, int64_t columns, Store store) {
        const bool whole = rows >= TILE_ROWS && columns >= TILE_COLUMNS;
        const int64_t bytes = stride * 4;
        if (whole && store == Store::ADDED) {
            _tile_loadd(0, c, bytes);
            _tile_loadd(1, c + SIDE, bytes);
            _tile_loadd(2, c + SIDE * stride, bytes);
            _tile_loadd(3, c + SIDE * stride + SIDE, bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const uint32_t* below = a + pairs * SIDE;
        for (int64_t pair = 0; pair < pairs; pair += SIDE) {
            _tile_loadd(4, a + pair * SIDE, 64);
            _tile_loadd(6, b + pair * TILE_COLUMNS, 4 * TILE_COLUMNS);
            _tile_loadd(7, b + pair * TILE_COLUMNS + SIDE, 4 * TILE_COLUMNS);
            _tile_loadd(5, below + pair * SIDE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (whole && store != Store::STREAMED) {
            _tile_stored(0, c, bytes);
            _tile_stored(1, c + SIDE, bytes);
            _tile_stored(2, c + SIDE * stride, bytes);
            _tile_stored(3, c + SIDE * stride + SIDE, bytes);
            return;
        }
        alignas(64) float sums[TILE_ROWS * TILE_COLUMNS];
        _tile_stored(0, sums, 4 * TILE_COLUMNS);
        _tile_stored(1, sums + SIDE, 4 * TILE_COLUMNS);
        _tile_stored(2, sums + SIDE * TILE_COLUMNS, 4 * TILE_COLUMNS);
        _tile_stored(3, sums + SIDE * TILE_COLUMNS + SIDE, 4 * TILE_COLUMNS);
        for (int64_t i = 0; i < std::min(rows, TILE_ROWS); ++i) {
            for (int64_t j = 0; j < TILE_COLUMNS; j += LANES) {
                store_vector(c + i * stride + j, _mm512_load_ps(sums + i * TILE_COLUMNS + j),
                             columns - j, store);
            }
        }
    }
};

}  // namespace

bool request_amx() {
    // Linux lets a process use the tile registers, which enlarge its signal frames, once it asked.
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted =
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

void run_product_amx(const Product& product, int64_t first_row, int64_t last_row,
                     int64_t first_column, int64_t last_column) {
    static const TileConfiguration configuration;
    _tile_loadconfig(&configuration);  // of this thread
    run_blocks<Amx>(product, first_row, last_row, first_column, last_column);
    _tile_release();
}

}  // namespace fastalign
