// head_tile on CUDA: a block a row. The row is read once for its statistics and again, from the
// second-level cache where it still is, for its gradient; one write. 16-byte accesses where rows
// are aligned.
#include "../abi.h"
#include "head_tile.cuh"

namespace {

using namespace fastalign;

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

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) head_tile_kernel(HeadTile tile) {
    const int64_t index = blockIdx.x, num_columns = tile.num_columns;
    const float* row = tile.x + index * tile.row_stride;
    const RowTransform transform =
        row_transform(tile.softcap, tile.logit_scale, tile.temperature, index);
    const bool ignored = tile.ignored[index];
    const Softmax all = read_statistics<ALIGNED>(row, num_columns, transform);
    const int64_t target = tile.targets[index];
    const float shifted = transform.gain * (transform.u(row[target]) - all.maximum);
    const float log_total = logf(all.total), logprob = shifted - log_total;
    const float entropy = log_total - all.weighted / all.total;
    if (threadIdx.x == 0) {
        tile.logprob[index] = ignored ? 0.0f : logprob;
        tile.is_argmax[index] = !ignored && shifted >= 0.0f;
        if (tile.entropy) tile.entropy[index] = ignored || entropy < 0.0f ? 0.0f : entropy;
    }
    if (!tile.gradient) return;
    __syncthreads();  // every thread has read the target before any overwrites it
    const RowGradient known = {target,
                               all.maximum,
                               log_total,
                               logprob,
                               entropy,
                               tile.grad_logprob ? tile.grad_logprob[index] : 1.0f,
                               tile.grad_entropy ? tile.grad_entropy[index] : 0.0f,
                               tile.grad_entropy != nullptr,
                               ignored};
    T* gradient = static_cast<T*>(tile.gradient) + index * tile.gradient_stride;
    write_gradient<T, ALIGNED>(row, gradient, num_columns, transform, known);
}

template <typename T>
int32_t launch(const HeadTile& tile, int64_t num_rows, cudaStream_t stream) {
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
