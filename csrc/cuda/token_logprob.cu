// token_logprob on CUDA: a block a row, 16-byte accesses, one read forward, one read and one write
// backward.
#include "../abi.h"
#include "launch.cuh"
#include "pieces.cuh"
#include "reduce.cuh"
#include "row_gradient.cuh"

namespace {

using fastalign::narrow;
using fastalign::RowGradient;
using fastalign::RowTransform;
using fastalign::Softmax;
using fastalign::widened;

constexpr int THREADS = 256;

struct Rows {
    int64_t num_rows, num_columns, row_stride;
    float softcap;
    int64_t ignore_index;
    const int64_t* targets;
    const float* temperature;

    __device__ RowTransform transform(int64_t index) const {
        return fastalign::row_transform(softcap, 1.0f, temperature, index);
    }
};

struct Found {
    float *logprob, *entropy, *maximum, *log_total;
};

struct Saved {
    const float *logprob, *entropy, *maximum, *log_total, *grad_logprob, *grad_entropy;
    void* gradient;
};

template <typename T>
__global__ void __launch_bounds__(THREADS) forward_kernel(const T* logits, Rows rows, Found found) {
    constexpr int PER_PIECE = 16 / sizeof(T);
    const int64_t index = blockIdx.x;
    const T* row = logits + index * rows.row_stride;
    const RowTransform transform = rows.transform(index);
    const float scale = transform.gain * fastalign::LOG2_E;
    Softmax mine = Softmax::empty();  // the maximum is that of u
    fastalign::for_each_piece<THREADS>(
        row, rows.num_columns, threadIdx.x, [&](int64_t column, bool whole) {
            if (!whole) {
                const float u[1] = {transform.u(widened(row[column]))};
                return mine.add(u, scale);
            }
            const uint4 piece = __ldcs(reinterpret_cast<const uint4*>(row + column));
            const T* values = reinterpret_cast<const T*>(&piece);
            float u[PER_PIECE];
#pragma unroll
            for (int i = 0; i < PER_PIECE; ++i) u[i] = transform.u(widened(values[i]));
            mine.add(u, scale);
        });
    const Softmax all = fastalign::reduce_block<THREADS>(mine, scale);
    if (threadIdx.x != 0) return;
    const int64_t target = rows.targets[index];
    const bool ignored = target == rows.ignore_index;
    const float log_total = logf(all.total), entropy = all.entropy();
    // a number from another row would look like a log-prob
    const bool inside = fastalign::holds(target, rows.num_columns);
    const float u = inside ? transform.u(widened(row[target])) : CUDART_NAN_F;
    const float logprob = (u - all.maximum) * transform.gain - log_total;
    found.logprob[index] = ignored ? 0.0f : logprob;
    found.entropy[index] = ignored || entropy < 0.0f ? 0.0f : entropy;
    found.maximum[index] = all.maximum;
    found.log_total[index] = log_total;
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(const T* logits, Rows rows, Saved saved) {
    constexpr int PER_PIECE = 16 / sizeof(T);
    const int64_t index = blockIdx.x;
    const T* row = logits + index * rows.row_stride;
    T* out = static_cast<T*>(saved.gradient) + index * rows.num_columns;
    const RowTransform transform = rows.transform(index);
    const int64_t target = rows.targets[index];
    const bool of_entropy = saved.grad_entropy != nullptr;
    const RowGradient known = {
        target,
        saved.maximum[index],
        saved.log_total[index],
        saved.logprob[index],
        saved.entropy[index],
        fastalign::holds(target, rows.num_columns) ? saved.grad_logprob[index] : CUDART_NAN_F,
        of_entropy ? saved.grad_entropy[index] : 0.0f,
        of_entropy,
        target == rows.ignore_index};
    const float rest = known.rest();
    const auto compute = [&](float x, int64_t column) {
        return known.by_product(transform, transform.u(x), column, rest);
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
void launch(const T* logits, const Rows& rows, const Found& found, cudaStream_t stream) {
    forward_kernel<T>
        <<<static_cast<unsigned>(rows.num_rows), THREADS, 0, stream>>>(logits, rows, found);
}

template <typename T>
void launch(const T* logits, const Rows& rows, const Saved& saved, cudaStream_t stream) {
    backward_kernel<T>
        <<<static_cast<unsigned>(rows.num_rows), THREADS, 0, stream>>>(logits, rows, saved);
}

template <typename Places>
int32_t run(const void* logits, int32_t dtype, const Rows& rows, const Places& places,
            void* stream) {
    if (rows.num_rows == 0) return 0;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case 0:
            launch(static_cast<const float*>(logits), rows, places, queue);
            break;
        case 1:
            launch(static_cast<const __nv_bfloat16*>(logits), rows, places, queue);
            break;
        case 2:
            launch(static_cast<const __half*>(logits), rows, places, queue);
            break;
        default:
            return 2;
    }
    return fastalign::launched();
}

}  // namespace

int32_t fastalign_token_logprob_forward_cuda(const void* logits, int32_t dtype, int64_t num_rows,
                                             int64_t num_columns, int64_t row_stride, float softcap,
                                             int64_t ignore_index, const int64_t* targets,
                                             const float* temperature, float* logprob,
                                             float* entropy, float* maximum, float* log_total,
                                             void* stream) {
    const Rows rows = {num_rows,     num_columns, row_stride, softcap,
                       ignore_index, targets,     temperature};
    return run(logits, dtype, rows, Found{logprob, entropy, maximum, log_total}, stream);
}

int32_t fastalign_token_logprob_backward_cuda(
    const void* logits, int32_t dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
    float softcap, int64_t ignore_index, const int64_t* targets, const float* temperature,
    const float* logprob, const float* entropy, const float* maximum, const float* log_total,
    const float* grad_logprob, const float* grad_entropy, void* gradient, void* stream) {
    const Rows rows = {num_rows,     num_columns, row_stride, softcap,
                       ignore_index, targets,     temperature};
    const Saved saved = {logprob,      entropy,      maximum, log_total,
                         grad_logprob, grad_entropy, gradient};
    return run(logits, dtype, rows, saved, stream);
}
