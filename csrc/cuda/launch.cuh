// What a function returns of its launch.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastalign {

// Returns 0, or CUDA's error, negative, which fastalign_cuda_error_name explains.
inline int32_t launched() { return -static_cast<int32_t>(cudaGetLastError()); }

}  // namespace fastalign
