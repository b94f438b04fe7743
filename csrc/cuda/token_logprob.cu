// token_logprob on CUDA: a block a row, 16-byte accesses, one read forward, one read and one write
// backward.
#include "../abi.h"
#include "pieces.cuh"
#include "reduce.cuh"

namespace {

using fastalign::narrow;
using fastalign::Softmax;
using fastalign::widened;

constexpr int THREADS = 256;

struct Rows {
    int64_t num_rows, num_columns, row_stride;
    float softcap;
    int64_t ignore_index;
    const int64_t* targets;
    const float* temperature;
};

template <typename T>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(const T* logits, Rows rows, float* logprob, float* entropy, float* logsumexp) {
    constexpr int PER_PIECE = 16 / sizeof(T);
    const int64_t index = blockIdx.x;
    const T* row = logits + index * rows.row_stride;
    const float scale = rows.temperature ? 1.0f / rows.temperature[index] : 1.0f;
    const float softcap = rows.softcap;
    auto transform = [&](float x) {
        return (softcap > 0.0f ? softcap * tanhf(x / softcap) : x) * scale;
    };
    Softmax mine = Softmax::empty();
    fastalign::for_each_piece<THREADS>(
        row, rows.num_columns, threadIdx.x, [&](int64_t column, bool whole) {
            if (!whole) {
                mine.add(transform(widened(row[column])));
                return;
            }
            const uint4 piece = __ldcs(reinterpret_cast<const uint4*>(row + column));
            const T* values = reinterpret_cast<const T*>(&piece);
#pragma unroll
            for (int i = 0; i < PER_PIECE; ++i) mine.add(transform(widened(values[i])));
        });
    const Softmax all = fastalign::reduce_block<THREADS>(mine);
    if (threadIdx.x != 0) return;
    const int64_t target = rows.targets[index];
    const float log_total = logf(all.total);
    logsumexp[index] = all.maximum + log_total;
    if (target == rows.ignore_index) {
        logprob[index] = entropy[index] = 0.0f;
        return;
    }
    const float found = log_total - all.weighted / all.total;
    logprob[index] = transform(widened(row[target])) - all.maximum - log_total;
    entropy[index] = found < 0.0f ? 0.0f : found;
}

struct Saved {
    const float *logsumexp, *entropy, *grad_logprob, *grad_entropy;
};

template <typename T>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(const T* logits, Rows rows, Saved saved, T* gradient) {
    constexpr int PER_PIECE = 16 / sizeof(T);
    const int64_t index = blockIdx.x;
    const T* row = logits + index * rows.row_stride;
    T* out = gradient + index * rows.num_columns;
    const int64_t target = rows.targets[index];
    const bool ignored = target == rows.ignore_index;
    const float scale = rows.temperature ? 1.0f / rows.temperature[index] : 1.0f;
    const float softcap = rows.softcap, logsumexp = saved.logsumexp[index],
                entropy = saved.entropy[index];
    const float g = saved.grad_logprob[index],
                e = saved.grad_entropy ? saved.grad_entropy[index] : 0.0f;
    auto compute = [&](float x, int64_t column) {
        float slope = scale;
        if (softcap > 0.0f) {
            const float t = tanhf(x / softcap);
            x = softcap * t;
            slope = scale * (1.0f - t * t);
        }
        const float log_p = x * scale - logsumexp, p = expf(log_p);
        float result = g * ((column == target ? 1.0f : 0.0f) - p);
        if (saved.grad_entropy) result -= e * p * ((log_p < -1e30f ? -1e30f : log_p) + entropy);
        return ignored ? 0.0f : result * slope;
    };
    // Both rows begin at the same place within 16 bytes only if the strides say so; else the writes
    // are scalar.
    const bool same =
        (reinterpret_cast<uintptr_t>(row) % 16) == (reinterpret_cast<uintptr_t>(out) % 16);
    fastalign::for_each_piece<THREADS>(
        row, rows.num_columns, threadIdx.x, [&](int64_t column, bool whole) {
            if (!whole) {
                narrow(compute(widened(row[column]), column), out + column);
                return;
            }
            const uint4 piece = __ldcs(reinterpret_cast<const uint4*>(row + column));
            const T* values = reinterpret_cast<const T*>(&piece);
            uint4 written;
            T* results = reinterpret_cast<T*>(&written);
#pragma unroll
            for (int i = 0; i < PER_PIECE; ++i)
                narrow(compute(widened(values[i]), column + i), results + i);
            if (same) {
                __stcs(reinterpret_cast<uint4*>(out + column), written);
            } else {
#pragma unroll
                for (int i = 0; i < PER_PIECE; ++i) out[column + i] = results[i];
            }
        });
}

template <typename T>
int32_t launch_forward(const void* logits, const Rows& rows, float* logprob, float* entropy,
                       float* logsumexp, cudaStream_t stream) {
    forward_kernel<T><<<static_cast<unsigned>(rows.num_rows), THREADS, 0, stream>>>(
        static_cast<const T*>(logits), rows, logprob, entropy, logsumexp);
    return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

template <typename T>
int32_t launch_backward(const void* logits, const Rows& rows, const Saved& saved, void* gradient,
                        cudaStream_t stream) {
    backward_kernel<T><<<static_cast<unsigned>(rows.num_rows), THREADS, 0, stream>>>(
        static_cast<const T*>(logits), rows, saved, static_cast<T*>(gradient));
    return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

}  // namespace

int32_t fastalign_abi_version(void) { return FASTALIGN_ABI_VERSION; }

int32_t fastalign_token_logprob_forward_cuda(const void* logits, int32_t dtype, int64_t num_rows,
                                             int64_t num_columns, int64_t row_stride, float softcap,
                                             int64_t ignore_index, const int64_t* targets,
                                             const float* temperature, float* logprob,
                                             float* entropy, float* logsumexp, void* stream) {
    if (num_rows == 0) return 0;
    const Rows rows = {num_rows,     num_columns, row_stride, softcap,
                       ignore_index, targets,     temperature};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == 0) return launch_forward<float>(logits, rows, logprob, entropy, logsumexp, queue);
    if (dtype == 1)
        return launch_forward<__nv_bfloat16>(logits, rows, logprob, entropy, logsumexp, queue);
    if (dtype == 2) return launch_forward<__half>(logits, rows, logprob, entropy, logsumexp, queue);
    return 2;
}

int32_t fastalign_token_logprob_backward_cuda(const void* logits, int32_t dtype, int64_t num_rows,
                                              int64_t num_columns, int64_t row_stride,
                                              float softcap, int64_t ignore_index,
                                              const int64_t* targets, const float* temperature,
                                              const float* logsumexp, const float* entropy,
                                              const float* grad_logprob, const float* grad_entropy,
                                              void* gradient, void* stream) {
    if (num_rows == 0) return 0;
    const Rows rows = {num_rows,     num_columns, row_stride, softcap,
                       ignore_index, targets,     temperature};
    const Saved saved = {logsumexp, entropy, grad_logprob, grad_entropy};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (dtype == 0) return launch_backward<float>(logits, rows, saved, gradient, queue);
    if (dtype == 1) return launch_backward<__nv_bfloat16>(logits, rows, saved, gradient, queue);
    if (dtype == 2) return launch_backward<__half>(logits, rows, saved, gradient, queue);
    return 2;
}
