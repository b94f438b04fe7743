// The native libraries' whole interface: plain C, addresses and sizes, no torch header. One build
// serves every torch.
//
// Legend: T rows, V columns (vocabulary). All arrays are contiguous unless a stride is given; a row
// of logits has unit column stride. `dtype` is that of logits and gradient: 0 float32, 1 bfloat16,
// 2 float16; everything else is float32 or int64. The CPU library ends in _cpu and takes a number
// of threads and an instruction set (-1 the best that the processor runs, 0 portable, 1 AVX2, 2
// AVX-512). The CUDA library ends in _cuda and takes a cudaStream_t; it launches and returns.
// Functions return 0, 1 for an instruction set that cannot be used, 2 for an unknown dtype, 3 for a
// failed launch.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTALIGN_ABI_VERSION 2
#define FASTALIGN_EXPORT __attribute__((visibility("default")))

// The version above, checked when the library is loaded.
FASTALIGN_EXPORT int32_t fastalign_abi_version(void);

// Whether this build has the instruction set and this processor runs it.
FASTALIGN_EXPORT int32_t fastalign_cpu_isa_usable(int32_t isa);

// z = softcap tanh(logits / softcap) / temperature (softcap 0: none; temperature (T,) or NULL).
// logprob (T,) = z[target] - logsumexp; entropy (T,); logsumexp (T,). A target of ignore_index
// gives logprob 0 and entropy 0.
FASTALIGN_EXPORT int32_t fastalign_token_logprob_forward_cpu(
    const void* logits, int32_t dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
    float softcap, int64_t ignore_index, const int64_t* targets, const float* temperature,
    float* logprob, float* entropy, float* logsumexp, int32_t num_threads, int32_t isa);

// gradient (T, V) of the logits, contiguous, from grad_logprob (T,) and grad_entropy (T,) or NULL:
// [g (1[v = y] - p_v) - e p_v (log p_v + H)] dz_v / dlogits_v; zero where ignored.
FASTALIGN_EXPORT int32_t fastalign_token_logprob_backward_cpu(
    const void* logits, int32_t dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
    float softcap, int64_t ignore_index, const int64_t* targets, const float* temperature,
    const float* logsumexp, const float* entropy, const float* grad_logprob,
    const float* grad_entropy, void* gradient, int32_t num_threads, int32_t isa);

// Whether this processor has what the next function needs: AVX-512 with bfloat16 instructions.
FASTALIGN_EXPORT int32_t fastalign_product_bf16_usable_cpu(void);

// c (num_rows, num_columns) float32 = a (num_rows, depth) b (depth, num_columns), both bfloat16, or
// c += a b; element (i, j) of a is at a[i * row_stride + j * column_stride], and one of the two
// strides is 1; so for b.
FASTALIGN_EXPORT int32_t fastalign_product_bf16_cpu(
    const void* a, int64_t a_row_stride, int64_t a_column_stride, const void* b,
    int64_t b_row_stride, int64_t b_column_stride, float* c, int64_t c_stride, int64_t num_rows,
    int64_t num_columns, int64_t depth, int32_t accumulate, int32_t num_threads, int32_t isa);

// One pass over a tile of a head's products, x (num_rows, num_columns), which it may destroy:
// z = softcap tanh(logit_scale x / softcap) / temperature (softcap 0: logit_scale x / temperature).
// logprob (T,); entropy (T,) or NULL; is_argmax (T,), whether no z is larger than the target's;
// zeros for rows with `ignored`. `gradient` (T, V) or NULL, float32 (gradient_dtype 0; may be x
// itself) or bfloat16 (1), rows gradient_stride apart: what token_logprob's backward writes, by x,
// with grad_logprob NULL standing for ones; grad_entropy may be NULL.
FASTALIGN_EXPORT int32_t fastalign_head_tile_cpu(
    float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    float* logprob, float* entropy, uint8_t* is_argmax, void* gradient, int32_t gradient_dtype,
    int64_t gradient_stride, const float* grad_logprob, const float* grad_entropy,
    int32_t num_threads, int32_t isa);

// The same on a CUDA device; addresses are of device memory.
FASTALIGN_EXPORT int32_t fastalign_token_logprob_forward_cuda(
    const void* logits, int32_t dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
    float softcap, int64_t ignore_index, const int64_t* targets, const float* temperature,
    float* logprob, float* entropy, float* logsumexp, void* stream);

FASTALIGN_EXPORT int32_t fastalign_token_logprob_backward_cuda(
    const void* logits, int32_t dtype, int64_t num_rows, int64_t num_columns, int64_t row_stride,
    float softcap, int64_t ignore_index, const int64_t* targets, const float* temperature,
    const float* logsumexp, const float* entropy, const float* grad_logprob,
    const float* grad_entropy, void* gradient, void* stream);

FASTALIGN_EXPORT int32_t fastalign_head_tile_cuda(
    float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    float* logprob, float* entropy, uint8_t* is_argmax, void* gradient, int32_t gradient_dtype,
    int64_t gradient_stride, const float* grad_logprob, const float* grad_entropy, void* stream);

// The pass over a tile in two, for a vocabulary whose columns are shared among processes. First
// each row's statistics over these columns, x only read. With u = tanh(logit_scale x / softcap), or
// x where there is no softcap: maximum (T,) of u, -inf where all are; of z as in head_tile, total
// (T,), the sum of exp(z - max z), and weighted (T,) or NULL, that of (z - max z) exp(z - max z),
// both 0 in that case; target_u (T,), u at the target, 0 for a target outside 0..num_columns - 1,
// which is another process's. Rows with `ignored`: zeros.
FASTALIGN_EXPORT int32_t fastalign_head_tile_statistics_cpu(
    const float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    float* maximum, float* total, float* weighted, float* target_u, int32_t num_threads,
    int32_t isa);

// Then head_tile's gradient of these columns, given the statistics over all columns: maximum of u,
// log_total = log sum exp(z - max z), and entropy (T,), which may be NULL where grad_entropy is.
FASTALIGN_EXPORT int32_t fastalign_head_tile_gradient_cpu(
    float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    const float* maximum, const float* log_total, const float* entropy, void* gradient,
    int32_t gradient_dtype, int64_t gradient_stride, const float* grad_logprob,
    const float* grad_entropy, int32_t num_threads, int32_t isa);

FASTALIGN_EXPORT int32_t fastalign_head_tile_statistics_cuda(
    const float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    float* maximum, float* total, float* weighted, float* target_u, void* stream);

FASTALIGN_EXPORT int32_t fastalign_head_tile_gradient_cuda(
    float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride, float softcap,
    float logit_scale, const float* temperature, const int64_t* targets, const uint8_t* ignored,
    const float* maximum, const float* log_total, const float* entropy, void* gradient,
    int32_t gradient_dtype, int64_t gradient_stride, const float* grad_logprob,
    const float* grad_entropy, void* stream);

#ifdef __cplusplus
}
#endif
