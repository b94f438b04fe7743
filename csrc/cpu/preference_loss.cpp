// preference_loss on a CPU: one pair at a time, with the pairs divided among threads. It is bound
// by memory, so one build serves every instruction set.
#include "../abi.h"
#include "../preference_pair.h"
#include "parallel.h"

namespace {

// Eight partial sums: an addition does not wait for the one before, which a single sum would.
double sum(const float* values, int64_t count) {
    constexpr int LANES = 8;
    double lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += values[i + lane];
    double total = 0;
    for (; i < count; ++i) total += values[i];
    for (double lane : lanes) total += lane;
    return total;
}

int32_t usable(int32_t isa) { return isa == -1 || fastalign::isa_usable(isa); }

template <typename Function>
void for_each_pair(const int64_t* bounds, int64_t num_pairs, int32_t num_threads,
                   const Function& function) {
    const int64_t num_rows = bounds[2 * num_pairs] - bounds[0];
    fastalign::for_each_span(num_pairs, num_rows / std::max<int64_t>(num_pairs, 1), num_threads,
                             [&](int64_t first, int64_t last) {
                                 for (int64_t pair = first; pair < last; ++pair) function(pair);
                             });
}

}  // namespace

int32_t fastalign_preference_loss_forward_cpu(
    const float* logprob, const int64_t* bounds, const float* reference_logprob,
    const int64_t* length, const uint8_t* tie, int64_t num_pairs, int32_t link, int32_t per_token,
    float beta, float length_weight, float threshold, float right, float wrong, float tie_offset,
    float* losses, float* sequence_logprob, float* coefficient, int32_t num_threads, int32_t isa) {
    if (link < 0 || link >= fastalign::NUM_LINKS) return 2;
    if (!usable(isa)) return 1;
    const fastalign::PreferenceFormula formula = {link,      per_token, beta,  length_weight,
                                                  threshold, right,     wrong, tie_offset};
    for_each_pair(bounds, num_pairs, num_threads, [&](int64_t index) {
        const int64_t* at = bounds + 2 * index;
        const double policy[2] = {sum(logprob + at[0], at[1] - at[0]),
                                  sum(logprob + at[1], at[2] - at[1])};
        const auto pair =
            fastalign::read_pair(index, policy, bounds, reference_logprob, length, tie);
        const auto found = fastalign::pair_loss(formula, pair);
        losses[index] = static_cast<float>(found.loss);
        for (int side = 0; side < 2; ++side) {
            sequence_logprob[2 * index + side] = static_cast<float>(policy[side]);
            coefficient[2 * index + side] = static_cast<float>(found.slope[side]);
        }
    });
    return 0;
}

int32_t fastalign_preference_loss_backward_cpu(const float* grad_losses,
                                               const float* grad_sequence_logprob,
                                               const float* coefficient, const int64_t* bounds,
                                               int64_t num_pairs, float* gradient,
                                               int32_t num_threads, int32_t isa) {
    if (!usable(isa)) return 1;
    for_each_pair(bounds, num_pairs, num_threads, [&](int64_t index) {
        for (int64_t sequence = 2 * index; sequence < 2 * index + 2; ++sequence) {
            float value = grad_losses[index] * coefficient[sequence];
            if (grad_sequence_logprob) value += grad_sequence_logprob[sequence];
            std::fill(gradient + bounds[sequence], gradient + bounds[sequence + 1], value);
        }
    });
    return 0;
}
