// gae on a CPU: a loop backwards over each response's tokens, in double.
#include "../abi.h"
#include "packed.h"

int32_t fastalign_gae_cpu(const float* reward, const float* value, const int64_t* bounds,
                          int64_t num_responses, const float* bootstrap_value, double gamma,
                          double gae_lambda, float* advantage, float* returns, int32_t num_threads,
                          int32_t isa) {
    const double decay = gamma * gae_lambda;
    return fastalign::for_each_response(
        bounds, num_responses, num_threads, isa, [=](int64_t response, int64_t begin, int64_t end) {
            double carried = 0, next_value = bootstrap_value ? bootstrap_value[response] : 0;
            for (int64_t t = end - 1; t >= begin; --t) {
                const double here = value[t];
                carried = reward[t] + gamma * next_value - here + decay * carried;
                advantage[t] = static_cast<float>(carried);
                returns[t] = static_cast<float>(carried + here);
                next_value = here;
            }
        });
}
