// Compiled once per instruction set, with OREAL_LANES floats to a vector and OREAL_PASSES as the table's name.
#include "passes.h"

#include "vector.h"

namespace {

// z of a vector of raw logits, and dz/draw.
template <bool capped>
OREAL_INLINE Float logit(Float raw, const Row& row) {
    if (!capped) return rounded(raw * row.inverse_temperature);
    return rounded(row.softcap * hyperbolic_tangent(raw / row.softcap).value * row.inverse_temperature);
}

template <bool capped>
OREAL_INLINE Float slope(Float raw, const Row& row) {
    if (!capped) return splat(row.inverse_temperature);
    return hyperbolic_tangent(raw / row.softcap).slope * row.inverse_temperature;
}

constexpr int64_t BLOCK = 2048;  // 8 KB of logits as fp32: between the maximum and the exponentials they stay in L1

// Fills z with the logits of one block, then -inf up to a whole vector, and returns their maximum.
template <class T, bool capped>
OREAL_INLINE float fill_block(const T* raw, int64_t count, const Row& row, float* z) {
    Float best = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Float x = logit<capped>(load(raw + i), row);
        best = x > best ? x : best;
        store(z + i, x);
    }
    if (i == count) return maximum_of(best);
    store(z + i, logit<capped>(load_some(raw + i, count - i), row));
    for (int64_t j = count; j < i + LANES; ++j) z[j] = -INFINITY;
    const Float x = load(z + i);
    return maximum_of(x > best ? x : best);
}

// Sums over one row, relative to the maximum so far.
struct RowSums {
    float maximum = -INFINITY;
    Double sum{}, first{};  // of exp(z - maximum), and of that times (z - maximum)

    OREAL_INLINE void raise(float larger) {
        const double step = (double)maximum - larger;
        if (maximum != -INFINITY) {
            first = (first + step * sum) * exp(step);
            sum *= exp(step);
        }
        maximum = larger;
    }

    OREAL_INLINE void add(const float* z, int64_t count) {
        const float shift = maximum == -INFINITY ? 0 : maximum;
        Float block_sum{}, block_first{};
        for (int64_t i = 0; i < count; i += LANES) {
            const Float x = at_least(load(z + i) - shift, LOWEST), e = exponential(x);
            block_sum += e;
            block_first += e * x;
        }
        sum += __builtin_convertvector(block_sum, Double);
        first += __builtin_convertvector(block_first, Double);
    }
};

template <class T, bool capped>
void statistics(const Row& row, float out[4]) {
    const T* raw = (const T*)row.logits;
    alignas(64) float z[BLOCK];
    RowSums sums;
    for (int64_t begin = 0; begin < row.columns; begin += BLOCK) {
        const int64_t count = row.columns - begin < BLOCK ? row.columns - begin : BLOCK;
        const float largest = fill_block<T, capped>(raw + begin, count, row, z);
        if (largest > sums.maximum) sums.raise(largest);
        sums.add(z, count);
    }
    const bool label_is_local = row.label >= 0 && row.label < row.columns;
    out[0] = sums.maximum;
    out[1] = (float)sum_of(sums.sum);
    out[2] = (float)sum_of(sums.first);
    out[3] = label_is_local ? logit<capped>(load_some(raw + row.label, 1), row)[0] : 0;
}

template <bool capped>
OREAL_INLINE Float entry(Float raw, const Row& row, const RowGradient& to) {
    const Float log_p = logit<capped>(raw, row) - to.maximum - to.log_total;
    const Float x = at_most(at_least(log_p, LOWEST), HIGHEST);
    return -exponential(x) * (to.a + to.b * (x + to.entropy)) * slope<capped>(raw, row);
}

// expm1 keeps the digits of a small 1 - p.
template <bool capped>
OREAL_INLINE Float label_entry(Float raw, const Row& row, const RowGradient& to) {
    const double x = at_least(logit<capped>(raw, row) - to.maximum - to.log_total, LOWEST)[0];
    const double by_z = -to.a * expm1(x) - to.b * exp(x) * (x + to.entropy);
    return splat((float)by_z) * slope<capped>(raw, row);
}

template <class T, class Out, bool capped>
void gradient(const Row& row, const RowGradient& to) {
    const T* raw = (const T*)row.logits;
    Out* out = (Out*)to.out;
    if ((to.a == 0 && to.b == 0) || to.maximum == -INFINITY) {
        memset(out, 0, to.total_columns * sizeof(Out));
        return;
    }
    const bool label_is_local = row.label >= 0 && row.label < row.columns;
    const Float at_label = label_is_local ? label_entry<capped>(load_some(raw + row.label, 1), row, to) : Float{};
    int64_t i = 0;
    for (; i + LANES <= row.columns; i += LANES) store(out + i, entry<capped>(load(raw + i), row, to));
    if (i < row.columns) {
        const int64_t remaining = row.columns - i;
        store_some(out + i, entry<capped>(load_some(raw + i, remaining), row, to), remaining);
    }
    if (label_is_local) store_some(out + row.label, at_label, 1);
    memset(out + row.columns, 0, (to.total_columns - row.columns) * sizeof(Out));
}

void statistics_of(const Row& row, float out[4]) {
    if (row.dtype == 0) return row.softcap ? statistics<float, true>(row, out) : statistics<float, false>(row, out);
    return row.softcap ? statistics<bf16, true>(row, out) : statistics<bf16, false>(row, out);
}

template <class T, class Out>
void gradient_to(const Row& row, const RowGradient& to) {
    return row.softcap ? gradient<T, Out, true>(row, to) : gradient<T, Out, false>(row, to);
}

void gradient_of(const Row& row, const RowGradient& to) {
    if (row.dtype == 0) return to.dtype == 0 ? gradient_to<float, float>(row, to) : gradient_to<float, bf16>(row, to);
    return to.dtype == 0 ? gradient_to<bf16, float>(row, to) : gradient_to<bf16, bf16>(row, to);
}

// Writes the sums of the scores so far and returns the sum of all: in fp64, so that a long response keeps its digits.
template <class T>
double running_sums(const T* scores, int64_t count, float* out) {
    double carried = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t remaining = count - i;
        const Float score = remaining < LANES ? load_some(scores + i, remaining) : load(scores + i);
        Narrow halves[2];
        memcpy(halves, &score, sizeof score);
        const Wide low = running_sum(__builtin_convertvector(halves[0], Wide));
        const Wide high = running_sum(__builtin_convertvector(halves[1], Wide)) + low[WIDE - 1];
        halves[0] = __builtin_convertvector(low + carried, Narrow);
        halves[1] = __builtin_convertvector(high + carried, Narrow);
        carried += high[WIDE - 1];
        if (remaining < LANES)
            memcpy(out + i, halves, remaining * sizeof(float));
        else
            memcpy(out + i, halves, sizeof halves);
    }
    return carried;
}

template <class T>
float weights_from(const T* scores, const ScoredTokens& tokens) {
    const double total = running_sums(scores, tokens.count, tokens.weights);
    const float scale = 1.0f / (1.0f - tokens.threshold);
    Float read;
    for (int lane = 0; lane < LANES; ++lane) read[lane] = (float)(lane + 1);
    for (int64_t i = 0; i < tokens.count; i += LANES) {
        const int64_t remaining = tokens.count - i;
        const bool some = remaining < LANES;
        const Float sum = some ? load_some(tokens.weights + i, remaining) : load(tokens.weights + i);
        const Float score = some ? load_some(scores + i, remaining) : load(scores + i);
        const Float value = tokens.prefix_mean ? sum / (read + (float)i) : score;
        const Float belief = 1.0f / (1.0f + exponential(at_most(at_least(-tokens.sign * value, LOWEST), HIGHEST)));
        const Float weight = at_most(at_least((belief - tokens.threshold) * scale, 0), 1);
        some ? store_some(tokens.weights + i, weight, remaining) : store(tokens.weights + i, weight);
    }
    return tokens.count ? (float)(total / (double)tokens.count) : 0;
}

float weights_of(const ScoredTokens& tokens) {
    return tokens.dtype == 0 ? weights_from((const float*)tokens.scores, tokens)
                             : weights_from((const bf16*)tokens.scores, tokens);
}

OREAL_INLINE Float kl_slope(Float d, Float k3, int kind) {
    if (kind == 1 || kind == -1) return splat((float)kind);
    return kind == 2 ? -d : -(d + k3);
}

// Sums over tokens: in fp32 for RUN vectors, in fp64 beyond.
struct PolicySums {
    static constexpr int64_t RUN = 16 * LANES;
    Double weighted_logp{}, weight{}, difference{}, square{}, k3{}, logp{};

    OREAL_INLINE void add(const Tokens& tokens, int64_t begin, int64_t end) {
        Float weighted_logps{}, weights{}, differences{}, squares{}, k3s{}, logps{};
        for (int64_t i = begin; i < end; i += LANES) {
            const int64_t remaining = end - i;
            const bool some = remaining < LANES;
            const Float l = some ? load_some(tokens.logp + i, remaining) : load(tokens.logp + i);
            const Float reference = some ? load_some(tokens.reference + i, remaining) : load(tokens.reference + i);
            const Float w = some ? load_some(tokens.weight + i, remaining) : load(tokens.weight + i);
            const Float d = at_most(at_least(reference - l, -60), 60), after_line = exponential_after_line(d);
            const Float grad = tokens.kl_scale * kl_slope(d, after_line, tokens.kl_kind) - tokens.scale * w;
            some ? store_some(tokens.grad + i, grad, remaining) : store(tokens.grad + i, grad);
            weighted_logps += w * l;
            weights += w;
            differences += d;
            squares += d * d;
            k3s += after_line;
            logps += l;
        }
        weighted_logp += __builtin_convertvector(weighted_logps, Double);
        weight += __builtin_convertvector(weights, Double);
        difference += __builtin_convertvector(differences, Double);
        square += __builtin_convertvector(squares, Double);
        k3 += __builtin_convertvector(k3s, Double);
        logp += __builtin_convertvector(logps, Double);
    }
};

TokenSums policy_of(const Tokens& tokens) {
    PolicySums sums;
    for (int64_t i = 0; i < tokens.count; i += PolicySums::RUN)
        sums.add(tokens, i, tokens.count - i < PolicySums::RUN ? tokens.count : i + PolicySums::RUN);
    return {sum_of(sums.weighted_logp), sum_of(sums.weight), sum_of(sums.difference),
            sum_of(sums.square),        sum_of(sums.k3),     sum_of(sums.logp)};
}

}  // namespace

extern const Passes OREAL_PASSES;
const Passes OREAL_PASSES = {OREAL_NAME, statistics_of, gradient_of, weights_of, policy_of};
