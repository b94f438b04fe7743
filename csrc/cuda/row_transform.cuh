// From a row of products to logits, as HeadTransform in fastalign/ops/head/head_tile/tile.py says.
#pragma once

#include <stdint.h>

namespace fastalign {

struct RowTransform {
    float cap_scale, gain, slope;  // u = tanh(cap_scale x) or x; z = gain u; slope: dz / dx by u
    bool softcap;
    __device__ float u(float x) const { return softcap ? tanhf(cap_scale * x) : x; }
    // not fused with what follows: equal heads stay equal
    __device__ float z(float u) const { return __fmul_rn(gain, u); }
};

// `temperature`: (T,) or NULL.
__device__ inline RowTransform row_transform(float cap, float logit_scale, const float* temperature,
                                             int64_t index) {
    const float cooling = temperature ? 1.0f / temperature[index] : 1.0f;
    const bool softcap = cap > 0.0f;
    const float slope = logit_scale * cooling;
    return {softcap ? logit_scale / cap : 0.0f, softcap ? cap * cooling : slope, slope, softcap};
}

}  // namespace fastalign
