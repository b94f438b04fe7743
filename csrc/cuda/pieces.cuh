// A row in pieces of 16 bytes, and its ends element by element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fastalign {

// Elements to float and back, rounded to the nearest.
__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// Calls visit(column, whole) on one thread's share of a row: whole says that 16 bytes begin there,
// at a multiple of 16; else it is one element, before the first such place or after the last.
template <int THREADS, typename T, typename Visit>
__device__ void for_each_piece(const T* row, int64_t num_columns, int thread, Visit visit) {
    constexpr int PER_PIECE = 16 / sizeof(T);
    const int64_t misplaced = (reinterpret_cast<uintptr_t>(row) % 16) / sizeof(T);
    int64_t head = misplaced == 0 ? 0 : PER_PIECE - misplaced;
    head = head < num_columns ? head : num_columns;
    const int64_t num_pieces = (num_columns - head) / PER_PIECE;
    if (thread < head) visit(static_cast<int64_t>(thread), false);
    for (int64_t piece = thread; piece < num_pieces; piece += THREADS)
        visit(head + piece * PER_PIECE, true);
    const int64_t tail = head + num_pieces * PER_PIECE;
    if (tail + thread < num_columns) visit(tail + thread, false);
}

}  // namespace fastalign
