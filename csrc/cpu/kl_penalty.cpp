// kl_penalty on a CPU: a plain loop over each response's tokens, in double.
#include <cmath>

#include "../abi.h"
#include "packed.h"

namespace {

constexpr double LOWEST_LOG_RATIO = -20;

// Comparisons keep a NaN.
double estimate(double x, int32_t estimator, double max_k3) {
    if (estimator == 0) return x;
    if (estimator == 1) return x * x / 2;
    if (x < LOWEST_LOG_RATIO) x = LOWEST_LOG_RATIO;
    const double k3 = std::expm1(-x) + x;
    return k3 > max_k3 ? max_k3 : k3;
}

double slope(double x, int32_t estimator, double max_k3) {
    if (estimator == 0) return 1;
    if (estimator == 1) return x;
    const double e = std::expm1(-x);
    return x < LOWEST_LOG_RATIO || e + x > max_k3 ? 0 : -e;
}

}  // namespace

int32_t fastalign_kl_penalty_forward_cpu(const float* logprob, const float* reference_logprob,
                                         const int64_t* bounds, int64_t num_responses,
                                         const float* score, float coefficient,
                                         const float* adaptive_coefficient, const uint8_t* mask,
                                         int32_t estimator, float max_k3, float* reward, float* kl,
                                         float* sequence_kl, int32_t num_threads, int32_t isa) {
    if (estimator < 0 || estimator > 2) return 2;
    const double weight = adaptive_coefficient ? *adaptive_coefficient : coefficient;
    return fastalign::for_each_response(
        bounds, num_responses, num_threads, isa, [=](int64_t response, int64_t begin, int64_t end) {
            double total = 0;
            int64_t last = -1;
            for (int64_t t = begin; t < end; ++t) {
                kl[t] = reward[t] = 0;
                if (mask && !mask[t]) continue;
                const double x = static_cast<double>(logprob[t]) - reference_logprob[t];
                const double found = estimate(x, estimator, max_k3);
                kl[t] = static_cast<float>(found);
                reward[t] = static_cast<float>(-weight * found);
                total += found;
                last = t;
            }
            sequence_kl[response] = static_cast<float>(total);
            if (!score) return;
            if (last >= 0) {
                reward[last] += score[response];
            } else {
                sequence_kl[response] = NAN;
            }
        });
}

int32_t fastalign_kl_penalty_backward_cpu(const float* grad_kl, const float* grad_sequence_kl,
                                          const float* logprob, const float* reference_logprob,
                                          const int64_t* bounds, int64_t num_responses,
                                          const uint8_t* mask, int32_t estimator, float max_k3,
                                          float* gradient, int32_t num_threads, int32_t isa) {
    if (estimator < 0 || estimator > 2) return 2;
    return fastalign::for_each_response(
        bounds, num_responses, num_threads, isa, [=](int64_t response, int64_t begin, int64_t end) {
            const double of_sequence = grad_sequence_kl ? grad_sequence_kl[response] : 0;
            for (int64_t t = begin; t < end; ++t) {
                gradient[t] = 0;
                if (mask && !mask[t]) continue;
                const double upstream = of_sequence + (grad_kl ? grad_kl[t] : 0);
                const double x = static_cast<double>(logprob[t]) - reference_logprob[t];
                gradient[t] = static_cast<float>(upstream * slope(x, estimator, max_k3));
            }
        });
}
