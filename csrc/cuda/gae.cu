// gae on CUDA: a block a response, one launch. The recursion A_t = delta_t + decay A_(t+1) is a
// composition of maps x -> a x + b; the block composes a tile of them in parallel, tile after tile
// from the response's end. In double: with gamma and lambda near 1 an advantage is a sum of
// thousands of terms.
#include <cuda_runtime.h>

#include "../abi.h"
#include "launch.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PIECE = 4;  // tokens a thread takes at a time: 16 bytes

struct Arguments {
    const float *reward, *value;
    const int64_t* bounds;
    const float* bootstrap_value;
    double gamma, decay;
    float *advantage, *returns;
    bool aligned;
};

struct Affine {
    double a, b;

    // Returns the map that applies `first`, then this one.
    __device__ Affine after(Affine first) const { return {a * first.a, a * first.b + b}; }
    __device__ double operator()(double x) const { return a * x + b; }
};

__device__ inline Affine shift_up(Affine map, int offset) {
    return {__shfl_up_sync(0xffffffffu, map.a, offset), __shfl_up_sync(0xffffffffu, map.b, offset)};
}

// PIECE tokens from `start` on, a multiple of PIECE; some may lie outside the response.
struct Piece {
    int64_t start, begin, end;

    __device__ bool holds(int i) const { return start + i >= begin && start + i < end; }
    __device__ bool whole() const { return start >= begin && start + PIECE <= end; }

    __device__ void load(const float* from, bool aligned, float* values) const {
        if (aligned && whole()) {
            *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(from + start);
            return;
        }
#pragma unroll
        for (int i = 0; i < PIECE; ++i) values[i] = holds(i) ? from[start + i] : 0.0f;
    }

    __device__ void store(float* to, bool aligned, const float* values) const {
        if (aligned && whole()) {
            *reinterpret_cast<float4*>(to + start) = *reinterpret_cast<const float4*>(values);
            return;
        }
#pragma unroll
        for (int i = 0; i < PIECE; ++i)
            if (holds(i)) to[start + i] = values[i];
    }
};

// Returns the value that this thread's map is applied to: `carried` through the maps of the threads
// before it. `carried` becomes the value after the whole block.
__device__ double scan_block(Affine mine, Affine* of_warp, double& carried) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int offset = 1; offset < 32; offset <<= 1) {
        const Affine other = shift_up(mine, offset);
        if (lane >= offset) mine = mine.after(other);
    }
    const Affine before = shift_up(mine, 1);
    if (lane == 31) of_warp[warp] = mine;
    __syncthreads();
    double through = carried, result = carried;
    for (int i = 0; i < WARPS; ++i) {
        if (i == warp) result = through;
        through = of_warp[i](through);
    }
    carried = through;
    return lane == 0 ? result : before(result);
}

__global__ void __launch_bounds__(THREADS) gae_kernel(Arguments given) {
    // Two buffers, so that one barrier a tile is enough.
    __shared__ Affine of_warp[2][WARPS];
    const int64_t response = blockIdx.x;
    const int64_t begin = given.bounds[response], end = given.bounds[response + 1];
    if (begin >= end) return;
    const float following = given.bootstrap_value ? given.bootstrap_value[response] : 0.0f;
    const int64_t last_piece = (end - 1) / PIECE, num_pieces = last_piece - begin / PIECE + 1;
    double carried = 0.0;
    // Thread 0 has a tile's last piece, which comes first in the composition.
    for (int64_t tile = 0; tile < num_pieces; tile += THREADS) {
        const Piece piece = {(last_piece - tile - threadIdx.x) * PIECE, begin, end};
        alignas(16) float reward[PIECE], value[PIECE];
        piece.load(given.reward, given.aligned, reward);
        piece.load(given.value, given.aligned, value);
        const int64_t next = piece.start + PIECE;
        double next_value = next >= begin && next < end ? given.value[next] : following;
        double delta[PIECE];
        Affine mine = {1.0, 0.0};
#pragma unroll
        for (int i = PIECE - 1; i >= 0; --i) {
            if (!piece.holds(i)) continue;
            delta[i] = reward[i] + given.gamma * next_value - value[i];
            next_value = value[i];
            mine = Affine{given.decay, delta[i]}.after(mine);
        }
        double advantage = scan_block(mine, of_warp[tile / THREADS % 2], carried);
        float returns[PIECE];
#pragma unroll
        for (int i = PIECE - 1; i >= 0; --i) {
            if (!piece.holds(i)) continue;
            advantage = delta[i] + given.decay * advantage;
            reward[i] = static_cast<float>(advantage);
            returns[i] = static_cast<float>(advantage + value[i]);
        }
        piece.store(given.advantage, given.aligned, reward);
        piece.store(given.returns, given.aligned, returns);
    }
}

bool is_aligned(const void* start) { return reinterpret_cast<uintptr_t>(start) % 16 == 0; }

}  // namespace

int32_t fastalign_gae_cuda(const float* reward, const float* value, const int64_t* bounds,
                           int64_t num_responses, const float* bootstrap_value, double gamma,
                           double gae_lambda, float* advantage, float* returns, void* stream) {
    if (num_responses == 0) return 0;
    const bool aligned =
        is_aligned(reward) && is_aligned(value) && is_aligned(advantage) && is_aligned(returns);
    const Arguments given = {reward,    value,   bounds, bootstrap_value, gamma, gamma * gae_lambda,
                             advantage, returns, aligned};
    gae_kernel<<<static_cast<unsigned>(num_responses), THREADS, 0,
                 static_cast<cudaStream_t>(stream)>>>(given);
    return fastalign::launched();
}
