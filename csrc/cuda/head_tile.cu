// head_tile on CUDA. A block a row reads it twice, for the statistics and for the gradient; many
// rows are in flight, more than the second-level cache holds, so the second reading may be
// memory's. From sm_90 on a cluster of blocks a row keeps a long row in its shared memory, and
// reads it once. One write. 16-byte accesses where rows are aligned.
#include "../abi.h"
#include "head_tile.cuh"

namespace {

using namespace fastalign;

struct HeadTile {  // see fastalign_head_tile in abi.h
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

// Returns what the gradient of a row is made from; `writes`: also writes the statistics. `u` is
// that of the target, NaN where the target is no column.
__device__ inline RowGradient finish_row(const HeadTile& tile, int64_t index,
                                         const RowTransform& transform, const Softmax& all, float u,
                                         bool writes) {
    const bool ignored = tile.ignored[index];
    const float shifted = transform.gain * (u - all.maximum);
    const float log_total = logf(all.total), logprob = shifted - log_total;
    const float entropy = all.entropy();
    if (writes) {
        tile.logprob[index] = ignored ? 0.0f : logprob;
        tile.is_argmax[index] = !ignored && shifted >= 0.0f;
        if (tile.entropy) tile.entropy[index] = ignored || entropy < 0.0f ? 0.0f : entropy;
    }
    const float g = tile.grad_logprob ? tile.grad_logprob[index] : 1.0f;
    return {tile.targets[index],
            all.maximum,
            log_total,
            logprob,
            entropy,
            holds(tile.targets[index], tile.num_columns) ? g : CUDART_NAN_F,
            tile.grad_entropy ? tile.grad_entropy[index] : 0.0f,
            tile.grad_entropy != nullptr,
            ignored};
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) head_tile_kernel(HeadTile tile) {
    const int64_t index = blockIdx.x, num_columns = tile.num_columns;
    const float* row = tile.x + index * tile.row_stride;
    const RowTransform transform =
        row_transform(tile.softcap, tile.logit_scale, tile.temperature, index);
    const Softmax all = read_statistics<ALIGNED>(row, num_columns, transform);
    const int64_t target = tile.targets[index];
    // a number from another row would look like a log-prob
    const float u = holds(target, num_columns) ? transform.u(row[target]) : CUDART_NAN_F;
    const RowGradient known = finish_row(tile, index, transform, all, u, threadIdx.x == 0);
    if (!tile.gradient) return;
    __syncthreads();  // every thread has read the target before any overwrites it
    T* gradient = static_cast<T*>(tile.gradient) + index * tile.gradient_stride;
    write_gradient<T, ALIGNED>(row, gradient, num_columns, transform, known);
}

constexpr int CLUSTER = 8;  // blocks a row; the largest number that every GPU with clusters grants
// A shorter row gives a block less than one piece a thread.
constexpr int64_t MIN_CLUSTER_COLUMNS = CLUSTER * THREADS * PIECE / 2;

// Pieces of a row that each block of a cluster keeps.
__host__ __device__ inline int64_t pieces_per_block(int64_t num_columns) {
    return (num_columns + CLUSTER * PIECE - 1) / (CLUSTER * PIECE);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTALIGN_CLUSTERS

// The u of one block's columns, in two planes of 16 bytes a piece, so that neighbouring threads
// have neighbouring places.
struct KeptColumns {
    float4* planes;
    int64_t num_pieces;

    __device__ void store(int64_t column, const float (&u)[PIECE]) const {
        planes[column / PIECE] = *reinterpret_cast<const float4*>(u);
        planes[num_pieces + column / PIECE] = *reinterpret_cast<const float4*>(u + 4);
    }
    __device__ void load(int64_t column, float (&u)[PIECE]) const {
        *reinterpret_cast<float4*>(u) = planes[column / PIECE];
        *reinterpret_cast<float4*>(u + 4) = planes[num_pieces + column / PIECE];
    }
    __device__ float at(int64_t column) const {
        const int64_t place = column / PIECE + (column % PIECE < 4 ? 0 : num_pieces);
        return reinterpret_cast<const float*>(planes + place)[column % 4];
    }
};

// What each block of a cluster tells all of them.
struct BlockShare {
    Softmax softmax;
    float target;  // u of the target, where that block keeps it
};

// The statistics over a cluster's row, and the target's u, in every thread of its blocks. Between
// its two barriers each block writes into the shared memory of all; no block reads another's, so
// that one may end before the others.
__device__ inline BlockShare reduce_cluster(const BlockShare& mine, BlockShare* of_rank,
                                            unsigned target_rank, float scale) {
    __cluster_barrier_wait();  // all blocks have begun
    if (threadIdx.x < CLUSTER) {
        void* place = __cluster_map_shared_rank(of_rank, threadIdx.x);
        static_cast<BlockShare*>(place)[__clusterRelativeBlockRank()] = mine;
    }
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    // in the same order, and so to the same bits, in every block
    BlockShare all = of_rank[0];
    for (int rank = 1; rank < CLUSTER; ++rank) all.softmax.merge(of_rank[rank].softmax, scale);
    all.target = of_rank[target_rank].target;
    return all;
}

// head_tile_kernel by a cluster of blocks a row; aligned, and with a gradient.
template <typename T>
__device__ inline void run_cluster(const HeadTile& tile) {
    extern __shared__ float4 kept[];
    __shared__ BlockShare of_rank[CLUSTER];
    __cluster_barrier_arrive();
    const int64_t index = blockIdx.x / CLUSTER, rank = __clusterRelativeBlockRank();
    const KeptColumns columns = {kept, pieces_per_block(tile.num_columns)};
    const int64_t most = columns.num_pieces * PIECE, begin = rank * most;
    const int64_t rest = tile.num_columns - begin;
    const int64_t num_columns = rest < 0 ? 0 : rest < most ? rest : most;
    const float* row = tile.x + index * tile.row_stride + begin;
    const RowTransform transform =
        row_transform(tile.softcap, tile.logit_scale, tile.temperature, index);
    const float scale = transform.gain * LOG2_E;
    Softmax mine = Softmax::empty();
    for_each_tile_piece(num_columns, [&](int64_t column, int count) {
        alignas(16) float u[PIECE];
        load_u<true>(row + column, count, transform, u);
        columns.store(column, u);
        mine.add(u, scale);
    });
    mine = reduce_block<THREADS>(mine, scale);  // its barrier comes behind what all have kept
    const int64_t target = tile.targets[index];
    const bool inside = holds(target, tile.num_columns);
    const unsigned target_rank = inside ? static_cast<unsigned>(target / most) : 0;
    const bool here = inside && target_rank == rank;
    const float u = here ? columns.at(target - begin) : CUDART_NAN_F;
    const BlockShare all = reduce_cluster({mine, u}, of_rank, target_rank, scale);
    const RowGradient known =
        finish_row(tile, index, transform, all.softmax, all.target, rank == 0 && threadIdx.x == 0);
    T* gradient = static_cast<T*>(tile.gradient) + index * tile.gradient_stride + begin;
    const float one_less_p = known.rest();
    for_each_tile_piece(num_columns, [&](int64_t column, int count) {
        alignas(16) float values[PIECE];
        columns.load(column, values);
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            values[i] = known.by_product(transform, values[i], begin + column + i, one_less_p);
        store_piece<true>(gradient + column, count, values);
    });
}

#endif

template <typename T>
__global__ void __launch_bounds__(THREADS) head_tile_cluster_kernel(HeadTile tile) {
#ifdef FASTALIGN_CLUSTERS
    run_cluster<T>(tile);
#else
    __trap();  // launch() takes the kernel above there
#endif
}

// Bytes of a block's kept columns if the cluster's kernel can run here and the row is long enough
// for it, else 0.
template <typename T>
int kept_bytes(const HeadTile& tile) {
    if (!tile.gradient || tile.num_columns < MIN_CLUSTER_COLUMNS) return 0;
    int device = 0, most = 0;
    cudaFuncAttributes compiled;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                              device) == cudaSuccess &&
                       cudaFuncGetAttributes(&compiled, head_tile_cluster_kernel<T>) == cudaSuccess;
    const int64_t bytes = pieces_per_block(tile.num_columns) * PIECE * sizeof(float);
    // code for an older GPU may run on a newer one, and has no clusters
    if (!known || compiled.ptxVersion < 90) return 0;
    return bytes + static_cast<int64_t>(compiled.sharedSizeBytes) <= most ? bytes : 0;
}

template <typename T>
int32_t launch_clusters(const HeadTile& tile, int64_t num_rows, int bytes, cudaStream_t stream) {
    auto* const kernel = head_tile_cluster_kernel<T>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(num_rows * CLUSTER));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, tile);
    return launched();
}

template <typename T>
int32_t launch(const HeadTile& tile, int64_t num_rows, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(num_rows);
    if (aligned(tile.x, tile.row_stride, sizeof(float)) &&
        aligned(tile.gradient, tile.gradient_stride, sizeof(T))) {
        const int bytes = kept_bytes<T>(tile);
        if (bytes > 0) return launch_clusters<T>(tile, num_rows, bytes, stream);
        head_tile_kernel<T, true><<<blocks, THREADS, 0, stream>>>(tile);
    } else {
        head_tile_kernel<T, false><<<blocks, THREADS, 0, stream>>>(tile);
    }
    return launched();
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
