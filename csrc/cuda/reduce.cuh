// The running statistics of a softmax, and their reduction over a block.
#pragma once

#include <cuda_runtime.h>
#include <math_constants.h>

namespace fastalign {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr float LOWEST = -1e30f;  // in place of a shifted -inf, which times 0 is NaN

// 2^x in one instruction, with a relative error of 2^-22; a denormal result is 0.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// The largest u, the sum of 2^t and that of t 2^t, where t = (u - maximum) scale: a difference
// before its product loses nothing. With a scale of LOG2_E times that of z, 2^t is exp(z - max z).
struct Softmax {
    float maximum, total, weighted;

    __device__ static Softmax empty() { return {-CUDART_INF_F, 0.0f, 0.0f}; }

    // Rescales the sums to a larger maximum. Before the first finite value they are 0 and stay so
    // (-inf - -inf is NaN).
    __device__ void raise(float to, float scale) {
        const float by = (maximum - to) * scale;  // may overflow, and 0 * -inf is NaN
        const float drop = maximum == -CUDART_INF_F ? 0.0f : fmaxf(by, LOWEST);
        const float shrink = exp2_fast(drop);
        weighted = shrink * (weighted + drop * total);
        total *= shrink;
        maximum = to;
    }

    // Adds several values at once: one comparison with the maximum for all of them. A NaN is no
    // maximum (fmaxf), but reaches the total.
    template <int COUNT>
    __device__ void add(const float (&u)[COUNT], float scale) {
        float largest = u[0];
#pragma unroll
        for (int i = 1; i < COUNT; ++i) largest = fmaxf(largest, u[i]);
        if (largest > maximum) raise(largest, scale);
        const float subtracted = maximum == -CUDART_INF_F ? 0.0f : maximum;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float t = (u[i] - subtracted) * scale;
            const float e = exp2_fast(t);
            total += e;
            weighted += e * fmaxf(t, LOWEST);
        }
    }

    __device__ void merge(Softmax other, float scale) {
        if (other.maximum > maximum) raise(other.maximum, scale);
        if (other.maximum < maximum) other.raise(maximum, scale);
        total += other.total;
        weighted += other.weighted;
    }

    // The sum of (z - max z) exp(z - max z).
    __device__ float natural_weighted() const { return weighted * LN_2; }

    // log sum exp(z - max z) less the mean of z - max z; rounding may leave it slightly below 0.
    __device__ float entropy() const { return logf(total) - natural_weighted() / total; }
};

// The block's statistics, in every thread.
template <int THREADS>
__device__ Softmax reduce_block(Softmax mine, float scale) {
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
