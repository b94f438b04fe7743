// Calls every entry point of the CPU library on odd shapes, under the sanitizers: arrays have
// exactly the size that csrc/abi.h says.
//
// To add an entry point: write a function that calls it with `Array`s, and name it in CHECKS.
// `sanitized_driver short` gives one array an element too few, and must be stopped.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "abi.h"
#include "sanitized_array.h"

namespace {

struct Setting {
    int32_t num_threads, isa;
};

struct Shape {
    int64_t num_rows, num_columns, gap;
    int64_t row_stride() const { return num_columns + gap; }
    // The last row has no gap behind it.
    int64_t size() const { return num_rows ? num_rows * row_stride() - gap : 0; }
};
// No row, one column, vectors with a rest, more than one of BLOCK, and enough for threads.
const Shape SHAPES[] = {{0, 5, 0},  {1, 1, 0},   {3, 1, 2},    {5, 17, 0},
                        {4, 63, 3}, {2, 130, 0}, {2, 4099, 1}, {67, 3001, 1}};

// What rows come with; the second is ignored.
struct Rows {
    Array<int64_t> targets;
    Array<float> temperature, grad_logprob, grad_entropy, logprob, entropy;

    explicit Rows(const Shape& shape)
        : targets(shape.num_rows),
          temperature(shape.num_rows),
          grad_logprob(numbers(shape.num_rows)),
          grad_entropy(numbers(shape.num_rows)),
          logprob(shape.num_rows),
          entropy(shape.num_rows) {
        for (int64_t i = 0; i < shape.num_rows; ++i) {
            targets[i] = i == 1 ? -100 : (shape.num_columns - 1 + 7 * i) % shape.num_columns;
            temperature[i] = 0.5f + 0.25f * (i % 5);
        }
    }
};

template <typename T>
void token_logprob(const Shape& shape, int32_t dtype, bool options, Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns;
    auto logits = numbers<T>(shape.size(), dtype, num_columns, shape.row_stride());
    Rows rows(shape);
    Array<float> logsumexp(num_rows);
    const float* temperature = options ? rows.temperature.get() : nullptr;
    const float softcap = options ? 3.0f : 0.0f;
    require(fastalign_token_logprob_forward_cpu(
                logits.get(), dtype, num_rows, num_columns, shape.row_stride(), softcap, -100,
                rows.targets.get(), temperature, rows.logprob.get(), rows.entropy.get(),
                logsumexp.get(), setting.num_threads, setting.isa) == 0,
            "token_logprob_forward");
    for (auto* array : {&rows.logprob, &rows.entropy, &logsumexp}) array->check_finite();
    Array<T> gradient(num_rows * num_columns);
    require(fastalign_token_logprob_backward_cpu(
                logits.get(), dtype, num_rows, num_columns, shape.row_stride(), softcap, -100,
                rows.targets.get(), temperature, logsumexp.get(), rows.entropy.get(),
                rows.grad_logprob.get(), options ? rows.grad_entropy.get() : nullptr,
                gradient.get(), setting.num_threads, setting.isa) == 0,
            "token_logprob_backward");
    gradient.check_written();
}

void check_token_logprob(Setting setting) {
    for (const Shape& shape : SHAPES) {
        for (const bool options : {false, true}) {
            token_logprob<float>(shape, 0, options, setting);
            token_logprob<uint16_t>(shape, 1, options, setting);
            token_logprob<uint16_t>(shape, 2, options, setting);
        }
    }
}

template <typename T>
void head_tile(const Shape& shape, bool with_entropy, bool softcap, bool in_place,
               Setting setting) {
    const int64_t num_rows = shape.num_rows, num_columns = shape.num_columns,
                  x_stride = shape.row_stride();
    auto x = numbers(shape.size(), 0, num_columns, x_stride);
    Rows rows(shape);
    Array<uint8_t> ignored(num_rows), is_argmax(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) {
        ignored[i] = rows.targets[i] < 0;
        if (ignored[i]) rows.targets[i] = 0;
    }
    const Shape apart = {num_rows, num_columns, 3};
    Array<T> gradient(apart.size());
    void* place = in_place ? static_cast<void*>(x.get()) : gradient.get();
    require(fastalign_head_tile_cpu(x.get(), num_rows, num_columns, x_stride, softcap ? 3.0f : 0.0f,
                                    0.5f, softcap ? rows.temperature.get() : nullptr,
                                    rows.targets.get(), ignored.get(), rows.logprob.get(),
                                    with_entropy ? rows.entropy.get() : nullptr, is_argmax.get(),
                                    place, sizeof(T) == 2, in_place ? x_stride : apart.row_stride(),
                                    softcap ? rows.grad_logprob.get() : nullptr,
                                    with_entropy ? rows.grad_entropy.get() : nullptr,
                                    setting.num_threads, setting.isa) == 0,
            "head_tile");
    rows.logprob.check_finite();
    if (with_entropy) rows.entropy.check_finite();
    is_argmax.check_written();
    x.check_written(num_columns, x_stride);
    if (!in_place) gradient.check_written(num_columns, apart.row_stride());
}

void check_head_tile(Setting setting) {
    for (const Shape& shape : SHAPES) {
        for (const bool with_entropy : {false, true}) {
            for (const bool softcap : {false, true}) {
                head_tile<float>(shape, with_entropy, softcap, true, setting);
                head_tile<float>(shape, with_entropy, softcap, false, setting);
                head_tile<uint16_t>(shape, with_entropy, softcap, false, setting);
            }
        }
    }
}

// Each operand straight and transposed, c overwritten and added to, its rows 3 apart.
void check_product(Setting setting) {
    if (!fastalign_product_bf16_usable_cpu() || setting.isa == 0 || setting.isa == 1) return;
    // num_rows, num_columns, depth
    const int64_t sizes[][3] = {{0, 3, 5},   {1, 1, 1},     {5, 17, 31},   {33, 2, 70},
                                {70, 65, 1}, {200, 97, 33}, {31, 300, 129}};
    for (const auto& [num_rows, num_columns, depth] : sizes) {
        const Shape shape = {num_rows, num_columns, 3};
        for (int flags = 0; flags < 8; ++flags) {
            const bool a_turned = flags & 1, b_turned = flags & 2, add = flags & 4;
            auto a = numbers<uint16_t>(num_rows * depth, 1);
            auto b = numbers<uint16_t>(depth * num_columns, 1);
            Array<float> c(shape.size());
            if (add) c = numbers(shape.size(), 0, num_columns, shape.row_stride());
            require(fastalign_product_bf16_cpu(a.get(), a_turned ? 1 : depth,
                                               a_turned ? num_rows : 1, b.get(),
                                               b_turned ? 1 : num_columns, b_turned ? depth : 1,
                                               c.get(), shape.row_stride(), num_rows, num_columns,
                                               depth, add, setting.num_threads, setting.isa) == 0,
                    "product_bf16");
            c.check_written(num_columns, shape.row_stride());
        }
    }
}

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
                                             reward.get(), kl.get(), sequence_kl.get(),
                                             setting.num_threads, setting.isa) == 0,
            "kl_penalty_forward");
    reward.check_finite();
    kl.check_finite();
    sequence_kl.check_written();  // an empty response with a score: NaN
    Array<float> gradient(num_tokens);
    require(fastalign_kl_penalty_backward_cpu(
                options ? grad_kl.get() : nullptr, options ? nullptr : grad_sequence_kl.get(),
                logprob.get(), reference.get(), bounds.get(), num_responses, masked, estimator,
                gradient.get(), setting.num_threads, setting.isa) == 0,
            "kl_penalty_backward");
    gradient.check_finite();
}

void check_kl_penalty(Setting setting) {
    for (const auto& lengths : LENGTHS) {
        for (int32_t estimator = 0; estimator < 3; ++estimator) {
            for (const bool options : {false, true})
                kl_penalty(lengths, estimator, options, setting);
        }
    }
}

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

void check_gae(Setting setting) {
    for (const auto& lengths : LENGTHS) {
        for (const bool with_bootstrap : {false, true}) gae(lengths, 0, with_bootstrap, setting);
    }
}

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

void check_preference_loss(Setting setting) {
    for (const auto& lengths : PAIR_LENGTHS) {
        for (int32_t link = 0; link < 5; ++link) {
            for (const bool options : {false, true})
                preference_loss(lengths, link, options, setting);
        }
    }
}

struct Check {
    const char* name;
    void (*run)(Setting);
};
const Check CHECKS[] = {
    {"token_logprob", check_token_logprob},
    {"product_bf16", check_product},
    {"head_tile", check_head_tile},
    {"kl_penalty", check_kl_penalty},
    {"gae", check_gae},
    {"preference_loss", check_preference_loss},
};

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && std::string(arguments[1]) == "short") {
        gae({0, 5}, 1, false, {1, -1});
        return 0;
    }
    require(fastalign_abi_version() == FASTALIGN_ABI_VERSION, "abi_version");
    for (const Check& check : CHECKS) {
        for (int32_t isa = -1; isa < 3; ++isa) {
            if (isa >= 0 && !fastalign_cpu_isa_usable(isa)) continue;
            for (const bool starts : {false, true}) {
                guard_starts = starts;
                for (const int32_t num_threads : {1, 3}) check.run({num_threads, isa});
            }
        }
        std::printf("%s: sound\n", check.name);
    }
    return 0;
}
