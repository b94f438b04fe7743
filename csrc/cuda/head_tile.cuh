// What the passes over a head's tile share: head_tile, and head_tile_statistics and
// head_tile_gradient. A block a row; 16-byte accesses where rows are aligned.
#pragma once

#include <cuda_bf16.h>

#include "reduce.cuh"
#include "row_gradient.cuh"

namespace fastalign {

constexpr int THREADS = 512;
constexpr int PIECE = 8;  // columns a thread takes at a time: 32 bytes in, 16 or 32 out

template <bool ALIGNED>
__device__ inline void load_piece(const float* from, int count, float padding, float* values) {
    if (ALIGNED && count == PIECE) {
        *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(from);
        *reinterpret_cast<float4*>(values + 4) = *reinterpret_cast<const float4*>(from + 4);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i) values[i] = i < count ? from[i] : padding;
}

template <bool ALIGNED>
__device__ inline void store_piece(float* to, int count, const float* values) {
    if (ALIGNED && count == PIECE) {
        __stcs(reinterpret_cast<float4*>(to), *reinterpret_cast<const float4*>(values));
        __stcs(reinterpret_cast<float4*>(to + 4), *reinterpret_cast<const float4*>(values + 4));
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (i < count) to[i] = values[i];
}

template <bool ALIGNED>
__device__ inline void store_piece(__nv_bfloat16* to, int count, const float* values) {
    __nv_bfloat162 pairs[PIECE / 2];
#pragma unroll
    for (int i = 0; i < PIECE / 2; ++i)
        pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    if (ALIGNED && count == PIECE) {
        __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(pairs));
        return;
    }
    const __nv_bfloat16* rounded = reinterpret_cast<const __nv_bfloat16*>(pairs);
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (i < count) to[i] = rounded[i];
}

// Of z, but for the maximum, which is that of u: the target's u less it is exactly 0 where it is
// it.
template <bool ALIGNED>
__device__ Softmax read_statistics(const float* row, int64_t num_columns,
                                   const RowTransform& transform) {
    Softmax mine = Softmax::empty();
    for (int64_t column = threadIdx.x * PIECE; column < num_columns; column += THREADS * PIECE) {
        const int count = num_columns - column < PIECE ? num_columns - column : PIECE;
        alignas(16) float x[PIECE];
        load_piece<ALIGNED>(row + column, count, 0.0f, x);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            if (i >= count) continue;
            mine.add(transform.u(x[i]), transform.gain);
        }
    }
    return reduce_block<THREADS>(mine, transform.gain);
}

template <typename T, bool ALIGNED>
__device__ void write_gradient(const float* row, T* gradient, int64_t num_columns,
                               const RowTransform& transform, const RowGradient& known) {
    const float rest = known.rest();
    for (int64_t column = threadIdx.x * PIECE; column < num_columns; column += THREADS * PIECE) {
        const int count = num_columns - column < PIECE ? num_columns - column : PIECE;
        alignas(16) float values[PIECE];
        load_piece<ALIGNED>(row + column, count, 0.0f, values);
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            values[i] = known.by_product(transform, transform.u(values[i]), column + i, rest);
        store_piece<ALIGNED>(gradient + column, count, values);
    }
}

// Whether rows begin at 16-byte boundaries.
inline bool aligned(const void* start, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(start) % 16 == 0 && stride * size % 16 == 0;
}

}  // namespace fastalign
