/* What the kernels in C share: vectors of the processor's width, products of small matrices in registers, 2^x. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16 /* floats in a register */
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#ifndef LANES /* floats in a vector; tests set others */
#define LANES WIDTH
#endif

#define PANEL (2 * LANES) /* columns of a product computed at once */
#define ROWS 6            /* and rows: 12 sums, 2 factors and 1 more fill 16 registers */
#define CACHE_LINE 16     /* floats */
#define STEPS 4           /* and terms of their sums before the loop turns */
#define LOG2_E 1.44269504088896341f
#define LN_2 0.69314718055994531f

typedef int64_t i64;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec4 __attribute__((vector_size(16), aligned(4), may_alias));

#define VEC(place) (*(vec *)(place))
#define IVEC(place) (*(ivec *)(place))
#define VEC4(place, i) (((vec4 *)(place))[i])
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 round_up(i64 n, i64 step) { return (n + step - 1) / step * step; }

/* Takes `size` floats from the scratch memory, in whole cache lines. */
INLINE float *take(float **scratch, i64 size) {
    float *found = *scratch;
    *scratch += round_up(size, CACHE_LINE);
    return found;
}

/* Floats from one row of a tile to the next: whole cache lines, an odd number of them, since rows at distances of
   powers of two would share few places of the cache. */
INLINE i64 row_of(i64 columns) { return (round_up(columns, CACHE_LINE) / CACHE_LINE | 1) * CACHE_LINE; }

/* The left factor of a product: rows that begin `row` floats apart, element (i, s) at i·row + s. Turned, its columns
   are such rows: element (i, s) at s·row + i. While the product is computed, as much memory from `ahead` on as its
   factor takes is fetched into the cache; NULL: none.

   The right one: element (s, j) at s·row + j % PANEL of the panel of columns j / PANEL. Panels begin `panel` floats
   apart: PANEL for rows of any matrix; a packed one has them behind each other, (columns / PANEL, depth, PANEL). */
typedef struct {
    const float *x;
    i64 row;
    const float *ahead;
} Left;

typedef struct {
    const float *x;
    i64 row, panel;
} Right;

INLINE Left by_rows(const float *x, i64 row) { return (Left){x, row, NULL}; }
INLINE Right of_rows(const float *x, i64 row) { return (Right){x, row, PANEL}; }
INLINE Right packed(const float *x, i64 depth) { return (Right){x, PANEL, depth * PANEL}; }

/* For the compiler to give every sum one register and every factor its own until the end of a step: left alone it
   reuses that of a factor in its last product, and copies the sum. */
#define KEEP(factor) __asm__ volatile("" : : "X"(factor))
#if LANES > WIDTH
#define PIN(sum)
#elif defined(__AVX512F__)
#define PIN(sum) __asm__("" : "+v"(sum))
#elif defined(__x86_64__)
#define PIN(sum) __asm__("" : "+x"(sum))
#elif defined(__aarch64__)
#define PIN(sum) __asm__("" : "+w"(sum))
#else
#define PIN(sum)
#endif

/* One more term of each sum. */
INLINE void add_terms(const int vecs, const int turned, const float *a, const float *a3, i64 a_row, const float *b,
                      vec sum[ROWS][2]) {
    vec line[2];
#pragma GCC unroll 2
    for (int j = 0; j < vecs; j++) line[j] = VEC(b + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        vec x = (turned ? a[i] : i < 3 ? a[i * a_row] : a3[(i - 3) * a_row]) - (vec){0};
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) {
            sum[i][j] += x * line[j];
            PIN(sum[i][j]);
        }
        KEEP(x);
    }
#pragma GCC unroll 2
    for (int j = 0; j < vecs; j++) KEEP(line[j]);
}

/* c (ROWS x vecs·LANES) = a b, or += */
INLINE void multiply_panel(const int vecs, const int turned, i64 depth, const float *a, const i64 a_row, const float *b,
                           const i64 b_row, float *c, i64 c_row, int add) {
    vec sum[ROWS][2];
    const i64 a_step = turned ? a_row : 1;
    const float *a3 = a + 3 * a_row; /* three rows and three fit the processor's addresses */
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) sum[i][j] = add ? VEC(c + i * c_row + j * LANES) : (vec){0};
    for (; depth >= STEPS; depth -= STEPS, a += STEPS * a_step, a3 += STEPS * a_step, b += STEPS * b_row)
#pragma GCC unroll 4
        for (int s = 0; s < STEPS; s++)
            add_terms(vecs, turned, a + s * a_step, a3 + s * a_step, a_row, b + s * b_row, sum);
    for (; depth > 0; depth--, a += a_step, a3 += a_step, b += b_row) add_terms(vecs, turned, a, a3, a_row, b, sum);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) VEC(c + i * c_row + j * LANES) = sum[i][j];
}

/* c (rows x columns), in panels of columns, = a b, or +=. Computes up to the next multiple of ROWS and of LANES: there
   is room for it in c, and something to read in a and b. */
INLINE void multiply_strips(const int turned, i64 rows, i64 columns, i64 depth, Left a, Right b, float *c, i64 c_row,
                            i64 c_panel, int add) {
    const i64 next = turned ? ROWS : ROWS * a.row;
    const i64 ahead = a.ahead ? round_up(ROWS * depth * PANEL / columns, CACHE_LINE) : 0; /* in one panel of a strip */
    for (i64 j = 0; j < columns; j += PANEL, b.x += b.panel, c += c_panel) {
        const float *strip = a.x;
        if (columns - j > LANES)
            for (i64 i = 0; i < rows; i += ROWS, strip += next, a.ahead += ahead) {
                for (i64 k = 0; k < ahead; k += CACHE_LINE) __builtin_prefetch(a.ahead + k, 0, 2);
                multiply_panel(2, turned, depth, strip, a.row, b.x, b.row, c + i * c_row, c_row, add);
            }
        else
            for (i64 i = 0; i < rows; i += ROWS, strip += next)
                multiply_panel(1, turned, depth, strip, a.row, b.x, b.row, c + i * c_row, c_row, add);
    }
}

NOINLINE void multiply(i64 rows, i64 columns, i64 depth, Left a, Right b, float *c, i64 c_row, i64 c_panel, int add) {
    multiply_strips(0, rows, columns, depth, a, b, c, c_row, c_panel, add);
}

NOINLINE void multiply_turned(i64 rows, i64 columns, i64 depth, Left a, Right b, float *c, i64 c_row, i64 c_panel,
                              int add) {
    multiply_strips(1, rows, columns, depth, a, b, c, c_row, c_panel, add);
}

INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
}

/* A vector's sum and its largest lane, by fours: one lane after the other would wait for each. */
INLINE float sum_of(vec x) {
    vec4 sum = VEC4(&x, 0);
    for (int i = 1; i < LANES / 4; i++) sum += VEC4(&x, i);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE float largest_of(vec x) {
    vec4 top = VEC4(&x, 0);
    for (int i = 1; i < LANES / 4; i++) {
        vec4 other = VEC4(&x, i);
        ivec4 first = top > other;
        top = (vec4)((first & (ivec4)top) | (~first & (ivec4)other));
    }
    float left = top[0] > top[1] ? top[0] : top[1], right = top[2] > top[3] ? top[2] : top[3];
    return left > right ? left : right;
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
