// What a caller may ask about the library and the current device.
#include <cuda_runtime.h>

#include "../abi.h"

namespace {

// Compiled for the same architectures as every other kernel.
__global__ void probed_kernel() {}

}  // namespace

int32_t fastalign_abi_version(void) { return FASTALIGN_ABI_VERSION; }

int32_t fastalign_cuda_probe(void) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probed_kernel);
    cudaGetLastError();  // the next launch's error is its own
    return -static_cast<int32_t>(error);
}

const char* fastalign_cuda_error_name(int32_t code) {
    return cudaGetErrorName(static_cast<cudaError_t>(-code));
}

const char* fastalign_cuda_error_string(int32_t code) {
    return cudaGetErrorString(static_cast<cudaError_t>(-code));
}
