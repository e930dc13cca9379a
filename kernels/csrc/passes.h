// The passes over rows and sequences that exist once per instruction set; all of them run in the calling thread.
#pragma once
#include <cstdint>

struct Row {
    const void* logits;
    int dtype;
    int64_t columns, label;
    float inverse_temperature, softcap;
};

struct RowGradient {
    void* out;
    int dtype;
    int64_t total_columns;
    float maximum, log_total, entropy, a, b;
};

// Tokens of one sequence: grad = -scale * weight + the KL term; see oreal_policy_terms.
struct Tokens {
    const float *logp, *reference, *weight;
    float* grad;
    int64_t count;
    float scale, kl_scale;
    int kl_kind;
};

// Tokens of one sequence with the reward model's scores; sign is 1 if it is correct and -1 if not.
struct ScoredTokens {
    const void* scores;
    int dtype;
    int64_t count;
    bool prefix_mean;
    float sign, threshold;
    float* weights;
};

struct TokenSums {
    double weighted_logp, weight, difference, square, k3, logp;
};

struct Passes {
    const char* name;
    void (*statistics)(const Row&, float out[4]);
    void (*gradient)(const Row&, const RowGradient&);
    // Writes the weights of one sequence and returns its mean score; see oreal_token_weights.
    float (*weights)(const ScoredTokens&);
    TokenSums (*policy)(const Tokens&);
};

extern const Passes passes_plain, passes_avx2, passes_avx512;

// Whether the instruction set in use has vdpbf16ps, which weight_gradient.cpp needs.
bool runs_avx512_bf16();
