// The running statistics of a softmax, and their reduction over a block.
#pragma once

#include <cuda_runtime.h>
#include <math_constants.h>

namespace fastalign {

// maximum m, sum of exp(z - m), and sum of (z - m) exp(z - m). With a scale, z is the scale times
// what is added, and the maximum is of what is added: a difference before its product loses
// nothing.
struct Softmax {
    float maximum, total, weighted;

    __device__ static Softmax empty() { return {-CUDART_INF_F, 0.0f, 0.0f}; }

    // Rescales the statistics to a larger maximum. Before the first finite value the sums are 0 and
    // stay so (-inf - -inf is NaN).
    __device__ void raise(float to, float scale = 1.0f) {
        if (maximum == -CUDART_INF_F) {
            maximum = to;
            return;
        }
        const float drop = (maximum - to) * scale, shrink = expf(drop);
        if (drop == 0.0f) return;
        weighted = shrink * (weighted + drop * total);
        total *= shrink;
        maximum = to;
    }

    __device__ void add(float z, float scale = 1.0f) {
        if (z > maximum) raise(z, scale);
        float shifted = (z - maximum) * scale;
        shifted = shifted < -1e30f ? -1e30f : shifted;  // fmaxf would swallow a NaN
        if (z == -CUDART_INF_F) return;
        const float e = expf(shifted);
        total += e;
        weighted += e * shifted;
    }

    __device__ void merge(Softmax other, float scale = 1.0f) {
        if (other.maximum > maximum) raise(other.maximum, scale);
        if (other.maximum < maximum && other.maximum != -CUDART_INF_F) other.raise(maximum, scale);
        total += other.total;
        weighted += other.weighted;
    }
};

// The block's statistics, in every thread of the first warp's lane 0 and, after the barrier, in
// shared memory.
template <int THREADS>
__device__ Softmax reduce_block(Softmax mine, float scale = 1.0f) {
    __shared__ Softmax of_warp[THREADS / 32];
    for (int offset = 16; offset > 0; offset >>= 1) {
        const Softmax other = {__shfl_down_sync(0xffffffffu, mine.maximum, offset),
                               __shfl_down_sync(0xffffffffu, mine.total, offset),
                               __shfl_down_sync(0xffffffffu, mine.weighted, offset)};
        mine.merge(other, scale);
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    Softmax result = of_warp[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) result.merge(of_warp[warp], scale);
    return result;
}

}  // namespace fastalign
