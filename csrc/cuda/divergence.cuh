// The running statistics of two softmaxes and of the KL between them, and their reduction over a
// block: what token_kl and kl_tile share.
#pragma once

#include <cuda_runtime.h>
#include <math_constants.h>

#include "reduce.cuh"

namespace fastalign {

__device__ inline float bounded(float shifted) {
    return shifted < LOWEST ? LOWEST : shifted;  // fmaxf would swallow a NaN
}

// (u - maximum) gain, not fused with what follows: equal sides stay equal. The maximum is
// subtracted first: the rounding error of a product with a large u could exceed differences.
__device__ inline float shifted(float u, float maximum, float gain) {
    return bounded(__fmul_rn(u - maximum, gain));
}

// Logits z = gain u of a policy and r = gain v of a reference. With s = z - max z, t = r - max r
// and d = s - t, or, OVER_REFERENCE, d = t - s:
template <bool OVER_REFERENCE>
struct Divergence {
    float maximum, total, weighted;  // max u, sum of exp(s), sum of s exp(s)
    float reference_maximum, reference_total;
    float cross, largest;  // sum of exp(s) d (OVER_REFERENCE: of exp(t) d), and the largest d

    __device__ static Divergence empty() {
        return {-CUDART_INF_F, 0.0f, 0.0f, -CUDART_INF_F, 0.0f, 0.0f, -CUDART_INF_F};
    }

    // How much d changes where s - t changes by this.
    __device__ static float change(float by) { return OVER_REFERENCE ? -by : by; }

    // By how much a new maximum lowers the shifted values so far; 0 before the first finite value
    // (-inf - -inf is NaN).
    __device__ static float drop(float from, float to, float gain) {
        return from == to || from == -CUDART_INF_F ? 0.0f : shifted(from, to, gain);
    }

    // Rescales the statistics to maxima that are no smaller; both at once, and without fused
    // multiply-adds, so that two equal sides have a KL of exactly 0.
    __device__ void raise(float to, float reference_to, float gain) {
        const float by = drop(maximum, to, gain);
        const float reference_by = drop(reference_maximum, reference_to, gain);
        const float shrink = expf(by), reference_shrink = expf(reference_by);
        const float d = change(by - reference_by);
        cross += d * (OVER_REFERENCE ? reference_total : total);
        cross *= OVER_REFERENCE ? reference_shrink : shrink;
        weighted = shrink * (weighted + by * total);
        total = __fmul_rn(total, shrink);
        reference_total = __fmul_rn(reference_total, reference_shrink);
        largest += d;
        maximum = to;
        reference_maximum = reference_to;
    }

    __device__ void add(float u, float v, float gain) {
        if (u > maximum || v > reference_maximum)
            raise(fmaxf(maximum, u), fmaxf(reference_maximum, v), gain);  // fmaxf takes no NaN
        const float s = u == -CUDART_INF_F ? LOWEST : shifted(u, maximum, gain);
        const float t = v == -CUDART_INF_F ? LOWEST : shifted(v, reference_maximum, gain);
        const float p = expf(s), q = expf(t), d = change(s - t);
        total += p;
        weighted += p * s;
        reference_total += q;
        cross += (OVER_REFERENCE ? q : p) * d;
        largest = fmaxf(largest, d);
    }

    __device__ void merge(Divergence other, float gain) {
        raise(fmaxf(maximum, other.maximum), fmaxf(reference_maximum, other.reference_maximum),
              gain);
        other.raise(maximum, reference_maximum, gain);
        total += other.total;
        weighted += other.weighted;
        reference_total += other.reference_total;
        cross += other.cross;
        largest = fmaxf(largest, other.largest);
    }

    // The mean of d, and the policy's total over the reference's.
    __device__ float mean() const { return cross / (OVER_REFERENCE ? reference_total : total); }
    __device__ float ratio() const { return total / reference_total; }

    // So large a d comes from a token with probability that the other side bans. Rounding may leave
    // the KL slightly below zero.
    __device__ float kl() const {
        if (largest > -0.5f * LOWEST) return CUDART_INF_F;
        const float found = mean() - change(logf(ratio()));
        return found < 0.0f ? 0.0f : found;
    }

    __device__ Divergence shuffled_down(int offset) const {
        const auto from = [offset](float value) {
            return __shfl_down_sync(0xffffffffu, value, offset);
        };
        return {from(maximum),         from(total), from(weighted), from(reference_maximum),
                from(reference_total), from(cross), from(largest)};
    }
};

// The block's statistics, in every thread.
template <int THREADS, bool OVER_REFERENCE>
__device__ Divergence<OVER_REFERENCE> reduce_block(Divergence<OVER_REFERENCE> mine, float gain) {
    __shared__ Divergence<OVER_REFERENCE> of_warp[THREADS / 32];
    for (int offset = 16; offset > 0; offset >>= 1) mine.merge(mine.shuffled_down(offset), gain);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    Divergence<OVER_REFERENCE> result = of_warp[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) result.merge(of_warp[warp], gain);
    return result;
}

}  // namespace fastalign
