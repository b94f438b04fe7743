// Two rows that are read side by side, in pieces of eight columns: 16-byte accesses wherever both
// rows, of whatever dtypes, reach a multiple of 16 bytes at the same column.
#pragma once

#include <stdint.h>

#include "pieces.cuh"

namespace fastalign {

constexpr int PIECE = 8;

template <int COUNT>
struct Columns {
    static constexpr int count = COUNT;
};

template <typename T>
__device__ inline bool aligned(const T* place) {
    return reinterpret_cast<uintptr_t>(place) % 16 == 0;
}

// Calls visit(column, Columns<count>) on this thread's share of the columns: PIECE of them where
// both rows are aligned, one by one elsewhere.
template <int THREADS, typename A, typename B, typename Visit>
__device__ void for_each_pair_piece(const A* first, const B* second, int64_t num_columns,
                                    const Visit& visit) {
    int64_t head = 0;
    while (head < PIECE && !(aligned(first + head) && aligned(second + head))) ++head;
    if (head == PIECE || head > num_columns) head = num_columns;
    for (int64_t column = threadIdx.x; column < head; column += THREADS)
        visit(column, Columns<1>{});
    const int64_t num_pieces = (num_columns - head) / PIECE;
    for (int64_t piece = threadIdx.x; piece < num_pieces; piece += THREADS)
        visit(head + piece * PIECE, Columns<PIECE>{});
    const int64_t tail = head + num_pieces * PIECE + threadIdx.x;
    if (tail < num_columns) visit(tail, Columns<1>{});
}

// The same for rows that begin at multiples of 16 bytes, if `aligned` says so. A thread has the
// same columns in any case, so equal rows give equal bits wherever they lie.
template <int THREADS, typename Visit>
__device__ void for_each_fixed_piece(bool aligned, int64_t num_columns, const Visit& visit) {
    for (int64_t column = threadIdx.x * PIECE; column < num_columns; column += THREADS * PIECE) {
        const int64_t rest = num_columns - column;
        if (aligned && rest >= PIECE) {
            visit(column, Columns<PIECE>{});
        } else {
            for (int i = 0; i < PIECE && i < rest; ++i) visit(column + i, Columns<1>{});
        }
    }
}

// COUNT values, from an aligned place unless COUNT is 1.
template <int COUNT, typename T>
__device__ inline void load_columns(const T* from, float* values) {
    if constexpr (COUNT == 1) {
        values[0] = widened(*from);
    } else {
        constexpr int NUM_VECTORS = COUNT * sizeof(T) / 16;
        uint4 vectors[NUM_VECTORS];
#pragma unroll
        for (int i = 0; i < NUM_VECTORS; ++i) vectors[i] = reinterpret_cast<const uint4*>(from)[i];
        const T* narrow_values = reinterpret_cast<const T*>(vectors);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = widened(narrow_values[i]);
    }
}

template <int COUNT, typename T>
__device__ inline void store_columns(T* to, const float* values) {
    if (COUNT == 1 || !aligned(to)) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) narrow(values[i], to + i);
        return;
    }
    constexpr int NUM_VECTORS = (COUNT * sizeof(T) + 15) / 16;
    uint4 vectors[NUM_VECTORS];
    T* narrow_values = reinterpret_cast<T*>(vectors);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) narrow(values[i], narrow_values + i);
#pragma unroll
    for (int i = 0; i < NUM_VECTORS; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, vectors[i]);
}

}  // namespace fastalign
