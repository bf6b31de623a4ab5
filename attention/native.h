/* What the kernels in C share: vectors of the processor's width, products of small matrices in registers, 2^x. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifndef LANES /* floats in a vector */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

#define PANEL (2 * LANES) /* columns of a product computed at once */
#define ROWS 6            /* and rows: 12 sums, 2 factors and 1 more fill 16 registers */
#define LOG2_E 1.44269504088896341f
#define LN_2 0.69314718055994531f

typedef int64_t i64;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define VEC(place) (*(vec *)(place))
#define IVEC(place) (*(ivec *)(place))
#define INLINE static inline __attribute__((always_inline))

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 round_up(i64 n, i64 step) { return (n + step - 1) / step * step; }

/* Takes `size` floats from the scratch memory, in whole cache lines. */
INLINE float *take(float **scratch, i64 size) {
    float *found = *scratch;
    *scratch += round_up(size, 16);
    return found;
}

/* c (ROWS x vecs·LANES) = a b, or += */
INLINE void multiply_panel(const int vecs, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step,
                           float *c, i64 c_row, int add) {
    vec sum[ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) sum[i][j] = add ? VEC(c + i * c_row + j * LANES) : (vec){0};
    for (i64 step = 0; step < depth; step++) {
        vec line[2];
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) line[j] = VEC(b + step * b_step + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            float x = a[i * a_row + step * a_step];
#pragma GCC unroll 2
            for (int j = 0; j < vecs; j++) sum[i][j] += x * line[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) VEC(c + i * c_row + j * LANES) = sum[i][j];
}

/* c (rows x columns) = a b, or +=, with element (i, s) of a at a[i·a_row + s·a_step], and b and c in panels of columns.
   Computes up to the next multiple of ROWS and of LANES: all three have room for it. */
static void multiply(i64 rows, i64 columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b,
                     i64 b_step, i64 b_panel, float *c, i64 c_row, i64 c_panel, int add) {
    for (i64 j = 0; j < columns; j += PANEL, b += b_panel, c += c_panel) {
        if (columns - j > LANES)
            for (i64 i = 0; i < rows; i += ROWS)
                multiply_panel(2, depth, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row, add);
        else
            for (i64 i = 0; i < rows; i += ROWS)
                multiply_panel(1, depth, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row, add);
    }
}

/* 2^x to a unit in the last place, 0 below the normal numbers. */
INLINE vec exp2_of(vec x) {
    vec shifted = x + 12582912.0f; /* 1.5 · 2^23: leaves the nearest integer in the last bits */
    vec f = x - (shifted - 12582912.0f);
    vec power = 1.535336188e-4f * f + 1.339887442e-3f; /* the least largest relative error: 2e-9 before rounding */
    power = power * f + 9.618437358e-3f;
    power = power * f + 5.550332471e-2f;
    power = power * f + 2.402264791e-1f;
    power = power * f + 6.931472029e-1f;
    power = power * f + 1.0f;
    return (vec)(((ivec)power + ((ivec)shifted << 23)) & ~(x < -126.0f)); /* no number stays none */
}

INLINE float exp2_of_one(float x) { return exp2_of((vec){0} + x)[0]; }
