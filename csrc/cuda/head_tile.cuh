// What the passes over a head's tile share: head_tile, and head_tile_statistics and
// head_tile_gradient. A block a row; 16-byte accesses where rows are aligned.
#pragma once

#include <cuda_bf16.h>

#include "launch.cuh"
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
    alignas(16) __nv_bfloat162 pairs[PIECE / 2];
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

// Calls visit(column, count) on this thread's pieces of a row: PIECE columns, a constant for the
// compiler, and at the row's end fewer.
template <typename Visit>
__device__ inline void for_each_tile_piece(int64_t num_columns, const Visit& visit) {
    int64_t column = threadIdx.x * PIECE;
    for (; column + PIECE <= num_columns; column += THREADS * PIECE) visit(column, PIECE);
    if (column < num_columns) visit(column, static_cast<int>(num_columns - column));
}

// Loads a piece as u, -inf behind the row's end.
template <bool ALIGNED>
__device__ inline void load_u(const float* from, int count, const RowTransform& transform,
                              float (&u)[PIECE]) {
    load_piece<ALIGNED>(from, count, 0.0f, u);
#pragma unroll
    for (int i = 0; i < PIECE; ++i) u[i] = i < count ? transform.u(u[i]) : -CUDART_INF_F;
}

// Of z, but for the maximum, which is that of u: the target's u less it is exactly 0 where it is
// it.
template <bool ALIGNED>
__device__ Softmax read_statistics(const float* row, int64_t num_columns,
                                   const RowTransform& transform) {
    const float scale = transform.gain * LOG2_E;
    Softmax mine = Softmax::empty();
    for_each_tile_piece(num_columns, [&](int64_t column, int count) {
        alignas(16) float u[PIECE];
        load_u<ALIGNED>(row + column, count, transform, u);
        mine.add(u, scale);
    });
    return reduce_block<THREADS>(mine, scale);
}

template <typename T, bool ALIGNED>
__device__ void write_gradient(const float* row, T* gradient, int64_t num_columns,
                               const RowTransform& transform, const RowGradient& known) {
    const float rest = known.rest();
    for_each_tile_piece(num_columns, [&](int64_t column, int count) {
        alignas(16) float values[PIECE];
        load_piece<ALIGNED>(row + column, count, 0.0f, values);
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            values[i] = known.by_product(transform, transform.u(values[i]), column + i, rest);
        store_piece<ALIGNED>(gradient + column, count, values);
    });
}

// Whether rows begin at 16-byte boundaries.
inline bool aligned(const void* start, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(start) % 16 == 0 && stride * size % 16 == 0;
}

}  // namespace fastalign
