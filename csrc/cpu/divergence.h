// A row of a policy's logits z beside a reference's r, for one instruction set: what token_kl and
// kl_tile share.
#pragma once

#include <cmath>
#include <limits>

#include "vector_loops.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// z - max z and r - max r, none below LOWEST, which stands for a banned token.
struct Shifted {
    Float policy, reference;
};

inline Float bounded(Float x) { return x < LOWEST ? splat(LOWEST) : x; }

struct Divergence {
    double policy_total, reference_total;  // sums of exponentials of what is shifted
    double entropy;                        // of the policy
    double mean;  // of the difference of what is shifted, over the policy or the reference
    double kl;

    bool infinite() const { return std::isinf(kl); }
};

// KL(policy || reference), or KL(reference || policy); `read(column, count)` gives what is shifted.
// A difference above -LOWEST / 2 comes from a token with probability that the other side bans.
template <bool OVER_REFERENCE, typename Read>
Divergence read_divergence(int64_t num_columns, const Read& read) {
    double policy_total = 0, reference_total = 0, weighted = 0, cross = 0;
    Float largest = splat(LOWEST);
    for (int64_t start = 0; start < num_columns; start += BLOCK) {
        const int64_t stop = start + BLOCK < num_columns ? start + BLOCK : num_columns;
        Float policy_sum = splat(0), reference_sum = splat(0), weighted_sum = splat(0),
              cross_sum = splat(0);
        visit_vectors(start, stop, [&](int64_t column, auto count) {
            Shifted at = read(column, count);
            for (int64_t i = count; i < WIDTH; ++i) at.policy[i] = at.reference[i] = LOWEST;
            const Float p = exp(at.policy), q = exp(at.reference);
            const Float difference =
                OVER_REFERENCE ? at.reference - at.policy : at.policy - at.reference;
            policy_sum += p;
            reference_sum += q;
            weighted_sum += p * at.policy;
            cross_sum += (OVER_REFERENCE ? q : p) * difference;
            largest = difference > largest ? difference : largest;
        });
        policy_total += sum(policy_sum);
        reference_total += sum(reference_sum);
        weighted += sum(weighted_sum);
        cross += sum(cross_sum);
    }
    bool banned = false;
    for (int i = 0; i < WIDTH; ++i) banned = banned || largest[i] > -0.5f * LOWEST;
    const double own = OVER_REFERENCE ? reference_total : policy_total;
    const double other = OVER_REFERENCE ? policy_total : reference_total;
    const double mean = cross / own, kl = mean - std::log(own / other);
    Divergence found{policy_total, reference_total,
                     std::log(policy_total) - weighted / policy_total, mean, kl};
    // rounding may leave it, and the entropy of a certain row, slightly below zero
    if (found.kl < 0) found.kl = 0;
    if (found.entropy < 0) found.entropy = 0;
    if (banned) found.kl = std::numeric_limits<double>::infinity();
    return found;
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
