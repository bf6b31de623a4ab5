/* The passes over tokens of the folded HRR layer, on a CPU, in float32: attention/hrr/native.py calls them.

   Each takes tiles of tokens through all that a pass does with them while they are in a core's cache. What sums over
   tokens is summed by each thread for itself, over the same tiles in every call, and then over the threads.

   Legend: N tokens of E channels, in H heads; x has C channels, E or, with a last one of ones, E + 1. */

#include "../native.h"

#define TILE 48 /* tokens; a multiple of ROWS and of STEPS */

/* Field by field as _Layer in native.py; every pass takes what it needs. */
typedef struct {
    const float *x, *grad_out;    /* (N, E) */
    const uint8_t *mask;          /* (N), 1 = a token that counts as zeros; or NULL */
    const float *wv, *wr;         /* (E, C) */
    const float *wo;              /* (E, E) */
    const float *matrix;          /* (C, E) */
    const float *delta;           /* (H) */
    float *weights;               /* (H, N) */
    float *values;                /* (N, E) */
    float *retrieved;             /* (N, E), or NULL where it is not kept */
    float *out;                   /* (N, E) */
    float *gram;                  /* (C, C) */
    float *grad_wv, *grad_wr;     /* (E, C) */
    float *grad_wo;               /* (E, E) */
    float *scratch;               /* `hrr_scratch` */
    i64 tokens, dim, channels, heads;
    i64 known;                    /* whether `values` holds the values already */
    i64 threads;
} Layer;

/* What a thread works with. The weights are all threads' own together. */
typedef struct {
    float *weights[4]; /* right factors of up to C steps */
    float *tokens;     /* (TILE, tokens_row) */
    float *tiles[4];   /* (TILE, row) */
    float *left, *turned, *right; /* a tile as these factors */
    float *sums[2];    /* (C / PANEL, C, PANEL), with as many rows as make whole ROWS */
    i64 tokens_row, row, sums_panel;
    i64 stride; /* from the sums of one thread to those of the next */
} Work;

static i64 sums_size(i64 channels) { return round_up(round_up(channels, ROWS) * round_up(channels, PANEL), 16); }

static i64 thread_size(i64 dim, i64 channels) {
    i64 factors = whole_steps(channels) + round_up(channels, ROWS) + round_up(channels, PANEL);
    return TILE * (row_of(channels) + 4 * row_of(dim) + factors) + 8 * 16 + 2 * sums_size(channels);
}

static i64 weights_size(i64 dim, i64 channels) { return round_up(round_up(dim, PANEL) * whole_steps(channels), 16); }

/* Floats of scratch memory. */
i64 hrr_scratch(i64 dim, i64 channels, i64 threads) {
    return 4 * weights_size(dim, channels) + threads * thread_size(dim, channels);
}

static Work prepare(const Layer *l, int zero_sums) {
    Work w = {.tokens_row = row_of(l->channels), .row = row_of(l->dim)};
    w.sums_panel = round_up(l->channels, ROWS) * PANEL;
    float *scratch = l->scratch;
    w.stride = thread_size(l->dim, l->channels);
    for (int i = 0; i < 4; i++) w.weights[i] = take(&scratch, weights_size(l->dim, l->channels));
    scratch += omp_get_thread_num() * w.stride;
    for (int i = 0; i < 2; i++) w.sums[i] = take(&scratch, sums_size(l->channels));
    w.tokens = take(&scratch, TILE * w.tokens_row);
    for (int i = 0; i < 4; i++) w.tiles[i] = take(&scratch, TILE * w.row);
    w.left = take(&scratch, TILE * whole_steps(l->channels));
    w.turned = take(&scratch, TILE * round_up(l->channels, ROWS));
    w.right = take(&scratch, TILE * round_up(l->channels, PANEL));
    for (int i = 0; i < zero_sums; i++) memset(w.sums[i], 0, 4 * sums_size(l->channels));
    return w;
}

/* A matrix b (depth, columns) as a right factor, with element (s, j) at b[s·b_step + j·b_column].
   All threads share the work and wait for each other. */
static void pack_weights(const float *b, i64 b_step, i64 b_column, i64 depth, i64 columns, float *out) {
    i64 steps = whole_steps(depth);
#pragma omp for
    for (i64 first = 0; first < columns; first += PANEL)
        for (i64 s = 0; s < steps; s++)
            for (i64 j = first; j < first + PANEL; j++)
                out[first * steps + s * PANEL + j - first] =
                    j < columns && s < depth ? b[s * b_step + j * b_column] : 0;
}

/* A tile as a left factor. */
static const float *as_left(const Work *w, const float *tile, i64 row, i64 count, i64 columns) {
    i64 steps = whole_steps(columns);
    for (i64 i = 0; i < count; i++)
        pack_left(tile + i * row, columns, 1, w->left + i / ROWS * ROWS * steps + i % ROWS * STEPS);
    return w->left;
}

/* The factors of aᵀ b for tiles a and b (count, row). */
static const float *as_turned(const Work *w, const float *tile, i64 row, i64 count, i64 columns) {
    i64 steps = whole_steps(count);
    for (i64 i = 0; i < steps; i++)
        pack_right(i < count ? tile + i * row : NULL, columns, steps, ROWS, w->turned + i * ROWS);
    return w->turned;
}

static const float *as_right(const Work *w, const float *tile, i64 row, i64 count, i64 columns) {
    i64 steps = whole_steps(count);
    for (i64 i = 0; i < steps; i++)
        pack_right(i < count ? tile + i * row : NULL, columns, steps, PANEL, w->right + i * PANEL);
    return w->right;
}

/* A tile (count, row) = a b for a of `depth` columns, or += */
static void multiply_tile(i64 count, i64 columns, i64 depth, const float *left, const float *weights, float *tile,
                          i64 row, int add) {
    multiply(count, columns, whole_steps(depth), left, weights, tile, row, PANEL, add);
}

/* sums (rows, columns) += aᵀ b over `count` tokens */
static void add_product(const Work *w, i64 count, i64 rows, i64 columns, const float *turned, const float *right,
                        float *sums) {
    i64 steps = whole_steps(count);
    multiply_turned(rows, columns, steps, turned, ROWS * steps, ROWS, right, sums, PANEL, w->sums_panel, 1);
}

/* The threads' sums together, to out (rows, columns); all threads share the work. */
static void add_threads(const Work *w, int which, i64 rows, i64 columns, float *out) {
    const float *first = w->sums[which] - omp_get_thread_num() * w->stride;
    i64 threads = omp_get_num_threads();
#pragma omp barrier
#pragma omp for
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < columns; j++) {
            float sum = 0;
            for (i64 t = 0; t < threads; t++)
                sum += first[t * w->stride + j / PANEL * w->sums_panel + i * PANEL + j % PANEL];
            out[i * columns + j] = sum;
        }
}

static void load_tokens(const Layer *l, const Work *w, i64 start, i64 count) {
    for (i64 i = 0; i < count; i++) {
        float *row = w->tokens + i * w->tokens_row;
        memset(row + l->dim, 0, 4 * (w->tokens_row - l->dim));
        if (l->mask && l->mask[start + i]) {
            memset(row, 0, 4 * l->dim);
            continue;
        }
        memcpy(row, l->x + (start + i) * l->dim, 4 * l->dim);
        if (l->channels > l->dim) row[l->dim] = 1;
    }
}

static void load(const float *x, i64 start, i64 count, i64 dim, float *tile, i64 row) {
    for (i64 i = 0; i < count; i++) memcpy(tile + i * row, x + (start + i) * dim, 4 * dim);
}

static void store(const float *tile, i64 row, i64 start, i64 count, i64 dim, float *x) {
    for (i64 i = 0; i < count; i++) memcpy(x + (start + i) * dim, tile + i * row, 4 * dim);
}

/* Every head of a tile (count, row) times its weight. */
static void weigh(const Layer *l, i64 start, i64 count, float *tile, i64 row) {
    i64 size = l->dim / l->heads;
    for (i64 i = 0; i < count; i++)
        for (i64 h = 0; h < l->heads; h++) {
            float weight = l->weights[h * l->tokens + start + i], *x = tile + i * row + h * size;
            for (i64 d = 0; d < size; d++) x[d] *= weight;
        }
}

/* As `inverse_norm` in cosine.py: a norm whose square is no normal number counts as 0, and has the inverse 0. */
INLINE float inverse_norm(float square) {
    float norm = sqrtf(square);
    return norm <= 1e-18f ? 0 : 1 / norm;
}

#define FOR_TILES for (i64 start = 0; start < l->tokens; start += TILE)
#define COUNT least(TILE, l->tokens - start)

/* gram = Σ x xᵀ */
void hrr_gram(const Layer *l) {
    i64 channels = l->channels;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l, 1);
#pragma omp for schedule(static)
        FOR_TILES {
            i64 count = COUNT;
            load_tokens(l, &w, start, count);
            const float *turned = as_turned(&w, w.tokens, w.tokens_row, count, channels);
            const float *right = as_right(&w, w.tokens, w.tokens_row, count, channels);
            for (i64 j = 0; j < channels; j += PANEL) /* the rows that reach the diagonal */
                add_product(&w, count, least(j + PANEL, channels), least(PANEL, channels - j), turned,
                            right + j * whole_steps(count), w.sums[0] + j / PANEL * w.sums_panel);
        }
        add_threads(&w, 0, channels, channels, l->gram);
#pragma omp for
        for (i64 i = 0; i < channels; i++)
            for (i64 j = 0; j < i; j++) l->gram[i * channels + j] = l->gram[j * channels + i];
    }
}

/* values = x Wvᵀ, retrieved = x Wrᵀ where it is kept, and weights = exp(their cosines) */
void hrr_retrieve(const Layer *l) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l, 0);
        pack_weights(l->wv, 1, channels, channels, dim, w.weights[0]);
        pack_weights(l->wr, 1, channels, channels, dim, w.weights[1]);
#pragma omp for schedule(dynamic)
        FOR_TILES {
            i64 count = COUNT;
            load_tokens(l, &w, start, count);
            const float *x = as_left(&w, w.tokens, w.tokens_row, count, channels);
            for (int i = 0; i < 2; i++) multiply_tile(count, dim, channels, x, w.weights[i], w.tiles[i], w.row, 0);
            store(w.tiles[0], w.row, start, count, dim, l->values);
            if (l->retrieved) store(w.tiles[1], w.row, start, count, dim, l->retrieved);
            for (i64 h = 0; h < l->heads; h++)
                for (i64 i = 0; i < count; i++) {
                    const float *v = w.tiles[0] + i * w.row + h * size, *r = w.tiles[1] + i * w.row + h * size;
                    float product = 0, v_square = 0, r_square = 0;
#pragma omp simd reduction(+ : product, v_square, r_square)
                    for (i64 d = 0; d < size; d++) {
                        product += v[d] * r[d];
                        v_square += v[d] * v[d];
                        r_square += r[d] * r[d];
                    }
                    float cosine = product * inverse_norm(v_square) * inverse_norm(r_square);
                    l->weights[h * l->tokens + start + i] = exp2_of_one(LOG2_E * cosine);
                }
        }
    }
}

/* out = (weights ∘ values) Woᵀ; out may be values */
void hrr_project(const Layer *l) {
    i64 dim = l->dim;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l, 0);
        pack_weights(l->wo, 1, dim, dim, dim, w.weights[0]);
#pragma omp for schedule(dynamic)
        FOR_TILES {
            i64 count = COUNT;
            load(l->values, start, count, dim, w.tiles[0], w.row);
            weigh(l, start, count, w.tiles[0], w.row);
            multiply_tile(count, dim, dim, as_left(&w, w.tiles[0], w.row, count, dim), w.weights[0], w.tiles[1], w.row,
                          0);
            store(w.tiles[1], w.row, start, count, dim, l->out);
        }
    }
}

/* values = x Wvᵀ unless known, and grad_wo = grad_outᵀ (weights ∘ values) */
void hrr_project_gradient(const Layer *l) {
    i64 dim = l->dim, channels = l->channels;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l, 1);
        if (!l->known) pack_weights(l->wv, 1, channels, channels, dim, w.weights[0]);
#pragma omp for schedule(static)
        FOR_TILES {
            i64 count = COUNT;
            if (l->known)
                load(l->values, start, count, dim, w.tiles[0], w.row);
            else {
                load_tokens(l, &w, start, count);
                const float *x = as_left(&w, w.tokens, w.tokens_row, count, channels);
                multiply_tile(count, dim, channels, x, w.weights[0], w.tiles[0], w.row, 0);
                store(w.tiles[0], w.row, start, count, dim, l->values);
            }
            weigh(l, start, count, w.tiles[0], w.row);
            load(l->grad_out, start, count, dim, w.tiles[1], w.row);
            add_product(&w, count, dim, dim, as_turned(&w, w.tiles[1], w.row, count, dim),
                        as_right(&w, w.tiles[0], w.row, count, dim), w.sums[0]);
        }
        add_threads(&w, 0, dim, dim, l->grad_wo);
    }
}

/* One head of one token: dv becomes the gradient of its value v, and dr that of what it retrieved, r. */
INLINE void differentiate_cosine(float weight, float delta, i64 size, const float *v, const float *r, float *dv,
                                 float *dr) {
    float gain = 0, product = 0, v_square = 0, r_square = 0;
#pragma omp simd reduction(+ : gain, product, v_square, r_square)
    for (i64 d = 0; d < size; d++) {
        gain += v[d] * dv[d];
        product += v[d] * r[d];
        v_square += v[d] * v[d];
        r_square += r[d] * r[d];
    }
    float v_inverse = inverse_norm(v_square), r_inverse = inverse_norm(r_square), grad = (gain - delta) * weight;
    float cosine = product * v_inverse * r_inverse, across = grad * v_inverse * r_inverse;
    float along_v = grad * cosine * v_inverse * v_inverse, along_r = grad * cosine * r_inverse * r_inverse;
#pragma omp simd
    for (i64 d = 0; d < size; d++) {
        dv[d] = weight * dv[d] + across * r[d] - along_v * v[d];
        dr[d] = across * v[d] - along_r * r[d];
    }
}

/* grad_wr, grad_wv, and out = the gradient of x but for what the Gram matrix contributes; out may be values */
void hrr_retrieve_gradient(const Layer *l) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l, 2);
        float *v = w.tiles[0], *r = w.tiles[1], *dv = w.tiles[2], *dr = w.tiles[3];
        if (!l->retrieved) pack_weights(l->wr, 1, channels, channels, dim, w.weights[0]);
        pack_weights(l->wo, dim, 1, dim, dim, w.weights[1]);
        pack_weights(l->wr, channels, 1, dim, dim, w.weights[2]);
        pack_weights(l->wv, channels, 1, dim, dim, w.weights[3]);
#pragma omp for schedule(static)
        FOR_TILES {
            i64 count = COUNT;
            load_tokens(l, &w, start, count);
            load(l->values, start, count, dim, v, w.row);
            if (l->retrieved)
                load(l->retrieved, start, count, dim, r, w.row);
            else
                multiply_tile(count, dim, channels, as_left(&w, w.tokens, w.tokens_row, count, channels), w.weights[0], r,
                              w.row, 0);
            load(l->grad_out, start, count, dim, dr, w.row);
            multiply_tile(count, dim, dim, as_left(&w, dr, w.row, count, dim), w.weights[1], dv, w.row, 0);
            for (i64 i = 0; i < count; i++)
                for (i64 h = 0; h < l->heads; h++) {
                    i64 at = i * w.row + h * size;
                    differentiate_cosine(l->weights[h * l->tokens + start + i], l->delta[h], size, v + at, r + at,
                                         dv + at, dr + at);
                }
            const float *x = as_right(&w, w.tokens, w.tokens_row, count, channels), *grads[2] = {dr, dv};
            for (int i = 0; i < 2; i++) {
                add_product(&w, count, dim, channels, as_turned(&w, grads[i], w.row, count, dim), x, w.sums[i]);
                multiply_tile(count, dim, dim, as_left(&w, grads[i], w.row, count, dim), w.weights[2 + i], v, w.row, i);
            }
            store(v, w.row, start, count, dim, l->out);
        }
        add_threads(&w, 0, dim, channels, l->grad_wr);
        add_threads(&w, 1, dim, channels, l->grad_wv);
    }
}

/* out += x matrix */
void hrr_add_product(const Layer *l) {
    i64 dim = l->dim, channels = l->channels;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l, 0);
        pack_weights(l->matrix, dim, 1, channels, dim, w.weights[0]);
#pragma omp for schedule(dynamic)
        FOR_TILES {
            i64 count = COUNT;
            load_tokens(l, &w, start, count);
            load(l->out, start, count, dim, w.tiles[0], w.row);
            const float *x = as_left(&w, w.tokens, w.tokens_row, count, channels);
            multiply_tile(count, dim, channels, x, w.weights[0], w.tiles[0], w.row, 1);
            store(w.tiles[0], w.row, start, count, dim, l->out);
        }
    }
}
