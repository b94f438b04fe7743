// kl_tile on CUDA: a block a row. Both rows are read once for their statistics and again, from the
// second-level cache where they still may be, for the gradients; one write.
#include "../abi.h"
#include "divergence.cuh"
#include "launch.cuh"
#include "pair_pieces.cuh"
#include "row_gradient.cuh"

namespace {

using fastalign::RowTransform;
using fastalign::shifted;

constexpr int THREADS = 512;

struct KLTile {
    float *policy, *reference;
    int64_t num_columns, row_stride;
    float softcap, logit_scale;
    const float* temperature;
    const int64_t* targets;
    const uint8_t* ignored;
    float *logprob, *reference_logprob, *entropy, *kl;
    // NULL, both for brackets, or the first alone for their sum times what comes from upstream
    void *gradient, *kl_gradient;
    int64_t gradient_stride;
    const float *grad_logprob, *grad_entropy, *grad_kl;
};

// What a row's gradients are made from.
template <bool OVER_REFERENCE, bool BRACKETS>
struct RowGradient {
    float g, e, k;
    float maximum, reference_maximum, scale, ratio, mean, rest, log_p_offset;
    int64_t target;

    __device__ RowGradient(const KLTile& tile, int64_t index,
                           const fastalign::Divergence<OVER_REFERENCE>& all, float logprob,
                           float entropy)
        : g(BRACKETS ? 1.0f : tile.grad_logprob[index]),
          e(BRACKETS ? 0.0f : tile.grad_entropy[index]),
          k(BRACKETS ? 1.0f : tile.grad_kl[index]),
          maximum(all.maximum),
          reference_maximum(all.reference_maximum),
          scale(1.0f / all.total),
          ratio(all.ratio()),
          mean(all.mean()),
          rest(-expm1f(logprob)),  // 1 - p: exact where p is near 1
          log_p_offset(entropy - logf(all.total)),
          target(tile.targets[index]) {
        if (!fastalign::holds(target, tile.num_columns)) g = CUDART_NAN_F;
        if (isinf(all.kl()) && k != 0.0f) k = CUDART_NAN_F;
    }

    // By z: `first` is the log-prob's or the combination's, `second` the KL's.
    __device__ void compute(float u, float v, float gain, int64_t column, float* first,
                            float* second) const {
        const float s = shifted(u, maximum, gain), t = shifted(v, reference_maximum, gain);
        const float exponential = expf(s), p = exponential * scale;
        // in this order it is exactly zero where the two sides are the same
        const float of_kl =
            OVER_REFERENCE ? (exponential - expf(t) * ratio) * scale : p * ((s - t) - mean);
        const float of_logprob = column == target ? rest : -p;
        *second = k * of_kl;
        *first = g * of_logprob;
        if (!BRACKETS) *first = g * of_logprob + *second - e * p * (s + log_p_offset);
    }
};

template <typename T, bool OVER_REFERENCE, bool BRACKETS>
__device__ void write_gradients(const KLTile& tile, const RowTransform& transform,
                                const RowGradient<OVER_REFERENCE, BRACKETS>& gradient,
                                int64_t index, bool ignored) {
    const float* policy = tile.policy + index * tile.row_stride;
    const float* reference = tile.reference + index * tile.row_stride;
    const bool aligned = fastalign::aligned(policy) && fastalign::aligned(reference);
    T* first = static_cast<T*>(tile.gradient) + index * tile.gradient_stride;
    T* second = static_cast<T*>(tile.kl_gradient) + index * tile.gradient_stride;
    fastalign::for_each_fixed_piece<THREADS>(
        aligned, tile.num_columns, [&](int64_t column, auto columns) {
            constexpr int COUNT = decltype(columns)::count;
            float x[COUNT], y[COUNT];
            fastalign::load_columns<COUNT>(policy + column, x);
            fastalign::load_columns<COUNT>(reference + column, y);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const float u = transform.u(x[i]);
                gradient.compute(u, transform.u(y[i]), transform.gain, column + i, &x[i], &y[i]);
                const float slope = transform.slope * (transform.softcap ? 1.0f - u * u : 1.0f);
                x[i] = ignored ? 0.0f : x[i] * slope;
                y[i] = ignored ? 0.0f : y[i] * slope;
            }
            fastalign::store_columns<COUNT>(first + column, x);
            if (BRACKETS) fastalign::store_columns<COUNT>(second + column, y);
        });
}

template <typename T, bool OVER_REFERENCE>
__global__ void __launch_bounds__(THREADS) kl_tile_kernel(KLTile tile) {
    const int64_t index = blockIdx.x, num_columns = tile.num_columns;
    const float* policy = tile.policy + index * tile.row_stride;
    const float* reference = tile.reference + index * tile.row_stride;
    const RowTransform transform =
        fastalign::row_transform(tile.softcap, tile.logit_scale, tile.temperature, index);
    const bool ignored = tile.ignored[index];
    auto mine = fastalign::Divergence<OVER_REFERENCE>::empty();
    const bool aligned = fastalign::aligned(policy) && fastalign::aligned(reference);
    fastalign::for_each_fixed_piece<THREADS>(
        aligned, num_columns, [&](int64_t column, auto columns) {
            constexpr int COUNT = decltype(columns)::count;
            float x[COUNT], y[COUNT];
            fastalign::load_columns<COUNT>(policy + column, x);
            fastalign::load_columns<COUNT>(reference + column, y);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                mine.add(transform.u(x[i]), transform.u(y[i]), transform.gain);
        });
    const auto all = fastalign::reduce_block<THREADS>(mine, transform.gain);
    const int64_t target = tile.targets[index];
    const float log_total = logf(all.total), found = log_total - all.weighted / all.total;
    const float entropy = found < 0.0f ? 0.0f : found;
    // a number from another row would look like a log-prob
    const bool inside = fastalign::holds(target, num_columns);
    const float u = inside ? transform.u(policy[target]) : CUDART_NAN_F;
    const float v = inside ? transform.u(reference[target]) : CUDART_NAN_F;
    const float logprob = (u - all.maximum) * transform.gain - log_total;
    if (threadIdx.x == 0) {
        const float reference_logprob =
            (v - all.reference_maximum) * transform.gain - logf(all.reference_total);
        tile.logprob[index] = ignored ? 0.0f : logprob;
        tile.reference_logprob[index] = ignored ? 0.0f : reference_logprob;
        tile.entropy[index] = ignored ? 0.0f : entropy;
        tile.kl[index] = ignored ? 0.0f : all.kl();
    }
    if (!tile.gradient) return;
    __syncthreads();  // every thread has read the target before any overwrites it
    if (tile.kl_gradient) {
        const RowGradient<OVER_REFERENCE, true> gradient(tile, index, all, logprob, entropy);
        write_gradients<T>(tile, transform, gradient, index, ignored);
    } else {
        const RowGradient<OVER_REFERENCE, false> gradient(tile, index, all, logprob, entropy);
        write_gradients<T>(tile, transform, gradient, index, ignored);
    }
}

template <typename T>
int32_t launch(const KLTile& tile, int64_t num_rows, bool over_reference, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(num_rows);
    if (over_reference) {
        kl_tile_kernel<T, true><<<blocks, THREADS, 0, stream>>>(tile);
    } else {
        kl_tile_kernel<T, false><<<blocks, THREADS, 0, stream>>>(tile);
    }
    return fastalign::launched();
}

}  // namespace

int32_t fastalign_kl_tile_cuda(float* policy, float* reference, int64_t num_rows,
                               int64_t num_columns, int64_t row_stride, float softcap,
                               float logit_scale, int32_t over_reference, const float* temperature,
                               const int64_t* targets, const uint8_t* ignored, float* logprob,
                               float* reference_logprob, float* entropy, float* kl, void* gradient,
                               void* kl_gradient, int32_t gradient_dtype, int64_t gradient_stride,
                               const float* grad_logprob, const float* grad_entropy,
                               const float* grad_kl, void* stream) {
    if (num_rows == 0) return 0;
    const KLTile tile = {
        policy,      reference, num_columns, row_stride,      softcap,           logit_scale,
        temperature, targets,   ignored,     logprob,         reference_logprob, entropy,
        kl,          gradient,  kl_gradient, gradient_stride, grad_logprob,      grad_entropy,
        grad_kl};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (gradient_dtype == 0) return launch<float>(tile, num_rows, over_reference != 0, queue);
    if (gradient_dtype == 1)
        return launch<__nv_bfloat16>(tile, num_rows, over_reference != 0, queue);
    return 2;
}
