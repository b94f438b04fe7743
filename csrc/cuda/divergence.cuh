// The running statistics of two softmaxes and of the KL between them, and their reduction over a
// block: what token_kl and kl_tile share.
#pragma once

#include <cuda_runtime.h>
#include <math_constants.h>

namespace fastalign {

constexpr float LOWEST = -1e30f;  // stands for a banned token's logit less the largest

__device__ inline float bounded(float shifted) {
    return shifted < LOWEST ? LOWEST : shifted;  // fmaxf would swallow a NaN
}

// Logits z of a policy and r of a reference. With s = z - max z, t = r - max r and d = s - t, or,
// OVER_REFERENCE, d = t - s:
template <bool OVER_REFERENCE>
struct Divergence {
    float maximum, total, weighted;  // max z, sum of exp(s), sum of s exp(s)
    float reference_maximum, reference_total;
    float cross, largest;  // sum of exp(s) d (OVER_REFERENCE: of exp(t) d), and the largest d

    __device__ static Divergence empty() {
        return {-CUDART_INF_F, 0.0f, 0.0f, -CUDART_INF_F, 0.0f, 0.0f, -CUDART_INF_F};
    }

    // How much d changes where s - t changes by this.
    __device__ static float change(float by) { return OVER_REFERENCE ? -by : by; }

    // By how much a new maximum lowers the shifted values so far; 0 before the first finite value
    // (-inf - -inf is NaN).
    __device__ static float drop(float from, float to) {
        return from == to || from == -CUDART_INF_F ? 0.0f : bounded(from - to);
    }

    // Rescales the statistics to maxima that are no smaller; both at once, and without fused
    // multiply-adds, so that two equal sides have a KL of exactly 0.
    __device__ void raise(float to, float reference_to) {
        const float by = drop(maximum, to), reference_by = drop(reference_maximum, reference_to);
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

    __device__ void add(float z, float r) {
        if (z > maximum || r > reference_maximum)
            raise(fmaxf(maximum, z), fmaxf(reference_maximum, r));  // fmaxf takes no NaN
        const float s = z == -CUDART_INF_F ? LOWEST : bounded(z - maximum);
        const float t = r == -CUDART_INF_F ? LOWEST : bounded(r - reference_maximum);
        const float p = expf(s), q = expf(t), d = change(s - t);
        total += p;
        weighted += p * s;
        reference_total += q;
        cross += (OVER_REFERENCE ? q : p) * d;
        largest = fmaxf(largest, d);
    }

    __device__ void merge(Divergence other) {
        raise(fmaxf(maximum, other.maximum), fmaxf(reference_maximum, other.reference_maximum));
        other.raise(maximum, reference_maximum);
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
__device__ Divergence<OVER_REFERENCE> reduce_block(Divergence<OVER_REFERENCE> mine) {
    __shared__ Divergence<OVER_REFERENCE> of_warp[THREADS / 32];
    for (int offset = 16; offset > 0; offset >>= 1) mine.merge(mine.shuffled_down(offset));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    Divergence<OVER_REFERENCE> result = of_warp[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) result.merge(of_warp[warp]);
    return result;
}

}  // namespace fastalign
