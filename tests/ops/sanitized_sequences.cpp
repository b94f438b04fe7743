// The entry points that read packed sequences, under the sanitizers.
#include <vector>

#include "abi.h"
#include "sanitized_array.h"
#include "sanitized_checks.h"

namespace {

// Packed responses; the last have enough tokens for threads.
const std::vector<std::vector<int64_t>> LENGTHS = {
    {}, {0}, {1}, {0, 3, 0, 17, 1}, {40'000, 1, 0, 60'000, 70'001}};

Array<int64_t> bounds_of(const std::vector<int64_t>& lengths) {
    Array<int64_t> bounds(static_cast<int64_t>(lengths.size()) + 1);
    bounds[0] = 0;
    for (size_t r = 0; r < lengths.size(); ++r) bounds[r + 1] = bounds[r] + lengths[r];
    return bounds;
}

void kl_penalty(const std::vector<int64_t>& lengths, int32_t estimator, bool options,
                Setting setting) {
    auto bounds = bounds_of(lengths);
    const int64_t num_responses = lengths.size(), num_tokens = bounds[num_responses];
    auto logprob = numbers(num_tokens), reference = numbers(num_tokens),
         score = numbers(num_responses), adaptive = numbers(1), grad_kl = numbers(num_tokens),
         grad_sequence_kl = numbers(num_responses);
    Array<uint8_t> mask(num_tokens);
    for (int64_t i = 0; i < num_tokens; ++i) mask[i] = i % 3 != 1;
    const uint8_t* masked = options ? mask.get() : nullptr;
    Array<float> reward(num_tokens), kl(num_tokens), sequence_kl(num_responses);
    require(fastalign_kl_penalty_forward_cpu(logprob.get(), reference.get(), bounds.get(),
                                             num_responses, options ? score.get() : nullptr, 0.1f,
                                             options ? adaptive.get() : nullptr, masked, estimator,
                                             10.0f, reward.get(), kl.get(), sequence_kl.get(),
                                             setting.num_threads, setting.isa) == 0,
            "kl_penalty_forward");
    reward.check_finite();
    kl.check_finite();
    sequence_kl.check_written();  // an empty response with a score: NaN
    Array<float> gradient(num_tokens);
    require(fastalign_kl_penalty_backward_cpu(
                options ? grad_kl.get() : nullptr, options ? nullptr : grad_sequence_kl.get(),
                logprob.get(), reference.get(), bounds.get(), num_responses, masked, estimator,
                10.0f, gradient.get(), setting.num_threads, setting.isa) == 0,
            "kl_penalty_backward");
    gradient.check_finite();
}

}  // namespace

void check_kl_penalty(Setting setting) {
    for (const auto& lengths : LENGTHS) {
        for (int32_t estimator = 0; estimator < 3; ++estimator) {
            for (const bool options : {false, true})
                kl_penalty(lengths, estimator, options, setting);
        }
    }
}

namespace {

void gae(const std::vector<int64_t>& lengths, int64_t missing, bool with_bootstrap,
         Setting setting) {
    auto bounds = bounds_of(lengths);
    const int64_t num_responses = lengths.size(), num_tokens = bounds[num_responses];
    auto reward = numbers(num_tokens), value = numbers(num_tokens),
         bootstrap_value = numbers(num_responses);
    Array<float> advantage(num_tokens - missing), returns(num_tokens);
    require(
        fastalign_gae_cpu(reward.get(), value.get(), bounds.get(), num_responses,
                          with_bootstrap ? bootstrap_value.get() : nullptr, 0.99, 0.95,
                          advantage.get(), returns.get(), setting.num_threads, setting.isa) == 0,
        "gae");
    advantage.check_finite();
    returns.check_finite();
}

}  // namespace

void check_gae(Setting setting) {
    for (const auto& lengths : LENGTHS) {
        for (const bool with_bootstrap : {false, true}) gae(lengths, 0, with_bootstrap, setting);
    }
}

namespace {

// Chosen, rejected, chosen, ...
const std::vector<std::vector<int64_t>> PAIR_LENGTHS = {
    {}, {0, 0}, {1, 0}, {3, 17, 0, 1}, {70'000, 1, 0, 60'001}};

void preference_loss(const std::vector<int64_t>& lengths, int32_t link, bool options,
                     Setting setting) {
    auto bounds = bounds_of(lengths);
    const int64_t num_sequences = lengths.size(), num_pairs = num_sequences / 2;
    auto logprob = numbers(bounds[num_sequences]), reference = numbers(num_sequences),
         grad_losses = numbers(num_pairs), grad_sequence_logprob = numbers(num_sequences);
    Array<int64_t> length(num_sequences);
    for (int64_t i = 0; i < num_sequences; ++i) length[i] = lengths[i];
    Array<uint8_t> tie(num_pairs);
    for (int64_t i = 0; i < num_pairs; ++i) tie[i] = i % 2;
    Array<float> losses(num_pairs), sequence_logprob(num_sequences), coefficient(num_sequences);
    require(fastalign_preference_loss_forward_cpu(
                logprob.get(), bounds.get(), options ? reference.get() : nullptr,
                options ? length.get() : nullptr, options ? tie.get() : nullptr, num_pairs, link,
                options, 0.1f, 0.01f, 0.5f, 0.9f, 0.1f, 0.7f, losses.get(), sequence_logprob.get(),
                coefficient.get(), setting.num_threads, setting.isa) == 0,
            "preference_loss_forward");
    for (auto* array : {&losses, &sequence_logprob, &coefficient}) array->check_written();
    Array<float> gradient(bounds[num_sequences]);
    require(
        fastalign_preference_loss_backward_cpu(
            grad_losses.get(), options ? grad_sequence_logprob.get() : nullptr, coefficient.get(),
            bounds.get(), num_pairs, gradient.get(), setting.num_threads, setting.isa) == 0,
        "preference_loss_backward");
    gradient.check_written();
}

}  // namespace

void check_preference_loss(Setting setting) {
    for (const auto& lengths : PAIR_LENGTHS) {
        for (int32_t link = 0; link < 5; ++link) {
            for (const bool options : {false, true})
                preference_loss(lengths, link, options, setting);
        }
    }
}

void gae_too_short() { gae({0, 5}, 1, false, {1, -1}); }
