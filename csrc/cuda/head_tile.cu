// head_tile on CUDA: a block a row. The row is read once for its statistics and again, from the
// second-level cache where it still is, for its gradient; one write. 16-byte accesses where rows
// are aligned.
#include <cuda_bf16.h>

#include "../abi.h"
#include "reduce.cuh"

namespace {

using fastalign::Softmax;

constexpr int THREADS = 512;
constexpr int PIECE = 8;  // columns a thread takes at a time: 32 bytes in, 16 or 32 out

struct HeadTile {
    float* x;
    int64_t num_columns, row_stride;
    float softcap, logit_scale;
    const float* temperature;
    const int64_t* targets;
    const uint8_t* ignored;
    float *logprob, *entropy;
    uint8_t* is_argmax;
    void* gradient;
    int64_t gradient_stride;
    const float *grad_logprob, *grad_entropy;
};

template <bool ALIGNED>
__device__ inline void load_piece(const float* from, int count, float padding, float* values) {
    if (ALIGNED && count == PIECE) {
        *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(from);
        *reinterpret_cast<float4*>(values + 4) = *reinterpret_cast<const float4*>(from + 4);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i) values[i] = i < count ? from[i] : padding;
}

template <bool ALIGNED>
__device__ inline void store_piece(float* to, int count, const float* values) {
    if (ALIGNED && count == PIECE) {
        __stcs(reinterpret_cast<float4*>(to), *reinterpret_cast<const float4*>(values));
        __stcs(reinterpret_cast<float4*>(to + 4), *reinterpret_cast<const float4*>(values + 4));
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (i < count) to[i] = values[i];
}

template <bool ALIGNED>
__device__ inline void store_piece(__nv_bfloat16* to, int count, const float* values) {
    __nv_bfloat162 pairs[PIECE / 2];
#pragma unroll
    for (int i = 0; i < PIECE / 2; ++i)
        pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    if (ALIGNED && count == PIECE) {
        __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(pairs));
        return;
    }
    const __nv_bfloat16* rounded = reinterpret_cast<const __nv_bfloat16*>(pairs);
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (i < count) to[i] = rounded[i];
}

struct RowTransform {
    float cap_scale, gain, slope;  // u = tanh(cap_scale x) or x; z = gain u; slope: dz / dx by u
    bool softcap;
    __device__ float u(float x) const { return softcap ? tanhf(cap_scale * x) : x; }
};

template <bool ALIGNED>
__device__ Softmax read_statistics(const float* row, int64_t num_columns,
                                   const RowTransform& transform) {
    Softmax mine = Softmax::empty();
    for (int64_t column = threadIdx.x * PIECE; column < num_columns; column += THREADS * PIECE) {
        const int count = num_columns - column < PIECE ? num_columns - column : PIECE;
        alignas(16) float z[PIECE];
        load_piece<ALIGNED>(row + column, count, 0.0f, z);
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            if (i < count) mine.add(transform.gain * transform.u(z[i]));
    }
    return fastalign::reduce_block<THREADS>(mine);
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) head_tile_kernel(HeadTile tile) {
    const int64_t index = blockIdx.x, num_columns = tile.num_columns;
    const float* row = tile.x + index * tile.row_stride;
    const float cooling = tile.temperature ? 1.0f / tile.temperature[index] : 1.0f;
    const bool softcap = tile.softcap > 0.0f, ignored = tile.ignored[index];
    const float slope = tile.logit_scale * cooling;
    const RowTransform transform = {softcap ? tile.logit_scale / tile.softcap : 0.0f,
                                    softcap ? tile.softcap * cooling : slope, slope, softcap};
    const Softmax all = read_statistics<ALIGNED>(row, num_columns, transform);
    const int64_t target = tile.targets[index];
    const float shifted = transform.gain * transform.u(row[target]) - all.maximum;
    const float log_total = logf(all.total), logprob = shifted - log_total;
    const float entropy = log_total - all.weighted / all.total;
    if (threadIdx.x == 0) {
        tile.logprob[index] = ignored ? 0.0f : logprob;
        tile.is_argmax[index] = !ignored && shifted >= 0.0f;
        if (tile.entropy) tile.entropy[index] = ignored || entropy < 0.0f ? 0.0f : entropy;
    }
    if (!tile.gradient) return;
    __syncthreads();  // every thread has read the target before any overwrites it
    const float g = tile.grad_logprob ? tile.grad_logprob[index] : 1.0f;
    const float e = tile.grad_entropy ? tile.grad_entropy[index] : 0.0f;
    const float rest = -expm1f(logprob);  // 1 - p: exact where p is near 1
    T* gradient = static_cast<T*>(tile.gradient) + index * tile.gradient_stride;
    for (int64_t column = threadIdx.x * PIECE; column < num_columns; column += THREADS * PIECE) {
        const int count = num_columns - column < PIECE ? num_columns - column : PIECE;
        alignas(16) float values[PIECE];
        load_piece<ALIGNED>(row + column, count, 0.0f, values);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const float u = transform.u(values[i]);
            const float log_p = transform.gain * u - all.maximum - log_total, p = expf(log_p);
            float result = column + i == target ? g * rest : -g * p;
            if (tile.grad_entropy) result -= e * p * ((log_p < -1e30f ? -1e30f : log_p) + entropy);
            result *= transform.slope;
            if (softcap) result *= 1.0f - u * u;
            values[i] = ignored ? 0.0f : result;
        }
        store_piece<ALIGNED>(gradient + column, count, values);
    }
}

template <typename T>
int32_t launch(const HeadTile& tile, int64_t num_rows, cudaStream_t stream) {
    const auto aligned = [](const void* start, int64_t stride, int64_t size) {
        return reinterpret_cast<uintptr_t>(start) % 16 == 0 && stride * size % 16 == 0;
    };
    const unsigned blocks = static_cast<unsigned>(num_rows);
    if (aligned(tile.x, tile.row_stride, sizeof(float)) &&
        aligned(tile.gradient, tile.gradient_stride, sizeof(T))) {
        head_tile_kernel<T, true><<<blocks, THREADS, 0, stream>>>(tile);
    } else {
        head_tile_kernel<T, false><<<blocks, THREADS, 0, stream>>>(tile);
    }
    return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

}  // namespace

int32_t fastalign_head_tile_cuda(float* x, int64_t num_rows, int64_t num_columns,
                                 int64_t row_stride, float softcap, float logit_scale,
                                 const float* temperature, const int64_t* targets,
                                 const uint8_t* ignored, float* logprob, float* entropy,
                                 uint8_t* is_argmax, void* gradient, int32_t gradient_dtype,
                                 int64_t gradient_stride, const float* grad_logprob,
                                 const float* grad_entropy, void* stream) {
    if (num_rows == 0) return 0;
    const HeadTile tile = {x,           num_columns, row_stride,      softcap,      logit_scale,
                           temperature, targets,     ignored,         logprob,      entropy,
                           is_argmax,   gradient,    gradient_stride, grad_logprob, grad_entropy};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (gradient_dtype == 0) return launch<float>(tile, num_rows, queue);
    if (gradient_dtype == 1) return launch<__nv_bfloat16>(tile, num_rows, queue);
    return 2;
}
