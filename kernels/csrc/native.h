// The flat C ABI of the library; oreal_kernels/native.py calls it through ctypes.
//
// Pointers are raw, sizes and strides count elements, dtype codes are 0 for fp32 and 1 for bf16. Results are the same
// bits for every value of `threads` and in every run on one instruction set.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// Incremented with every change of a signature; native.py rejects a library of another version.
int oreal_abi_version();

// Instruction set in use, such as "avx512 avx512_bf16".
const char* oreal_features();

// Use the instruction set "plain", "avx2" or "avx512", or the best one for "". Returns 0 if this machine lacks it.
int oreal_select(const char* name);

// With z = (softcap ? softcap * tanh(raw / softcap) : raw) * inverse_temperature[row], out [4, rows] is the maximum m,
// the sum of exp(z - m), the sum of exp(z - m) * (z - m), and z at the label (0 if label_column is outside).
// No columns, or only -inf: m = -inf and both sums 0.
void oreal_row_statistics(const void* logits, int dtype, int64_t rows, int64_t columns, int64_t row_stride,
                          const int64_t* label_column, const float* inverse_temperature, float softcap, float* out,
                          int threads);

// With log p = z - maximum - log_total (in this order, for its digits):
// out = (a * (1[v = label] - p) - b * p * (log p + entropy)) * dz/draw, and 0 in the columns from `columns` to
// `total_columns`. `out` may be `logits`. Rows with a = b = 0 or maximum = -inf become 0.
void oreal_row_gradient(const void* logits, int dtype, int64_t stride, void* out, int out_dtype, int64_t out_stride,
                        int64_t rows, int64_t columns, int64_t total_columns, const int64_t* label_column,
                        const float* inverse_temperature, float softcap, const float* maximum, const float* log_total,
                        const float* entropy, const float* a, const float* b, int threads);

// For each sequence: belief = sigmoid(value of the token), 1 - belief where the sequence is incorrect, and
// weight = clamp((belief - threshold) / (1 - threshold), 0, 1) with the threshold of the sequence's outcome. The value
// is the mean of the scores up to the token with prefix_mean, else the token's own score. means [sequences], of all
// scores, are 0 for empty ones.
void oreal_token_weights(const void* scores, int dtype, const int64_t* cu_seqlens, int64_t sequences,
                         const uint8_t* correct, int prefix_mean, float threshold_correct, float threshold_incorrect,
                         float* weights, float* means, int threads);

// Gradient of the policy loss by the log-prob of every token, and eight unscaled sums, see policy_terms in native.py.
void oreal_policy_terms(const float* logp, const float* reference, const float* weight, const int64_t* cu_seqlens,
                        int64_t sequences, const float* reward, const float* advantage, int advantage_on_positives,
                        float correct_scale, float incorrect_scale, float kl_scale, int kl_kind, float* grad,
                        double* sums, int threads);

// main_grad [columns, width] += dlogits [rows, columns] transposed @ hidden [rows, width]: bf16 operands, fp32 sums,
// subnormal operands count as 0. Returns 0 and touches nothing without AVX512-BF16, or without memory to pack into.
int oreal_add_weight_gradient(const uint16_t* dlogits, int64_t dlogits_stride, const uint16_t* hidden,
                              int64_t hidden_stride, float* main_grad, int64_t main_grad_stride, int64_t rows,
                              int64_t columns, int64_t width, int threads);
}
#pragma GCC visibility pop
