// kl_penalty on CUDA: a block a response, one launch. Tokens lie behind one another, so that a
// warp's accesses are whole lines without being 16 bytes a thread.
#include <cuda_runtime.h>
#include <math_constants.h>

#include "../abi.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 256;
constexpr float LOWEST_LOG_RATIO = -20.0f;

struct Tokens {
    const float *logprob, *reference_logprob;
    const int64_t* bounds;
    const uint8_t* mask;
    int32_t estimator;
    float max_k3;

    __device__ bool count(int64_t t) const { return !mask || mask[t]; }
    __device__ float log_ratio(int64_t t) const { return logprob[t] - reference_logprob[t]; }
};

// exp(-x) - 1 + x for |x| < 0.5, where the sum of its terms would cancel.
__device__ inline float series(float x) {
    float p = 1.0f / 5040 - x * (1.0f / 40320 - x * (1.0f / 362880));
    p = 1.0f / 24 - x * (1.0f / 120 - x * (1.0f / 720 - x * p));
    return x * x * (0.5f - x * (1.0f / 6 - x * p));
}

__device__ inline float unbounded_k3(float x) {
    return fabsf(x) < 0.5f ? series(x) : expf(-x) - 1.0f + x;
}

__device__ inline float estimate(float x, const Tokens& tokens) {
    if (tokens.estimator == 0) return x;
    if (tokens.estimator == 1) return 0.5f * x * x;
    const float k3 = unbounded_k3(x < LOWEST_LOG_RATIO ? LOWEST_LOG_RATIO : x);
    return k3 > tokens.max_k3 ? tokens.max_k3 : k3;  // fminf would swallow a NaN
}

__device__ inline float slope(float x, const Tokens& tokens) {
    if (tokens.estimator == 0) return 1.0f;
    if (tokens.estimator == 1) return x;
    return x < LOWEST_LOG_RATIO || unbounded_k3(x) > tokens.max_k3 ? 0.0f : -expm1f(-x);
}

struct Found {
    double total;
    int64_t last;  // -1: none

    __device__ void merge(double other_total, int64_t other_last) {
        total += other_total;
        last = last > other_last ? last : other_last;
    }
};

// The block's, in thread 0; what the block wrote before is then visible to it.
__device__ Found reduce_block(Found mine) {
    __shared__ double totals[THREADS / 32];
    __shared__ int64_t lasts[THREADS / 32];
    for (int offset = 16; offset > 0; offset >>= 1) {
        const double total = __shfl_down_sync(0xffffffffu, mine.total, offset);
        mine.merge(total, __shfl_down_sync(0xffffffffu, mine.last, offset));
    }
    if (threadIdx.x % 32 == 0) {
        totals[threadIdx.x / 32] = mine.total;
        lasts[threadIdx.x / 32] = mine.last;
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < THREADS / 32; ++warp) mine.merge(totals[warp], lasts[warp]);
    return mine;
}

__global__ void __launch_bounds__(THREADS)
    forward_kernel(Tokens tokens, const float* score, float coefficient,
                   const float* adaptive_coefficient, float* reward, float* kl,
                   float* sequence_kl) {
    const int64_t response = blockIdx.x, end = tokens.bounds[response + 1];
    if (adaptive_coefficient) coefficient = *adaptive_coefficient;
    Found found = {0.0, -1};
    for (int64_t t = tokens.bounds[response] + threadIdx.x; t < end; t += THREADS) {
        float here = 0.0f;
        if (tokens.count(t)) {
            here = estimate(tokens.log_ratio(t), tokens);
            found.merge(here, t);
        }
        kl[t] = here;
        reward[t] = -coefficient * here;
    }
    found = reduce_block(found);
    if (threadIdx.x != 0) return;
    if (score && found.last >= 0) reward[found.last] += score[response];
    const bool lost = score && found.last < 0;
    sequence_kl[response] = lost ? CUDART_NAN_F : static_cast<float>(found.total);
}

__global__ void __launch_bounds__(THREADS)
    backward_kernel(Tokens tokens, const float* grad_kl, const float* grad_sequence_kl,
                    float* gradient) {
    const int64_t response = blockIdx.x, end = tokens.bounds[response + 1];
    const float of_sequence = grad_sequence_kl ? grad_sequence_kl[response] : 0.0f;
    for (int64_t t = tokens.bounds[response] + threadIdx.x; t < end; t += THREADS) {
        float here = 0.0f;
        if (tokens.count(t)) {
            const float upstream = of_sequence + (grad_kl ? grad_kl[t] : 0.0f);
            here = upstream * slope(tokens.log_ratio(t), tokens);
        }
        gradient[t] = here;
    }
}

}  // namespace

int32_t fastalign_kl_penalty_forward_cuda(const float* logprob, const float* reference_logprob,
                                          const int64_t* bounds, int64_t num_responses,
                                          const float* score, float coefficient,
                                          const float* adaptive_coefficient, const uint8_t* mask,
                                          int32_t estimator, float max_k3, float* reward, float* kl,
                                          float* sequence_kl, void* stream) {
    if (estimator < 0 || estimator > 2) return 2;
    if (num_responses == 0) return 0;
    const Tokens tokens = {logprob, reference_logprob, bounds, mask, estimator, max_k3};
    forward_kernel<<<static_cast<unsigned>(num_responses), THREADS, 0,
                     static_cast<cudaStream_t>(stream)>>>(
        tokens, score, coefficient, adaptive_coefficient, reward, kl, sequence_kl);
    return fastalign::launched();
}

int32_t fastalign_kl_penalty_backward_cuda(const float* grad_kl, const float* grad_sequence_kl,
                                           const float* logprob, const float* reference_logprob,
                                           const int64_t* bounds, int64_t num_responses,
                                           const uint8_t* mask, int32_t estimator, float max_k3,
                                           float* gradient, void* stream) {
    if (estimator < 0 || estimator > 2) return 2;
    if (num_responses == 0) return 0;
    const Tokens tokens = {logprob, reference_logprob, bounds, mask, estimator, max_k3};
    backward_kernel<<<static_cast<unsigned>(num_responses), THREADS, 0,
                      static_cast<cudaStream_t>(stream)>>>(tokens, grad_kl, grad_sequence_kl,
                                                           gradient);
    return fastalign::launched();
}
