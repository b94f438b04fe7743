// One preference pair: its loss and the derivatives by the log-probs of its two responses. Both
// libraries compute it here, in double, once a pair. fastalign/losses/preference.py defines the
// losses; PairLink of fastalign/ops/preference_loss/formula.py explains the numbers.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FASTALIGN_SHARED __host__ __device__ inline
#else
#define FASTALIGN_SHARED inline
#endif

namespace fastalign {

enum PreferenceLink : int32_t { LOGISTIC, HINGE, SQUARE, DAVIDSON, ORPO, NUM_LINKS };

struct PreferenceFormula {
    int32_t link, per_token;
    float beta, length_weight, threshold, right, wrong, tie_offset;
};

// Chosen first, then rejected.
struct PreferencePair {
    double policy[2], reference[2], length[2];
    bool tie;
};

struct PairLoss {
    double loss, slope[2];
};

// Comparisons keep a NaN, and never subtract an infinity from another.
FASTALIGN_SHARED double softplus(double x) { return (x < 0 ? 0 : x) + log1p(exp(-fabs(x))); }

FASTALIGN_SHARED double sigmoid(double x) {
    const double e = exp(-fabs(x));
    return (x < 0 ? e : 1) / (1 + e);
}

// The loss of a margin x, and its derivative.
FASTALIGN_SHARED double link_loss(const PreferenceFormula& f, double x, bool tie, double* slope) {
    const double offset = tie ? f.tie_offset : 0;
    if (f.link == HINGE) {
        *slope = x >= 1 ? 0 : -1;
        return x >= 1 ? 0 : 1 - x;
    }
    if (f.link == SQUARE) {
        const double distance = x - f.threshold;
        *slope = 2 * distance;
        return distance * distance;
    }
    if (f.link == DAVIDSON) {
        // With q = e^-|x|/2 the denominator, divided by its largest term, is 1 + q^2 + 2 nu q.
        const double q = exp(-fabs(x) / 2), tied = exp(double(f.tie_offset)) * q;
        const double sum = q * q + tied, win = (x < 0 ? q * q : 1) / (1 + sum),
                     loss = (x < 0 ? 1 : q * q) / (1 + sum);
        *slope = tie ? (win - loss) / 2 : -loss - tied / (1 + sum) / 2;
        return log1p(sum) + (tie ? fabs(x) / 2 : x < 0 ? -x : 0) - offset;
    }
    const double right = tie ? 1 : f.right, wrong = tie ? 1 : f.wrong;
    double loss = right * softplus(f.threshold - x) - offset;
    *slope = -right * sigmoid(f.threshold - x);
    if (wrong != 0) {  // 0 * inf is NaN
        loss += wrong * softplus(f.threshold + x);
        *slope += wrong * sigmoid(f.threshold + x);
    }
    return loss;
}

// log(p / (1 - p)) from log p, and its derivative 1 / (1 - p), 0 where log p is too near 0: the
// definition's bound in float32.
FASTALIGN_SHARED double log_odds(double logprob, double* slope) {
    const bool certain = logprob > -FLT_EPSILON;
    const double bounded = certain ? -FLT_EPSILON : logprob, less = -expm1(bounded);
    *slope = certain ? 0 : 1 / less;
    return bounded - log(less);
}

FASTALIGN_SHARED PairLoss pair_loss(const PreferenceFormula& f, const PreferencePair& pair) {
    double weight[2], ratio[2], by_margin;
    for (int side = 0; side < 2; ++side) {
        weight[side] = f.per_token ? 1 / fmax(pair.length[side], 1.0) : 1;
        ratio[side] = weight[side] * (pair.policy[side] - pair.reference[side]);
    }
    if (f.link == ORPO) {
        double slope[2];
        const double chosen = log_odds(ratio[0], slope), rejected = log_odds(ratio[1], slope + 1);
        const double pull = f.beta * sigmoid(rejected - chosen);
        return {f.beta * softplus(rejected - chosen) - ratio[0],
                {weight[0] * (-1 - pull * slope[0]), weight[1] * pull * slope[1]}};
    }
    const double x =
        f.beta * (ratio[0] - ratio[1]) + f.length_weight * (pair.length[0] - pair.length[1]);
    const double loss = link_loss(f, x, pair.tie, &by_margin);
    return {loss, {by_margin * f.beta * weight[0], -by_margin * f.beta * weight[1]}};
}

// Reads pair number `index`; every array but bounds may be NULL.
FASTALIGN_SHARED PreferencePair read_pair(int64_t index, const double* policy,
                                          const int64_t* bounds, const float* reference_logprob,
                                          const int64_t* length, const uint8_t* tie) {
    PreferencePair pair;
    for (int side = 0; side < 2; ++side) {
        const int64_t sequence = 2 * index + side;
        // Rounded as it is returned: a policy that equals its reference has a margin of exactly 0.
        pair.policy[side] = static_cast<float>(policy[side]);
        pair.reference[side] = reference_logprob ? reference_logprob[sequence] : 0;
        pair.length[side] = static_cast<double>(length ? length[sequence]
                                                       : bounds[sequence + 1] - bounds[sequence]);
    }
    pair.tie = tie && tie[index];
    return pair;
}

}  // namespace fastalign
