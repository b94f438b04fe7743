// preference_loss on CUDA: a block a pair, one half of it for each response, 16-byte accesses; one
// thread then computes the pair's loss. Sums are in double and always in the same order.
#include "../abi.h"
#include "../preference_pair.h"
#include "launch.cuh"
#include "pieces.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int SIDE_THREADS = THREADS / 2;

struct Pairs {
    const float* logprob;
    const int64_t* bounds;
    const float* reference_logprob;
    const int64_t* length;
    const uint8_t* tie;
};

__global__ void __launch_bounds__(THREADS)
    forward_kernel(Pairs pairs, fastalign::PreferenceFormula formula, float* losses,
                   float* sequence_logprob, float* coefficient) {
    const int64_t index = blockIdx.x;
    const int side = threadIdx.x / SIDE_THREADS, thread = threadIdx.x % SIDE_THREADS;
    const int64_t start = pairs.bounds[2 * index + side], stop = pairs.bounds[2 * index + side + 1];
    const float* from = pairs.logprob + start;
    double sum = 0;
    fastalign::for_each_piece<SIDE_THREADS>(
        from, stop - start, thread, [&](int64_t row, bool whole) {
            if (!whole) {
                sum += from[row];
                return;
            }
            const float4 piece = *reinterpret_cast<const float4*>(from + row);
            sum +=
                (static_cast<double>(piece.x) + piece.y) + (static_cast<double>(piece.z) + piece.w);
        });
    for (int offset = 16; offset > 0; offset >>= 1)
        sum += __shfl_down_sync(0xffffffffu, sum, offset);
    __shared__ double of_warp[THREADS / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double policy[2] = {0, 0};
    for (int warp = 0; warp < SIDE_THREADS / 32; ++warp) {
        policy[0] += of_warp[warp];
        policy[1] += of_warp[SIDE_THREADS / 32 + warp];
    }
    const auto pair = fastalign::read_pair(index, policy, pairs.bounds, pairs.reference_logprob,
                                           pairs.length, pairs.tie);
    const auto found = fastalign::pair_loss(formula, pair);
    losses[index] = static_cast<float>(found.loss);
    for (int s = 0; s < 2; ++s) {
        sequence_logprob[2 * index + s] = static_cast<float>(policy[s]);
        coefficient[2 * index + s] = static_cast<float>(found.slope[s]);
    }
}

__global__ void __launch_bounds__(THREADS)
    backward_kernel(const float* grad_losses, const float* grad_sequence_logprob,
                    const float* coefficient, const int64_t* bounds, float* gradient) {
    const int64_t index = blockIdx.x;
    const int thread = threadIdx.x % SIDE_THREADS;
    const int64_t sequence = 2 * index + threadIdx.x / SIDE_THREADS;
    float value = grad_losses[index] * coefficient[sequence];
    if (grad_sequence_logprob) value += grad_sequence_logprob[sequence];
    float* to = gradient + bounds[sequence];
    fastalign::for_each_piece<SIDE_THREADS>(
        to, bounds[sequence + 1] - bounds[sequence], thread, [&](int64_t row, bool whole) {
            if (whole) {
                *reinterpret_cast<float4*>(to + row) = make_float4(value, value, value, value);
            } else {
                to[row] = value;
            }
        });
}

}  // namespace

int32_t fastalign_preference_loss_forward_cuda(
    const float* logprob, const int64_t* bounds, const float* reference_logprob,
    const int64_t* length, const uint8_t* tie, int64_t num_pairs, int32_t link, int32_t per_token,
    float beta, float length_weight, float threshold, float right, float wrong, float tie_offset,
    float* losses, float* sequence_logprob, float* coefficient, void* stream) {
    if (link < 0 || link >= fastalign::NUM_LINKS) return 2;
    if (num_pairs == 0) return 0;
    const Pairs pairs = {logprob, bounds, reference_logprob, length, tie};
    const fastalign::PreferenceFormula formula = {link,      per_token, beta,  length_weight,
                                                  threshold, right,     wrong, tie_offset};
    forward_kernel<<<static_cast<unsigned>(num_pairs), THREADS, 0,
                     static_cast<cudaStream_t>(stream)>>>(pairs, formula, losses, sequence_logprob,
                                                          coefficient);
    return fastalign::launched();
}

int32_t fastalign_preference_loss_backward_cuda(const float* grad_losses,
                                                const float* grad_sequence_logprob,
                                                const float* coefficient, const int64_t* bounds,
                                                int64_t num_pairs, float* gradient, void* stream) {
    if (num_pairs == 0) return 0;
    backward_kernel<<<static_cast<unsigned>(num_pairs), THREADS, 0,
                      static_cast<cudaStream_t>(stream)>>>(grad_losses, grad_sequence_logprob,
                                                           coefficient, bounds, gradient);
    return fastalign::launched();
}
