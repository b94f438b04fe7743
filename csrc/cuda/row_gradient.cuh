// From a row of products to logits, as HeadTransform in fastalign/ops/head/head_tile/tile.py says,
// and the gradient of its log-prob and entropy.
#pragma once

#include <stdint.h>

namespace fastalign {

// True if a target is a column of the row.
__device__ inline bool holds(int64_t target, int64_t num_columns) {
    return target >= 0 && target < num_columns;
}

struct RowTransform {
    float cap_scale, gain, slope;  // u = tanh(cap_scale x) or x; z = gain u; slope: dz / dx by u
    bool softcap;
    __device__ float u(float x) const { return softcap ? tanhf(cap_scale * x) : x; }
};

// `temperature`: (T,) or NULL.
__device__ inline RowTransform row_transform(float cap, float logit_scale, const float* temperature,
                                             int64_t index) {
    const float cooling = temperature ? 1.0f / temperature[index] : 1.0f;
    const bool softcap = cap > 0.0f;
    const float slope = logit_scale * cooling;
    return {softcap ? logit_scale / cap : 0.0f, softcap ? cap * cooling : slope, slope, softcap};
}

// What the gradient of one row is computed from: log p = gain (u - maximum) - log_total.
struct RowGradient {
    int64_t target;  // outside the row: another process's
    float maximum;   // of u
    float log_total, logprob, entropy;
    float grad_logprob, grad_entropy;
    bool of_entropy, ignored;

    // 1 - p of the target: exact where p is near 1.
    __device__ float rest() const { return -expm1f(logprob); }

    // The gradient by one column's product, of which u was made.
    __device__ float by_product(const RowTransform& transform, float u, int64_t column,
                                float rest) const {
        const float log_p = (u - maximum) * transform.gain - log_total, p = expf(log_p);
        float result = column == target ? grad_logprob * rest : -grad_logprob * p;
        if (of_entropy) result -= grad_entropy * p * ((log_p < -1e30f ? -1e30f : log_p) + entropy);
        result *= transform.slope;
        if (transform.softcap) result *= 1.0f - u * u;
        return ignored ? 0.0f : result;
    }
};

}  // namespace fastalign
