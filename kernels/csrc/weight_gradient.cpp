// main_grad += dlogits^T @ hidden with AVX512-BF16: bf16 operands, fp32 sums.
//
// vdpbf16ps multiplies pairs of neighbours, so both operands are packed with two rows interleaved: `hidden` once into
// panels of 64 columns that all threads read, `dlogits` strip by strip into groups of 6 columns. A tile is 6 x 64.
#include "native.h"

#if !defined(OREAL_AVX512_BF16)

int oreal_add_weight_gradient(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, int64_t, int64_t, int64_t,
                              int64_t, int) {
    return 0;
}

#else

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"
#include "passes.h"

#define OREAL_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace {

constexpr int64_t GROUP = 6, PANEL = 64;  // 24 sums, 4 of hidden and 1 of dlogits: 29 of 32 registers
constexpr int64_t STRIP = 32 * GROUP;     // columns of main_grad in one task
constexpr int64_t RUN = 64;               // pairs of rows in one chain of sums, for the digits of main_grad
constexpr int64_t DEPTH = 1024;           // rows at a time: a packed strip (384 KB) stays in the second-level cache

struct Product {
    const uint16_t *dlogits, *hidden;
    float* main_grad;
    int64_t dlogits_stride, hidden_stride, main_grad_stride, rows, columns, width;
};

// Words of (row, row + 1) for `count` columns. What packing leaves beyond them reaches sums that are never stored.
OREAL_TARGET void interleave(const uint16_t* row, int64_t stride, bool single, int64_t count, uint32_t* out) {
    if (single)
        for (int64_t i = 0; i < count; ++i) out[i] = row[i];
    else
        for (int64_t i = 0; i < count; ++i) out[i] = row[i] | (uint32_t)row[stride + i] << 16;
}

// [pairs, PANEL] of columns from `begin`.
void pack_panel(const Product& of, int64_t begin, uint32_t* out) {
    const int64_t count = std::min(PANEL, of.width - begin);
    for (int64_t row = 0; row < of.rows; row += 2, out += PANEL)
        interleave(of.hidden + row * of.hidden_stride + begin, of.hidden_stride, row + 1 == of.rows, count, out);
}

// [STRIP / GROUP, pairs, GROUP] of columns from `begin`.
void pack_strip(const Product& of, int64_t begin, uint32_t* out) {
    const int64_t count = std::min(STRIP, of.columns - begin), pairs = (of.rows + 1) / 2;
    uint32_t words[STRIP] = {};
    for (int64_t pair = 0; pair < pairs; ++pair) {
        interleave(of.dlogits + 2 * pair * of.dlogits_stride + begin, of.dlogits_stride, 2 * pair + 1 == of.rows, count,
                   words);
        for (int64_t group = 0; group < STRIP / GROUP; ++group)
            memcpy(out + (group * pairs + pair) * GROUP, words + group * GROUP, GROUP * sizeof(uint32_t));
    }
}

__mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

// out [height, width] += strip [pairs, GROUP] transposed @ panel [pairs, PANEL]
OREAL_TARGET void add_run(const uint32_t* strip, const uint32_t* panel, int64_t pairs, float* out, int64_t stride,
                          int64_t height, int64_t width) {
    __m512 sums[GROUP][4];
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; j += 16) _mm_prefetch((const char*)(out + i * stride + j), _MM_HINT_T0);
    for (int64_t pair = 0; pair < pairs; ++pair, strip += GROUP, panel += PANEL) {
        __m512i right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) right[j] = _mm512_loadu_si512(panel + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < GROUP; ++i) {
            const __m512i left = _mm512_set1_epi32((int)strip[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; ++i) {
        if (i >= height) return;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __mmask16 lanes = first_lanes(width - 16 * j);
            float* to = out + i * stride + 16 * j;
            _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sums[i][j]));
        }
    }
}

// main_grad [width, a group of columns from `column`] += the packed strip transposed @ the packed panel, run by run.
void add_tile(const Product& of, int64_t column, int64_t at, int64_t height, const uint32_t* strip,
              const uint32_t* panel) {
    float* const out = of.main_grad + column * of.main_grad_stride + at;
    for (int64_t pairs = (of.rows + 1) / 2; pairs > 0; pairs -= RUN, strip += RUN * GROUP, panel += RUN * PANEL)
        add_run(strip, panel, std::min(RUN, pairs), out, of.main_grad_stride, height, std::min(PANEL, of.width - at));
}

void add_strip(const Product& of, int64_t begin, const uint32_t* strip, const uint32_t* panels) {
    const int64_t pairs = (of.rows + 1) / 2, end = std::min(of.columns, begin + STRIP);
    for (int64_t at = 0; at < of.width; at += PANEL, panels += pairs * PANEL)
        for (int64_t column = begin; column < end; column += GROUP)
            add_tile(of, column, at, std::min(GROUP, end - column), strip + (column - begin) * pairs, panels);
}

}  // namespace

int oreal_add_weight_gradient(const uint16_t* dlogits, int64_t dlogits_stride, const uint16_t* hidden,
                              int64_t hidden_stride, float* main_grad, int64_t main_grad_stride, int64_t rows,
                              int64_t columns, int64_t width, int threads) {
    if (!runs_avx512_bf16()) return 0;
    const int64_t depth = (std::min(rows, DEPTH) + 1) / 2, panels = (width + PANEL - 1) / PANEL;
    const int64_t strips = (columns + STRIP - 1) / STRIP;
    const std::unique_ptr<uint32_t[]> right(new (std::nothrow) uint32_t[panels * PANEL * depth]);
    const std::unique_ptr<uint32_t[]> left(new (std::nothrow) uint32_t[threads * STRIP * depth]);
    if (!right || !left) return 0;
    for (int64_t row = 0; row < rows; row += DEPTH) {
        const Product part{dlogits + row * dlogits_stride, hidden + row * hidden_stride, main_grad, dlogits_stride,
                           hidden_stride, main_grad_stride, std::min(DEPTH, rows - row), columns, width};
        const int64_t pairs = (part.rows + 1) / 2;
        parallel_for(panels, threads, [&](int64_t panel, int) {
            pack_panel(part, panel * PANEL, right.get() + panel * PANEL * pairs);
        });
        parallel_for(strips, threads, [&](int64_t strip, int thread) {
            uint32_t* const packed = left.get() + thread * STRIP * depth;
            pack_strip(part, strip * STRIP, packed);
            add_strip(part, strip * STRIP, packed, right.get());
        });
    }
    return 1;
}

#endif
