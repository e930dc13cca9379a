// The C ABI: selects the instruction set and distributes rows and sequences over threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "native.h"
#include "parallel.h"
#include "passes.h"

namespace {

bool runs(const Passes& passes) {
#if defined(OREAL_X86)
    if (&passes == &passes_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&passes == &passes_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return &passes == &passes_plain;
}

// The best one first.
const Passes* const ALL[] = {
#if defined(OREAL_X86)
    &passes_avx512, &passes_avx2,
#endif
    &passes_plain};

const Passes* find(const char* name) {
    for (const Passes* passes : ALL)
        if (runs(*passes) && (!*name || !strcmp(name, passes->name))) return passes;
    return nullptr;
}

std::atomic<const Passes*> chosen{find("")};

const char* at(const void* base, int64_t element, int dtype) {
    return (const char*)base + element * (dtype == 0 ? 4 : 2);
}

// Fewer elements than this are computed before a thread has started.
int threads_for_elements(int64_t elements, int threads) { return elements < 1 << 16 ? 1 : threads; }

// Up to this many tokens take half a millisecond at most. A second thread may wait longer than that for torch's
// workers, which spin for a while after each operation.
int threads_for_tokens(int64_t tokens, int threads) { return tokens < 1 << 18 ? 1 : threads; }

}  // namespace

bool runs_avx512_bf16() {
#if defined(OREAL_AVX512_BF16)
    return chosen == &passes_avx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

int oreal_abi_version() { return 3; }

const char* oreal_features() {
    return runs_avx512_bf16() ? "avx512 avx512_bf16" : chosen.load()->name;
}

int oreal_select(const char* name) {
    const Passes* passes = find(name);
    if (passes) chosen = passes;
    return passes != nullptr;
}

void oreal_row_statistics(const void* logits, int dtype, int64_t rows, int64_t columns, int64_t row_stride,
                          const int64_t* label_column, const float* inverse_temperature, float softcap, float* out,
                          int threads) {
    const Passes& passes = *chosen;
    parallel_for(rows, threads_for_elements(rows * columns, threads), [=](int64_t row, int) {
        float values[4];
        passes.statistics({at(logits, row * row_stride, dtype), dtype, columns, label_column[row],
                           inverse_temperature[row], softcap}, values);
        for (int i = 0; i < 4; ++i) out[i * rows + row] = values[i];
    });
}

void oreal_row_gradient(const void* logits, int dtype, int64_t stride, void* out, int out_dtype, int64_t out_stride,
                        int64_t rows, int64_t columns, int64_t total_columns, const int64_t* label_column,
                        const float* inverse_temperature, float softcap, const float* maximum, const float* log_total,
                        const float* entropy, const float* a, const float* b, int threads) {
    const Passes& passes = *chosen;
    parallel_for(rows, threads_for_elements(rows * total_columns, threads), [=](int64_t row, int) {
        passes.gradient({at(logits, row * stride, dtype), dtype, columns, label_column[row], inverse_temperature[row],
                         softcap},
                        {(void*)at(out, row * out_stride, out_dtype), out_dtype, total_columns, maximum[row],
                         log_total[row], entropy[row], a[row], b[row]});
    });
}

void oreal_token_weights(const void* scores, int dtype, const int64_t* cu_seqlens, int64_t sequences,
                         const uint8_t* correct, int prefix_mean, float threshold_correct, float threshold_incorrect,
                         float* weights, float* means, int threads) {
    const Passes& passes = *chosen;
    parallel_for(sequences, threads_for_tokens(cu_seqlens[sequences], threads), [=](int64_t sequence, int) {
        const int64_t begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
        const bool right = correct[sequence];
        means[sequence] = passes.weights({at(scores, begin, dtype), dtype, end - begin, prefix_mean != 0,
                                          right ? 1.0f : -1.0f, right ? threshold_correct : threshold_incorrect,
                                          weights + begin});
    });
}

void oreal_policy_terms(const float* logp, const float* reference, const float* weight, const int64_t* cu_seqlens,
                        int64_t sequences, const float* reward, const float* advantage, int advantage_on_positives,
                        float correct_scale, float incorrect_scale, float kl_scale, int kl_kind, float* grad,
                        double* sums, int threads) {
    const Passes& passes = *chosen;
    const int64_t tokens = cu_seqlens[sequences], block = 4096, blocks = (tokens + block - 1) / block;
    std::vector<std::array<double, 8>> parts(blocks);
    parallel_for(blocks, threads_for_tokens(tokens, threads), [&](int64_t index, int) {
        auto& part = parts[index] = {};
        const int64_t stop = std::min(tokens, (index + 1) * block);
        int64_t sequence = std::upper_bound(cu_seqlens, cu_seqlens + sequences, index * block) - cu_seqlens - 1;
        for (int64_t begin = index * block; begin < stop; ++sequence) {
            const int64_t end = std::min(stop, cu_seqlens[sequence + 1]);
            const bool correct = reward[sequence] > 0;
            const float factor = correct && !advantage_on_positives ? 1 : advantage[sequence];
            const TokenSums token_sums =
                passes.policy({logp + begin, reference + begin, weight + begin, grad + begin, end - begin,
                               (correct ? correct_scale : incorrect_scale) * factor, kl_scale, kl_kind});
            part[0] += correct ? factor * token_sums.weighted_logp : 0;
            part[1] += correct ? 0 : factor * token_sums.weight;
            part[2] -= token_sums.difference;
            part[3] += token_sums.square / 2;
            part[4] += token_sums.k3;
            part[5] += token_sums.logp;
            part[correct ? 6 : 7] += token_sums.weight;
            begin = end;
        }
    });
    std::fill(sums, sums + 8, 0.0);
    for (const auto& part : parts)
        for (int i = 0; i < 8; ++i) sums[i] += part[i];
}
