// Calls every entry point of the CPU library on odd shapes, under the
// sanitizers: arrays have exactly the size that csrc/abi.h says.
//
// To add an entry point: write a function that calls it with `Array`s beside
// those of its kind, declare its check in sanitized_checks.h, and name it in
// CHECKS. `sanitized_driver short` gives one array an element too few, and must
// be stopped.
#include <cstdio>
#include <string>

#include "abi.h"
#include "sanitized_array.h"
#include "sanitized_checks.h"

struct Check {
    const char* name;
    void (*run)(Setting);
};
const Check CHECKS[] = {
    {"token_logprob", check_token_logprob},
    {"product_bf16", check_product},
    {"head_tile", check_head_tile},
    {"head_tile_split", check_head_tile_split},
    {"token_kl", check_token_kl},
    {"kl_tile", check_kl_tile},
    {"kl_penalty", check_kl_penalty},
    {"gae", check_gae},
    {"preference_loss", check_preference_loss},
    {"attention", check_attention},
    {"rms_norm", check_rms_norm},
    {"gated_activation", check_gated_activation},
    {"rotary", check_rotary},
};

int main(int count, char** arguments) {
    if (count > 1 && std::string(arguments[1]) == "short") {
        gae_too_short();
        return 0;
    }
    require(fastalign_abi_version() == FASTALIGN_ABI_VERSION, "abi_version");
    for (const Check& check : CHECKS) {
        for (int32_t isa = -1; isa < 3; ++isa) {
            if (isa >= 0 && !fastalign_cpu_isa_usable(isa)) continue;
            for (const bool starts : {false, true}) {
                if (isa < 0 && starts) continue;  // -1 chooses one of the others
                guard_starts = starts;
                for (const int32_t num_threads : {1, 3}) check.run({num_threads, isa});
            }
        }
        std::printf("%s: sound\n", check.name);
    }
    return 0;
}
