/* What HRR attention computes beside products of matrices, in one pass over memory each; attention/hrr/native.py calls
   it, on a CPU, in float32.

   Vectors lie in rows (outer, inner, dim) with strides of their own for the first two dimensions. */

#include <math.h>
#include <stdint.h>

typedef int64_t i64;

/* Field by field as _Rows in native.py. */
typedef struct {
    float *data;
    i64 outer, inner; /* strides, in numbers */
} Rows;

#define ROW(x, i, j) ((x).data + (i) * (x).outer + (j) * (x).inner)
#define FOR_ALL_ROWS _Pragma("omp parallel for collapse(2) num_threads(threads)")
#define FOR_DIM(...) _Pragma(__VA_ARGS__) for (i64 d = 0; d < dim; d++)

/* As `inverse_norm` in cosine.py: a norm whose square is no normal number counts as 0, and has the inverse 0. */
static inline float inverse_norm(float square) {
    float norm = sqrtf(square);
    return norm <= 1e-18f ? 0 : 1 / norm;
}

/* out[i, j] = x·y, or their cosine */
void hrr_dot(Rows x, Rows y, Rows out, int cosine, i64 outer, i64 inner, i64 dim, i64 threads) {
    FOR_ALL_ROWS
    for (i64 i = 0; i < outer; i++)
        for (i64 j = 0; j < inner; j++) {
            const float *a = ROW(x, i, j), *b = ROW(y, i, j);
            float product = 0, a_square = 0, b_square = 0;
            if (cosine) {
                FOR_DIM("omp simd reduction(+ : product, a_square, b_square)") {
                    product += a[d] * b[d];
                    a_square += a[d] * a[d];
                    b_square += b[d] * b[d];
                }
                product = product * inverse_norm(a_square) * inverse_norm(b_square);
            } else {
                FOR_DIM("omp simd reduction(+ : product)") product += a[d] * b[d];
            }
            *ROW(out, i, j) = product;
        }
}

/* out = weight[i, j] x */
void hrr_weigh(Rows x, Rows weight, Rows out, i64 outer, i64 inner, i64 dim, i64 threads) {
    FOR_ALL_ROWS
    for (i64 i = 0; i < outer; i++)
        for (i64 j = 0; j < inner; j++) {
            const float *a = ROW(x, i, j);
            float *o = ROW(out, i, j), w = *ROW(weight, i, j);
            FOR_DIM("omp simd") o[d] = w * a[d];
        }
}

/* grad_x = weight[i, j] grad_x + the gradient of x, and grad_y = that of y, given that of cosine(x, y), grad[i, j]. */
void hrr_gradient(Rows grad, Rows weight, Rows x, Rows y, Rows grad_x, Rows grad_y, i64 outer, i64 inner, i64 dim,
                  i64 threads) {
    FOR_ALL_ROWS
    for (i64 i = 0; i < outer; i++)
        for (i64 j = 0; j < inner; j++) {
            const float *a = ROW(x, i, j), *b = ROW(y, i, j);
            float *da = ROW(grad_x, i, j), *db = ROW(grad_y, i, j), w = *ROW(weight, i, j), g = *ROW(grad, i, j);
            float product = 0, a_square = 0, b_square = 0;
            FOR_DIM("omp simd reduction(+ : product, a_square, b_square)") {
                product += a[d] * b[d];
                a_square += a[d] * a[d];
                b_square += b[d] * b[d];
            }
            float a_inverse = inverse_norm(a_square), b_inverse = inverse_norm(b_square);
            float cos = product * a_inverse * b_inverse, across = g * a_inverse * b_inverse;
            float along_a = g * cos * a_inverse * a_inverse, along_b = g * cos * b_inverse * b_inverse;
            FOR_DIM("omp simd") {
                float old = da[d];
                da[d] = w * old + across * b[d] - along_a * a[d];
                db[d] = across * a[d] - along_b * b[d];
            }
        }
}
