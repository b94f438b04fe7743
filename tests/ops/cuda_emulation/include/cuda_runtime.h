// The part of the CUDA runtime that csrc/cuda uses, for a CPU.
#pragma once

#include <stdio.h>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef emulated::Vector<float> float4;
typedef emulated::Vector<unsigned> uint4;
typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaFuncAttributes {
    int ptxVersion;
    size_t sharedSizeBytes;
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return std::exchange(emulated::error, 0); }

inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case 1:
            return "cudaErrorInvalidValue";
        case 9:
            return "cudaErrorInvalidConfiguration";
        case 35:
            return "cudaErrorInsufficientDriver";
        case 209:
            return "cudaErrorNoKernelImageForDevice";
        case 719:
            return "cudaErrorLaunchFailure";
        case 912:
            return "cudaErrorInvalidClusterSize";
        default:
            return "cudaErrorUnknown";
    }
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == 719 && emulated::failure ? emulated::failure : "emulated";
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const int major = emulated::setting("FASTALIGN_EMULATION_CAPABILITY", 9);
    const bool of_memory = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
    *value = of_memory ? int(emulated::MAX_SHARED_BYTES) : major;
    return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    *attributes = {10 * emulated::setting("FASTALIGN_EMULATION_CAPABILITY", 9), 0};
    return emulated::setting("FASTALIGN_EMULATION_ERROR", 0);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || size_t(bytes) > emulated::MAX_SHARED_BYTES) return emulated::error = 1;
    emulated::shared_limits[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    unsigned cluster_size = 1;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        cluster_size = config->attrs[i].val.clusterDim.x;
    emulated::launch(
        {config->gridDim.x, config->blockDim.x, cluster_size, config->dynamicSmemBytes},
        reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
    return emulated::error;
}

template <typename T>
T __ldcs(const T* from) {
    return *from;
}
template <typename T>
void __stcs(T* to, T value) {
    *to = value;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Not inlined: the compiler could fuse the product with a sum.
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }

inline void __syncthreads() { emulated::yield(emulated::Waits::FOR_BLOCK); }

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
    return emulated::exchanged(mask, value, emulated::thread % emulated::WARP + offset);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
    return emulated::exchanged(mask, value, emulated::thread % emulated::WARP - offset);
}

inline unsigned __clusterRelativeBlockRank() { return emulated::block->rank; }
inline unsigned __clusterSizeInBlocks() { return unsigned(emulated::cluster.size()); }
inline void __cluster_barrier_arrive() {
    if (std::exchange(emulated::current_fiber().arrived, true))
        emulated::fail("a second arrival at a cluster's barrier without a wait");
}
inline void __cluster_barrier_wait() {
    if (!std::exchange(emulated::current_fiber().arrived, false))
        emulated::fail("a wait at a cluster's barrier without an arrival");
    emulated::yield(emulated::Waits::FOR_CLUSTER);
}

// Returns the place in another block's shared memory that corresponds to one in this block's.
inline void* __cluster_map_shared_rank(const void* place, unsigned rank) {
    emulated::Block &mine = *emulated::block, &other = *emulated::cluster[rank];
    const auto moved = [place](std::vector<char>& from, std::vector<char>& to) -> char* {
        const char* at = static_cast<const char*>(place);
        const bool inside = at >= from.data() && at < from.data() + from.size();
        return inside && to.size() == from.size() ? to.data() + (at - from.data()) : nullptr;
    };
    if (char* found = moved(mine.dynamic, other.dynamic)) return found;
    for (auto& [number, bytes] : mine.shared)
        if (char* found = moved(bytes, other.shared[number])) return found;
    emulated::fail("a place of a cluster that is not in its shared memory");
    return nullptr;
}
