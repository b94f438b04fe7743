// head_tile_statistics and head_tile_gradient on CUDA: a block a row; one read, then one read and
// one write. 16-byte accesses where rows are aligned.
#include "../abi.h"
#include "head_tile.cuh"

namespace {

using namespace fastalign;

// A tile of products as both passes read it.
struct SplitTile {
    float* x;
    int64_t num_columns, row_stride;
    float softcap, logit_scale;
    const float* temperature;
    const int64_t* targets;
    const uint8_t* ignored;

    __device__ RowTransform transform(int64_t index) const {
        return row_transform(softcap, logit_scale, temperature, index);
    }
};

struct TileStatistics {
    float *maximum, *total, *weighted, *target_u;
};

struct TileGradient {
    const float *maximum, *log_total, *entropy;
    void* gradient;
    int64_t gradient_stride;
    const float *grad_logprob, *grad_entropy;
};

template <bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    head_tile_statistics_kernel(SplitTile tile, TileStatistics found) {
    const int64_t index = blockIdx.x;
    const float* row = tile.x + index * tile.row_stride;
    const RowTransform transform = tile.transform(index);
    const Softmax all = read_statistics<ALIGNED>(row, tile.num_columns, transform);
    if (threadIdx.x != 0) return;
    const bool ignored = tile.ignored[index];
    const int64_t target = tile.targets[index];
    found.maximum[index] = ignored ? 0.0f : all.maximum;
    found.total[index] = ignored ? 0.0f : all.total;
    if (found.weighted) found.weighted[index] = ignored ? 0.0f : all.natural_weighted();
    found.target_u[index] =
        ignored || !holds(target, tile.num_columns) ? 0.0f : transform.u(row[target]);
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    head_tile_gradient_kernel(SplitTile tile, TileGradient wanted) {
    const int64_t index = blockIdx.x, target = tile.targets[index];
    const float* row = tile.x + index * tile.row_stride;
    const RowTransform transform = tile.transform(index);
    const float maximum = wanted.maximum[index], log_total = wanted.log_total[index];
    const float x = holds(target, tile.num_columns) ? row[target] : 0.0f;
    __syncthreads();  // every thread has read the target before any overwrites it
    const bool of_entropy = wanted.grad_entropy != nullptr;
    const RowGradient known = {target,
                               maximum,
                               log_total,
                               (transform.u(x) - maximum) * transform.gain - log_total,
                               of_entropy ? wanted.entropy[index] : 0.0f,
                               wanted.grad_logprob ? wanted.grad_logprob[index] : 1.0f,
                               of_entropy ? wanted.grad_entropy[index] : 0.0f,
                               of_entropy,
                               tile.ignored[index] != 0};
    T* gradient = static_cast<T*>(wanted.gradient) + index * wanted.gradient_stride;
    write_gradient<T, ALIGNED>(row, gradient, tile.num_columns, transform, known);
}

template <typename T>
int32_t launch_gradient(const SplitTile& tile, const TileGradient& wanted, int64_t num_rows,
                        cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(num_rows);
    if (aligned(tile.x, tile.row_stride, sizeof(float)) &&
        aligned(wanted.gradient, wanted.gradient_stride, sizeof(T))) {
        head_tile_gradient_kernel<T, true><<<blocks, THREADS, 0, stream>>>(tile, wanted);
    } else {
        head_tile_gradient_kernel<T, false><<<blocks, THREADS, 0, stream>>>(tile, wanted);
    }
    return launched();
}

}  // namespace

int32_t fastalign_head_tile_statistics_cuda(const float* x, int64_t num_rows, int64_t num_columns,
                                            int64_t row_stride, float softcap, float logit_scale,
                                            const float* temperature, const int64_t* targets,
                                            const uint8_t* ignored, float* maximum, float* total,
                                            float* weighted, float* target_u, void* stream) {
    if (num_rows == 0) return 0;
    const SplitTile tile = {const_cast<float*>(x), num_columns, row_stride, softcap,
                            logit_scale,           temperature, targets,    ignored};
    const TileStatistics found = {maximum, total, weighted, target_u};
    const unsigned blocks = static_cast<unsigned>(num_rows);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (aligned(x, row_stride, sizeof(float))) {
        head_tile_statistics_kernel<true><<<blocks, THREADS, 0, queue>>>(tile, found);
    } else {
        head_tile_statistics_kernel<false><<<blocks, THREADS, 0, queue>>>(tile, found);
    }
    return launched();
}

int32_t fastalign_head_tile_gradient_cuda(float* x, int64_t num_rows, int64_t num_columns,
                                          int64_t row_stride, float softcap, float logit_scale,
                                          const float* temperature, const int64_t* targets,
                                          const uint8_t* ignored, const float* maximum,
                                          const float* log_total, const float* entropy,
                                          void* gradient, int32_t gradient_dtype,
                                          int64_t gradient_stride, const float* grad_logprob,
                                          const float* grad_entropy, void* stream) {
    if (num_rows == 0) return 0;
    const SplitTile tile = {x,           num_columns, row_stride, softcap,
                            logit_scale, temperature, targets,    ignored};
    const TileGradient wanted = {maximum,         log_total,    entropy,     gradient,
                                 gradient_stride, grad_logprob, grad_entropy};
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (gradient_dtype == 0) return launch_gradient<float>(tile, wanted, num_rows, queue);
    if (gradient_dtype == 1) return launch_gradient<__nv_bfloat16>(tile, wanted, num_rows, queue);
    return 2;
}
