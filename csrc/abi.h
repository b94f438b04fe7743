// The native libraries' whole interface: plain C, addresses and sizes, no torch header. One build
// serves every torch.
//
// Legend: T rows, V columns (vocabulary). All arrays are contiguous unless a stride is given; a row
// of logits has unit column stride. `dtype` is that of logits and gradient: 0 float32, 1 bfloat16,
// 2 float16; everything else is float32 or int64. The CPU library ends in _cpu and takes a number
// of threads and an instruction set (-1 the best that the processor runs, 0 portable, 1 AVX2, 2
// AVX-512). The CUDA library ends in _cuda and takes a cudaStream_t; it launches and returns.
// Functions return 0, 1 for an instruction set that cannot be used, 2 for an unknown dtype, and
// CUDA's error, negative, where a launch failed. Addresses are of the device's memory.
//
// A target that is neither ignored nor one of the V columns gives a log-prob and a row of the
// gradient that are NaN, not numbers that lie in another place.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTALIGN_ABI_VERSION 7
#define FASTALIGN_EXPORT __attribute__((visibility("default")))

// Declares a function of both libraries.
#define FASTALIGN_BOTH(name, ...)                                                     \
    FASTALIGN_EXPORT int32_t fastalign_##name##_cpu(__VA_ARGS__, int32_t num_threads, \
                                                    int32_t isa);                     \
    FASTALIGN_EXPORT int32_t fastalign_##name##_cuda(__VA_ARGS__, void* stream);

// Returns the version above, which is checked when the library is loaded.
FASTALIGN_EXPORT int32_t fastalign_abi_version(void);

// Returns 0 if the current GPU and its driver run the CUDA library's kernels, else CUDA's error,
// negative. No kernel is launched.
FASTALIGN_EXPORT int32_t fastalign_cuda_probe(void);

// Return the name and the explanation of an error that a function of the CUDA library returned.
FASTALIGN_EXPORT const char* fastalign_cuda_error_name(int32_t code);
FASTALIGN_EXPORT const char* fastalign_cuda_error_string(int32_t code);

// Returns 1 if this build has the instruction set and this processor runs it.
FASTALIGN_EXPORT int32_t fastalign_cpu_isa_usable(int32_t isa);

// z = gain u = softcap tanh(logits / softcap) / temperature, u the tanh, or the logits (softcap 0:
// none; temperature (T,) or NULL). logprob (T,); entropy (T,); maximum (T,) of u; log_total (T,) =
// log sum exp(z - max z). A target of ignore_index gives logprob 0 and entropy 0.
FASTALIGN_BOTH(token_logprob_forward, const void* logits, int32_t dtype, int64_t num_rows,
               int64_t num_columns, int64_t row_stride, float softcap, int64_t ignore_index,
               const int64_t* targets, const float* temperature, float* logprob, float* entropy,
               float* maximum, float* log_total)

// gradient (T, V) of the logits, contiguous, from what the forward wrote, grad_logprob (T,) and
// grad_entropy (T,) or NULL: [g (1[v = y] - p_v) - e p_v (log p_v + H)] dz_v / dlogits_v; zero
// where ignored.
FASTALIGN_BOTH(token_logprob_backward, const void* logits, int32_t dtype, int64_t num_rows,
               int64_t num_columns, int64_t row_stride, float softcap, int64_t ignore_index,
               const int64_t* targets, const float* temperature, const float* logprob,
               const float* entropy, const float* maximum, const float* log_total,
               const float* grad_logprob, const float* grad_entropy, void* gradient)

// Returns 1 if this processor has what the next function needs, AVX-512 with bfloat16, 2 if it has
// AMX too, which the best instruction set (isa -1) takes; 0 elsewhere.
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
FASTALIGN_BOTH(head_tile, float* x, int64_t num_rows, int64_t num_columns, int64_t row_stride,
               float softcap, float logit_scale, const float* temperature, const int64_t* targets,
               const uint8_t* ignored, float* logprob, float* entropy, uint8_t* is_argmax,
               void* gradient, int32_t gradient_dtype, int64_t gradient_stride,
               const float* grad_logprob, const float* grad_entropy)

// Preference pairs, B of them, whose 2B sequences of tokens lie between bounds (2B + 1,), chosen
// first: losses (B,); sequence_logprob (2B,), each the sum of its part of logprob, in double,
// rounded once; coefficient (2B,), the derivative of a pair's loss by each of its two. `link` and
// the numbers are those of preference_pair.h. reference_logprob (2B,), length (2B,) and tie (B,)
// may be NULL: no reference, all rows count, no tie. An unknown link returns 2.
FASTALIGN_BOTH(preference_loss_forward, const float* logprob, const int64_t* bounds,
               const float* reference_logprob, const int64_t* length, const uint8_t* tie,
               int64_t num_pairs, int32_t link, int32_t per_token, float beta, float length_weight,
               float threshold, float right, float wrong, float tie_offset, float* losses,
               float* sequence_logprob, float* coefficient)

// gradient (N,) of logprob: in sequence s of pair b, grad_losses[b] coefficient[s] +
// grad_sequence_logprob[s], the latter (2B,) or NULL.
FASTALIGN_BOTH(preference_loss_backward, const float* grad_losses,
               const float* grad_sequence_logprob, const float* coefficient, const int64_t* bounds,
               int64_t num_pairs, float* gradient)

// Packed responses, here and below: response r has the tokens bounds[r] <= t < bounds[r + 1], N in
// all. kl (N,) = x, x^2 / 2 or, with x at least -20, min(exp(-x) - 1 + x, max_k3) (estimator 0, 1,
// 2; an unknown one is an unknown dtype), x = logprob - reference_logprob, both (N,); 0 where mask
// (N,) is 0 (NULL: all count). sequence_kl (R,) its sums, added in double. reward (N,) =
// -coefficient kl, and 0 where mask is 0; score (R,) or NULL is added at the last token that
// counts; where there is none, sequence_kl is NaN. adaptive_coefficient () replaces coefficient
// unless NULL.
FASTALIGN_BOTH(kl_penalty_forward, const float* logprob, const float* reference_logprob,
               const int64_t* bounds, int64_t num_responses, const float* score, float coefficient,
               const float* adaptive_coefficient, const uint8_t* mask, int32_t estimator,
               float max_k3, float* reward, float* kl, float* sequence_kl)

// gradient (N,) of logprob from grad_kl (N,) and grad_sequence_kl (R,), each may be NULL: their sum
// times 1, x or 1 - exp(-x), the last 0 where a bound changes the estimate; 0 where mask is 0.
FASTALIGN_BOTH(kl_penalty_backward, const float* grad_kl, const float* grad_sequence_kl,
               const float* logprob, const float* reference_logprob, const int64_t* bounds,
               int64_t num_responses, const uint8_t* mask, int32_t estimator, float max_k3,
               float* gradient)

// A_t = delta_t + gamma gae_lambda A_(t+1), delta_t = reward_t + gamma value_(t+1) - value_t, from
// the end of each packed response, in double, after which the value is bootstrap_value (R,), or 0
// for NULL: advantage (N,) = A, returns (N,) = A + value.
FASTALIGN_BOTH(gae, const float* reward, const float* value, const int64_t* bounds,
               int64_t num_responses, const float* bootstrap_value, double gamma, double gae_lambda,
               float* advantage, float* returns)

// The pass over a tile in two, for a vocabulary whose columns are shared among processes. First
// each row's statistics over these columns, x only read. With u = tanh(logit_scale x / softcap), or
// x where there is no softcap: maximum (T,) of u, -inf where all are; of z as in head_tile, total
// (T,), the sum of exp(z - max z), and weighted (T,) or NULL, that of (z - max z) exp(z - max z),
// both 0 in that case; target_u (T,), u at the target, 0 for a target outside 0..num_columns - 1,
// which is another process's. Rows with `ignored`: zeros.
FASTALIGN_BOTH(head_tile_statistics, const float* x, int64_t num_rows, int64_t num_columns,
               int64_t row_stride, float softcap, float logit_scale, const float* temperature,
               const int64_t* targets, const uint8_t* ignored, float* maximum, float* total,
               float* weighted, float* target_u)

// Then head_tile's gradient of these columns, given the statistics over all columns: maximum of u,
// log_total = log sum exp(z - max z), and entropy (T,), which may be NULL where grad_entropy is.
FASTALIGN_BOTH(head_tile_gradient, float* x, int64_t num_rows, int64_t num_columns,
               int64_t row_stride, float softcap, float logit_scale, const float* temperature,
               const int64_t* targets, const uint8_t* ignored, const float* maximum,
               const float* log_total, const float* entropy, void* gradient, int32_t gradient_dtype,
               int64_t gradient_stride, const float* grad_logprob, const float* grad_entropy)

// KL of two softmaxes over logits (T, V) and reference (T, V), each with its own dtype and row
// stride; both are transformed as token_logprob's are. kl (T,): KL(policy || reference), or with
// over_reference KL(reference || policy); at least 0, inf where one side bans a token to which the
// other gives probability. maximum and log_total (T,) of each side are for the backward. ignored
// (T,) or NULL: zeros in all five.
FASTALIGN_BOTH(token_kl_forward, const void* logits, int32_t dtype, int64_t row_stride,
               const void* reference, int32_t reference_dtype, int64_t reference_stride,
               int64_t num_rows, int64_t num_columns, float softcap, int32_t over_reference,
               const float* temperature, const uint8_t* ignored, float* kl, float* maximum,
               float* log_total, float* reference_maximum, float* reference_log_total)

// gradient (T, V) of the policy's logits, contiguous, in their dtype, from grad_kl (T,):
// g p_v (log p_v - log q_v - KL) dz_v / dlogits_v, or with over_reference g (p_v - q_v)
// dz_v / dlogits_v; zero where ignored, NaN where kl is infinite.
FASTALIGN_BOTH(token_kl_backward, const void* logits, int32_t dtype, int64_t row_stride,
               const void* reference, int32_t reference_dtype, int64_t reference_stride,
               int64_t num_rows, int64_t num_columns, float softcap, int32_t over_reference,
               const float* temperature, const uint8_t* ignored, const float* kl,
               const float* maximum, const float* log_total, const float* reference_maximum,
               const float* reference_log_total, const float* grad_kl, void* gradient)

// One pass over a policy's and a reference's tile of products, both (num_rows, num_columns) with
// row_stride, which it may destroy; both become logits as in head_tile. logprob, reference_logprob,
// entropy (the policy's) and kl (as token_kl's), each (T,); zeros for rows with `ignored`.
// `gradient` (T, V) or NULL, float32 (gradient_dtype 0; may be `policy` itself) or bfloat16 (1),
// rows gradient_stride apart. With `kl_gradient` beside it (likewise; may be `reference` itself)
// the two are the derivatives of logprob and of kl by the policy's products, and no grad_* is read;
// without, `gradient` is that of grad_logprob logprob + grad_entropy entropy + grad_kl kl. A kl
// that is infinite has NaN gradients, unless its grad_kl is 0.
FASTALIGN_BOTH(kl_tile, float* policy, float* reference, int64_t num_rows, int64_t num_columns,
               int64_t row_stride, float softcap, float logit_scale, int32_t over_reference,
               const float* temperature, const int64_t* targets, const uint8_t* ignored,
               float* logprob, float* reference_logprob, float* entropy, float* kl, void* gradient,
               void* kl_gradient, int32_t gradient_dtype, int64_t gradient_stride,
               const float* grad_logprob, const float* grad_entropy, const float* grad_kl)

// Layers of a model on a CPU; on a GPU they are the model's own.
//
// RMSNorm of rows x (num_rows, num_columns): output = x scale (weight + offset), with scale
// (num_rows,) = 1 / sqrt(mean x^2 + epsilon), the mean in double.
FASTALIGN_EXPORT int32_t fastalign_rms_norm_forward_cpu(const float* x, const float* weight,
                                                        float offset, float epsilon,
                                                        int64_t num_rows, int64_t num_columns,
                                                        float* output, float* scale,
                                                        int32_t num_threads, int32_t isa);

// grad_x (num_rows, num_columns) and grad_weight (num_columns,) or NULL from gradient, that of
// output; partial (ceil(num_rows / 64), num_columns) is memory to work in where grad_weight is not
// NULL. The sums do not depend on the number of threads.
FASTALIGN_EXPORT int32_t fastalign_rms_norm_backward_cpu(const float* x, const float* weight,
                                                         float offset, const float* scale,
                                                         const float* gradient, int64_t num_rows,
                                                         int64_t num_columns, float* grad_x,
                                                         float* grad_weight, float* partial,
                                                         int32_t num_threads, int32_t isa);

// output = f(gate) up, all of `size` elements of dtype; f is SiLU (activation 0) or GELU by its
// approximation with tanh (1; an unknown one is an unknown dtype). The backward writes the
// gradients of gate and up from that of output.
FASTALIGN_EXPORT int32_t fastalign_gated_activation_forward_cpu(const void* gate, const void* up,
                                                                int32_t dtype, int32_t activation,
                                                                int64_t size, void* output,
                                                                int32_t num_threads, int32_t isa);
FASTALIGN_EXPORT int32_t fastalign_gated_activation_backward_cpu(const void* gate, const void* up,
                                                                 int32_t dtype, int32_t activation,
                                                                 int64_t size, const void* gradient,
                                                                 void* grad_gate, void* grad_up,
                                                                 int32_t num_threads, int32_t isa);

// Rotary embedding of x (num_rows, num_heads, head_dim), float32 or bfloat16, with h = head_dim / 2
// and cos, sin (num_rows, head_dim): output_i = x_i cos_i - x_(i+h) sin_i and
// output_(i+h) = x_(i+h) cos_(i+h) + x_i sin_(i+h) for i < h; with `transposed` the transpose of
// this map, which takes the output's gradient to that of x.
FASTALIGN_EXPORT int32_t fastalign_rotary_cpu(const void* x, int32_t dtype, const float* cos,
                                              const float* sin, int64_t num_rows, int64_t num_heads,
                                              int64_t head_dim, int32_t transposed, void* output,
                                              int32_t output_dtype, int32_t num_threads,
                                              int32_t isa);

// Attention of packed sequences on a CPU, grouped queries: query (N, num_heads, key_size), key
// (N, num_key_heads, key_size), value (N, num_key_heads, value_size), tokens `stride` elements
// apart. segments (S, 4): start, length, prompt_start and prompt_length of prompts (prompt_length
// 0) and of responses, which attend to the tokens of their prompt and causally to their own, of all
// these to the last `window` (0: all). Those of one prompt, the prompt first, are one of the
// num_groups groups, segments group_bounds[g] <= s < group_bounds[g + 1], which share no token.
// output (N, num_heads, value_size) = softmax(scale query key^T) value.
FASTALIGN_EXPORT int32_t fastalign_attention_forward_cpu(
    const float* query, const float* key, const float* value, int64_t query_stride,
    int64_t key_stride, int64_t value_stride, int64_t num_heads, int64_t num_key_heads,
    int64_t key_size, int64_t value_size, const int64_t* segments, const int64_t* group_bounds,
    int64_t num_groups, float scale, int64_t window, float* output, int32_t num_threads,
    int32_t isa);

// The gradients of query, key and value, contiguous, from that of output. No sum depends on the
// number of threads.
FASTALIGN_EXPORT int32_t fastalign_attention_backward_cpu(
    const float* query, const float* key, const float* value, int64_t query_stride,
    int64_t key_stride, int64_t value_stride, int64_t num_heads, int64_t num_key_heads,
    int64_t key_size, int64_t value_size, const int64_t* segments, const int64_t* group_bounds,
    int64_t num_groups, float scale, int64_t window, const float* grad_output, float* grad_query,
    float* grad_key, float* grad_value, int32_t num_threads, int32_t isa);

#ifdef __cplusplus
}
#endif
