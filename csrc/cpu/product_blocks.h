// The blocks of a bfloat16 product on a CPU, after Goto and van de Geijn
// (doi:10.1145/1356052.1356053): a block of A in the second-level cache, panels of B streamed past
// it, a tile of C at a time. The instructions take pairs (k, k + 1) of the depth, so panels consist
// of such pairs. A `Kernel` has its tile's size, what it multiplies at once, and A's panels.
//
// Each file that includes this is compiled for other instructions: its functions are its own.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "product_bf16.h"

namespace fastalign {
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK_ROWS = 256;
constexpr int64_t BLOCK_B_BYTES = 2 << 20;
// A C of more bytes than this leaves the caches before it is read: it is written past them, so that
// no line of it is read first.
constexpr int64_t STREAMED_BYTES = 8 << 20;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<uint32_t, Free> Panels;

Panels new_panels(int64_t pairs, int64_t width) {
    return Panels(static_cast<uint32_t*>(std::aligned_alloc(64, pairs * width * 4)));
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Transposes 16 vectors of 16 pairs.
inline void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// One panel[pair][line] from lines that are contiguous along the depth: line i begins at
// from + i * stride.
void pack_lines(const uint16_t* from, int64_t stride, int64_t num_lines, int64_t depth,
                int64_t width, uint32_t* panel) {
    for (int64_t line = 0; line < width; line += LANES) {
        const int64_t here = std::clamp<int64_t>(num_lines - line, 0, LANES);
        const int64_t kept = std::min(LANES, width - line);
        const __mmask16 stored = static_cast<__mmask16>((1u << kept) - 1);
        for (int64_t k = 0; k < depth; k += 2 * LANES) {
            const int64_t count = std::min(depth - k, 2 * LANES);
            const __mmask32 mask = static_cast<__mmask32>((1ull << count) - 1);
            __m512i v[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                v[i] = i < here ? _mm512_maskz_loadu_epi16(mask, from + (line + i) * stride + k)
                                : _mm512_setzero_si512();
            }
            transpose(v);
            for (int64_t pair = 0; 2 * pair < count; ++pair) {
                _mm512_mask_storeu_epi32(panel + (k / 2 + pair) * width + line, stored, v[pair]);
            }
        }
    }
}

// Pairs (k, k + 1) of 16 lines that are contiguous across; zeros beyond the mask and the depth.
inline __m512i load_pairs(const uint16_t* at, int64_t stride, __mmask16 mask, bool has_second) {
    const __m256i low = _mm256_maskz_loadu_epi16(mask, at);
    const __m256i high =
        has_second ? _mm256_maskz_loadu_epi16(mask, at + stride) : _mm256_setzero_si256();
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Panels from lines that are contiguous across: element k of line i is at from[k * stride + i]. A
// few k at a time for all panels: rows far apart share the same few sets of a cache.
void pack_across(const uint16_t* from, int64_t stride, int64_t num_lines, int64_t depth,
                 int64_t pairs, int64_t width, uint32_t* panels) {
    constexpr int64_t STEP = 8;
    for (int64_t start = 0; start < depth; start += STEP) {
        const int64_t stop = std::min(start + STEP, depth);
        for (int64_t line = 0; line < num_lines; line += LANES) {
            const int64_t here = std::min(LANES, num_lines - line);
            const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1);
            for (int64_t k = start; k < stop; k += 2) {
                const __m512i both =
                    load_pairs(from + k * stride + line, stride, mask, k + 1 < depth);
                // 16 lines are two panels of A, or a third of a panel of B
                uint32_t* to = panels + line / width * pairs * width + k / 2 * width + line % width;
                if (width >= LANES) {
                    _mm512_storeu_si512(to, both);
                } else {
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                        _mm512_castsi512_si256(both));
                    if (here <= width) continue;
                    to += pairs * width;
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                        _mm512_extracti64x4_epi64(both, 1));
                }
            }
        }
    }
}

// Panels[pair][line] of `width` lines (8 or a multiple of 16) and `pairs` pairs, zeros behind the
// depth; a matrix's lines are A's rows or B's columns. What is beyond the lines is not read as part
// of the result.
void pack(const uint16_t* from, int64_t line_stride, int64_t depth_stride, int64_t num_lines,
          int64_t depth, int64_t pairs, int64_t width, uint32_t* panels) {
    const int64_t there = (depth + 1) / 2;
    if (depth_stride != 1) {
        pack_across(from, depth_stride, num_lines, depth, pairs, width, panels);
    }
    for (int64_t line = 0; line < num_lines; line += width, panels += pairs * width) {
        if (depth_stride == 1) {
            pack_lines(from + line * line_stride, line_stride, std::min(width, num_lines - line),
                       depth, width, panels);
        }
        std::memset(panels + there * width, 0, (pairs - there) * width * 4);
    }
}

// How a tile is written to C; STREAMED asks for vectors at multiples of 64 bytes.
enum class Store { WRITTEN, ADDED, STREAMED };

// Writes up to 16 floats to C.
inline void store_vector(float* at, __m512 sum, int64_t columns, Store store) {
    const __mmask16 mask =
        static_cast<__mmask16>((1u << std::clamp<int64_t>(columns, 0, LANES)) - 1);
    if (store == Store::ADDED) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, at));
    if (store == Store::STREAMED && columns >= LANES) {
        _mm512_stream_ps(at, sum);
    } else {
        _mm512_mask_storeu_ps(at, mask, sum);
    }
}

// True if the part of C is written once, is large, and its whole vectors are aligned.
bool streams(const Product& product, int64_t block_depth, int64_t num_rows, int64_t first_column,
             int64_t last_column) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(product.c + first_column);
    return !product.accumulate && product.depth <= block_depth &&
           (first | 4 * static_cast<uintptr_t>(product.c_stride)) % 64 == 0 &&
           num_rows * (last_column - first_column) * 4 > STREAMED_BYTES;
}

// The part of C in the given rows and columns.
template <typename Kernel>
void run_blocks(const Product& product, int64_t first_row, int64_t last_row, int64_t first_column,
                int64_t last_column) {
    constexpr int64_t TILE_ROWS = Kernel::TILE_ROWS, TILE_COLUMNS = Kernel::TILE_COLUMNS;
    const Matrix &a = product.a, &b = product.b;
    if (product.depth == 0 && !product.accumulate) {
        for (int64_t row = first_row; row < last_row; ++row) {
            std::fill(product.c + row * product.c_stride + first_column,
                      product.c + row * product.c_stride + last_column, 0.0f);
        }
    }
    const int64_t all = std::max<int64_t>(1, product.depth);
    const int64_t num_blocks = (all + Kernel::BLOCK_DEPTH - 1) / Kernel::BLOCK_DEPTH;
    const int64_t block_depth =  // blocks of about the same depth: none is short
        round_up((all + num_blocks - 1) / num_blocks, 2 * Kernel::PAIRS_AT_ONCE);
    const int64_t fitting = BLOCK_B_BYTES / (2 * block_depth) / TILE_COLUMNS * TILE_COLUMNS;
    const int64_t block_columns = std::min(std::max(fitting, TILE_COLUMNS),
                                           round_up(last_column - first_column, TILE_COLUMNS));
    const bool streamed =
        streams(product, block_depth, last_row - first_row, first_column, last_column);
    const Panels of_a = new_panels(block_depth / 2, BLOCK_ROWS);
    const Panels of_b = new_panels(block_depth / 2, block_columns);
    for (int64_t column = first_column; column < last_column; column += block_columns) {
        const int64_t columns = std::min(block_columns, last_column - column);
        for (int64_t k = 0; k < product.depth; k += block_depth) {
            const int64_t depth = std::min(block_depth, product.depth - k);
            const int64_t pairs = round_up((depth + 1) / 2, Kernel::PAIRS_AT_ONCE);
            const Store store = product.accumulate || k > 0 ? Store::ADDED
                                : streamed                  ? Store::STREAMED
                                                            : Store::WRITTEN;
            pack(b.data + k * b.row_stride + column * b.column_stride, b.column_stride,
                 b.row_stride, columns, depth, pairs, TILE_COLUMNS, of_b.get());
            for (int64_t row = first_row; row < last_row; row += BLOCK_ROWS) {
                const int64_t rows = std::min(BLOCK_ROWS, last_row - row);
                Kernel::pack_rows(a.data + row * a.row_stride + k * a.column_stride, a.row_stride,
                                  a.column_stride, rows, depth, pairs, of_a.get());
                for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
                    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
                        Kernel::multiply_tile(of_a.get() + i * pairs, of_b.get() + j * pairs, pairs,
                                              product.c + (row + i) * product.c_stride + column + j,
                                              product.c_stride, rows - i, columns - j, store);
                    }
                }
            }
        }
    }
    if (streamed) _mm_sfence();  // before another thread reads C
}

}  // namespace
}  // namespace fastalign
