// token_kl on CUDA: a block a row; one read of both sides forward, one read and one write backward.
#include "../abi.h"
#include "divergence.cuh"
#include "launch.cuh"
#include "pair_pieces.cuh"
#include "row_gradient.cuh"

namespace {

using fastalign::bounded;
using fastalign::RowTransform;
using fastalign::shifted;

constexpr int THREADS = 256;

struct KLRows {
    const void *logits, *reference;
    int32_t dtype, reference_dtype;
    int64_t num_rows, num_columns, row_stride, reference_stride;
    float softcap;
    bool over_reference;
    const float* temperature;
    const uint8_t* ignored;

    __device__ RowTransform transform(int64_t index) const {
        return fastalign::row_transform(softcap, 1.0f, temperature, index);
    }
};

struct Found {
    float *kl, *maximum, *log_total, *reference_maximum, *reference_log_total;
};

struct Saved {
    const float *kl, *maximum, *log_total, *reference_maximum, *reference_log_total, *grad_kl;
    void* gradient;
};

template <typename P, typename Q>
__device__ void rows_of(const KLRows& rows, int64_t index, const P** policy, const Q** reference) {
    *policy = static_cast<const P*>(rows.logits) + index * rows.row_stride;
    *reference = static_cast<const Q*>(rows.reference) + index * rows.reference_stride;
}

template <typename P, typename Q, bool OVER_REFERENCE>
__global__ void __launch_bounds__(THREADS) forward_kernel(KLRows rows, Found found) {
    const int64_t index = blockIdx.x;
    const P* policy;
    const Q* reference;
    rows_of(rows, index, &policy, &reference);
    const RowTransform transform = rows.transform(index);
    auto mine = fastalign::Divergence<OVER_REFERENCE>::empty();
    fastalign::for_each_pair_piece<THREADS>(
        policy, reference, rows.num_columns, [&](int64_t column, auto columns) {
            constexpr int COUNT = decltype(columns)::count;
            float x[COUNT], y[COUNT];
            fastalign::load_columns<COUNT>(policy + column, x);
            fastalign::load_columns<COUNT>(reference + column, y);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                mine.add(transform.u(x[i]), transform.u(y[i]), transform.gain);
        });
    const auto all = fastalign::reduce_block<THREADS>(mine, transform.gain);
    if (threadIdx.x != 0) return;
    const bool ignored = rows.ignored && rows.ignored[index];
    found.kl[index] = ignored ? 0.0f : all.kl();
    found.maximum[index] = all.maximum;
    found.log_total[index] = logf(all.total);
    found.reference_maximum[index] = all.reference_maximum;
    found.reference_log_total[index] = logf(all.reference_total);
}

template <typename P, typename Q, bool OVER_REFERENCE>
__global__ void __launch_bounds__(THREADS) backward_kernel(KLRows rows, Saved saved) {
    const int64_t index = blockIdx.x;
    const P* policy;
    const Q* reference;
    rows_of(rows, index, &policy, &reference);
    P* gradient = static_cast<P*>(saved.gradient) + index * rows.num_columns;
    const RowTransform transform = rows.transform(index);
    const bool ignored = rows.ignored && rows.ignored[index];
    const float kl = saved.kl[index];
    const float maximum = saved.maximum[index], log_total = saved.log_total[index];
    const float reference_maximum = saved.reference_maximum[index];
    const float reference_log_total = saved.reference_log_total[index];
    const float coefficient = (isinf(kl) ? CUDART_NAN_F : saved.grad_kl[index]) * transform.slope;
    fastalign::for_each_pair_piece<THREADS>(
        policy, reference, rows.num_columns, [&](int64_t column, auto columns) {
            constexpr int COUNT = decltype(columns)::count;
            float x[COUNT], y[COUNT];
            fastalign::load_columns<COUNT>(policy + column, x);
            fastalign::load_columns<COUNT>(reference + column, y);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const float u = transform.u(x[i]);
                const float v = transform.u(y[i]);
                const float log_p = shifted(u, maximum, transform.gain) - log_total;
                const float log_q =
                    shifted(v, reference_maximum, transform.gain) - reference_log_total;
                const float p = expf(log_p);
                float result =
                    OVER_REFERENCE ? p - expf(log_q) : p * ((bounded(log_p) - bounded(log_q)) - kl);
                if (transform.softcap) result *= 1.0f - u * u;
                x[i] = ignored ? 0.0f : result * coefficient;
            }
            fastalign::store_columns<COUNT>(gradient + column, x);
        });
}

template <typename P, typename Q>
void launch(const KLRows& rows, const Found& found, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(rows.num_rows);
    if (rows.over_reference) {
        forward_kernel<P, Q, true><<<blocks, THREADS, 0, stream>>>(rows, found);
    } else {
        forward_kernel<P, Q, false><<<blocks, THREADS, 0, stream>>>(rows, found);
    }
}

template <typename P, typename Q>
void launch(const KLRows& rows, const Saved& saved, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(rows.num_rows);
    if (rows.over_reference) {
        backward_kernel<P, Q, true><<<blocks, THREADS, 0, stream>>>(rows, saved);
    } else {
        backward_kernel<P, Q, false><<<blocks, THREADS, 0, stream>>>(rows, saved);
    }
}

template <typename P, typename Places>
int32_t launch_for(const KLRows& rows, const Places& places, cudaStream_t stream) {
    switch (rows.reference_dtype) {
        case 0:
            launch<P, float>(rows, places, stream);
            break;
        case 1:
            launch<P, __nv_bfloat16>(rows, places, stream);
            break;
        case 2:
            launch<P, __half>(rows, places, stream);
            break;
        default:
            return 2;
    }
    return fastalign::launched();
}

template <typename Places>
int32_t run(const KLRows& rows, const Places& places, void* stream) {
    if (rows.num_rows == 0) return 0;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (rows.dtype == 0) return launch_for<float>(rows, places, queue);
    if (rows.dtype == 1) return launch_for<__nv_bfloat16>(rows, places, queue);
    if (rows.dtype == 2) return launch_for<__half>(rows, places, queue);
    return 2;
}

}  // namespace

int32_t fastalign_token_kl_forward_cuda(const void* logits, int32_t dtype, int64_t row_stride,
                                        const void* reference, int32_t reference_dtype,
                                        int64_t reference_stride, int64_t num_rows,
                                        int64_t num_columns, float softcap, int32_t over_reference,
                                        const float* temperature, const uint8_t* ignored, float* kl,
                                        float* maximum, float* log_total, float* reference_maximum,
                                        float* reference_log_total, void* stream) {
    const KLRows rows = {logits,   reference,           dtype,       reference_dtype,
                         num_rows, num_columns,         row_stride,  reference_stride,
                         softcap,  over_reference != 0, temperature, ignored};
    return run(rows, Found{kl, maximum, log_total, reference_maximum, reference_log_total}, stream);
}

int32_t fastalign_token_kl_backward_cuda(
    const void* logits, int32_t dtype, int64_t row_stride, const void* reference,
    int32_t reference_dtype, int64_t reference_stride, int64_t num_rows, int64_t num_columns,
    float softcap, int32_t over_reference, const float* temperature, const uint8_t* ignored,
    const float* kl, const float* maximum, const float* log_total, const float* reference_maximum,
    const float* reference_log_total, const float* grad_kl, void* gradient, void* stream) {
    const KLRows rows = {logits,   reference,           dtype,       reference_dtype,
                         num_rows, num_columns,         row_stride,  reference_stride,
                         softcap,  over_reference != 0, temperature, ignored};
    return run(
        rows,
        Saved{kl, maximum, log_total, reference_maximum, reference_log_total, grad_kl, gradient},
        stream);
}
