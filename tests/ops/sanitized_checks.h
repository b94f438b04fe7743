// The checks of the sanitized driver: each calls entry points on every shape, with `Array`s.
#pragma once

#include <cstdint>

struct Setting {
    int32_t num_threads, isa;
};

// Passes over rows of logits.
void check_token_logprob(Setting setting);
void check_product(Setting setting);
void check_head_tile(Setting setting);
void check_head_tile_split(Setting setting);
void check_token_kl(Setting setting);
void check_kl_tile(Setting setting);

// Passes over packed sequences.
void check_kl_penalty(Setting setting);
void check_gae(Setting setting);
void check_preference_loss(Setting setting);

// Layers of a model.
void check_attention(Setting setting);
void check_rms_norm(Setting setting);
void check_gated_activation(Setting setting);
void check_rotary(Setting setting);

// One array an element too short: must be stopped.
void gae_too_short();
