/* The passes over tokens of the folded HRR layer, on a CPU, in float32, and the products of C x C matrices between them:
   attention/hrr/native.py calls them.

   Each pass takes tiles of tokens through all that a pass does with them while they are in a core's cache. For what sums over
   tokens, every thread has a run of tiles, the same in every call: it sums over those of each batch row in it, and where
   a row is in the runs of several threads, their sums are added up.

   Legend: B batch rows of N tokens of E channels, in H heads; x has C channels, E or, with a last one of ones, E + 1. */

#include "../native.h"

#define TILE 48 /* tokens; a multiple of ROWS and of STEPS */

/* Field by field as _Layer in native.py; every pass takes what it needs. */
typedef struct {
    const float *x, *grad_out;    /* (B, N, E) */
    const uint8_t *mask;          /* (B, N), 1 = a token that counts as zeros; or NULL */
    const float *wq, *wk, *wv;    /* (E, C) */
    const float *wo;              /* (E, E) */
    float *wr;                    /* (B, E, C) */
    float *delta;                 /* (B, H) */
    float *weights;               /* (B, H, N) */
    float *values;                /* (B, N, E) */
    float *retrieved;             /* (B, N, E), or NULL where it is not kept */
    float *out;                   /* (B, N, E) */
    float *gram, *grad_gram;      /* (B, C, C) */
    float *keys_gram;             /* (B, E, C) */
    float *unbinding;             /* (B, E, D), D = E / H */
    float *bound_values;          /* (B, E, C) */
    float *grad_wq, *grad_wk;     /* (B, E, C) */
    float *grad_wr, *grad_wv;     /* (B, E, C) */
    float *grad_wo;               /* (B, E, E) */
    float *scratch;               /* `hrr_scratch` */
    i64 rows, tokens, dim, channels, heads;
    i64 known;                    /* whether `values` holds the values already */
    i64 threads;
} Layer;

/* The layer of one batch row. */
static Layer at_row(const Layer *l, i64 row) {
    Layer r = *l;
    i64 size = row * l->tokens * l->dim, weights = row * l->dim * l->channels, gram = row * l->channels * l->channels;
    r.x += size, r.grad_out += size, r.values += size, r.out += size;
    if (r.mask) r.mask += row * l->tokens;
    if (r.retrieved) r.retrieved += size;
    r.wr += weights, r.delta += row * l->heads, r.weights += row * l->heads * l->tokens;
    r.gram += gram, r.grad_gram += gram, r.keys_gram += weights, r.bound_values += weights;
    r.unbinding += row * l->dim * (l->dim / l->heads);
    r.grad_wq += weights, r.grad_wk += weights, r.grad_wr += weights, r.grad_wv += weights;
    r.grad_wo += row * l->dim * l->dim;
    return r;
}

/* What a thread works with. */
typedef struct {
    float *shared[2];  /* right factors of up to C steps: all threads' own together */
    float *weights[2]; /* and those of a batch row */
    float *tokens;     /* (TILE, row) */
    float *tiles[4];   /* (TILE, row) */
    float *left, *turned, *right; /* a tile as these factors */
    float *parts[2][2]; /* each of two sums over its tiles of its first batch row, and of another one: (C / PANEL, C,
                           PANEL), with as many rows as make whole ROWS */
    i64 row, sums_panel;
    i64 stride;        /* from what is one thread's to the same of the next */
    i64 row_tiles, all_tiles; /* tiles of a batch row, of all */
    i64 thread, threads;
} Work;

static i64 sums_size(i64 channels) { return round_up(round_up(channels, ROWS) * round_up(channels, PANEL), 16); }

static i64 weights_size(i64 channels) { return round_up(round_up(channels, PANEL) * whole_steps(channels), 16); }

static i64 thread_size(i64 channels) {
    i64 factors = whole_steps(channels) + round_up(channels, ROWS) + round_up(channels, PANEL);
    i64 tiles = TILE * (5 * row_of(channels) + factors) + 8 * 16;
    return tiles + 2 * weights_size(channels) + 4 * sums_size(channels);
}

/* Floats of scratch memory. */
i64 hrr_scratch(i64 channels, i64 threads) { return 2 * weights_size(channels) + threads * thread_size(channels); }

static Work prepare(const Layer *l) {
    Work w = {.row = row_of(l->channels)};
    w.sums_panel = round_up(l->channels, ROWS) * PANEL;
    float *scratch = l->scratch;
    w.stride = thread_size(l->channels);
    w.row_tiles = (l->tokens + TILE - 1) / TILE, w.all_tiles = l->rows * w.row_tiles;
    w.thread = omp_get_thread_num(), w.threads = omp_get_num_threads();
    for (int i = 0; i < 2; i++) w.shared[i] = take(&scratch, weights_size(l->channels));
    scratch += w.thread * w.stride;
    for (int i = 0; i < 4; i++) w.parts[i / 2][i % 2] = take(&scratch, sums_size(l->channels));
    for (int i = 0; i < 2; i++) w.weights[i] = take(&scratch, weights_size(l->channels));
    w.tokens = take(&scratch, TILE * w.row);
    for (int i = 0; i < 4; i++) w.tiles[i] = take(&scratch, TILE * w.row);
    w.left = take(&scratch, TILE * whole_steps(l->channels));
    w.turned = take(&scratch, TILE * round_up(l->channels, ROWS));
    w.right = take(&scratch, TILE * round_up(l->channels, PANEL));
    return w;
}

/* A panel of columns of a matrix b (depth, columns), with element (s, j) at b[s·b_step + j·b_column]. */
static void pack_weights_panel(const float *b, i64 b_step, i64 b_column, i64 depth, i64 columns, i64 first,
                               float *out) {
    i64 steps = whole_steps(depth), width = least(PANEL, columns - first);
    out += first * steps;
    b += first * b_column;
    if (width < PANEL)
        memset(out, 0, 4 * PANEL * steps);
    else
        memset(out + depth * PANEL, 0, 4 * PANEL * (steps - depth));
    if (b_column == 1 && width == PANEL)
        for (i64 s = 0; s < depth; s++) memcpy(out + s * PANEL, b + s * b_step, 4 * PANEL);
    else
        for (i64 j = 0; j < width; j++)
            for (i64 s = 0; s < depth; s++) out[s * PANEL + j] = b[s * b_step + j * b_column];
}

/* Such a matrix as a right factor. */
static void pack_weights(const float *b, i64 b_step, i64 b_column, i64 depth, i64 columns, float *out) {
    for (i64 first = 0; first < columns; first += PANEL)
        pack_weights_panel(b, b_step, b_column, depth, columns, first, out);
}

/* The same; all threads share the work and wait for each other. */
static void pack_shared(const float *b, i64 b_step, i64 b_column, i64 depth, i64 columns, float *out) {
#pragma omp for
    for (i64 first = 0; first < columns; first += PANEL)
        pack_weights_panel(b, b_step, b_column, depth, columns, first, out);
}

/* Some tokens: `count` rows, one every `row` floats. */
typedef struct {
    const float *x;
    i64 row, count;
} Tile;

static Tile tile_of(const float *x, i64 row, i64 count) { return (Tile){x, row, count}; }

/* A tile as a left factor. */
static const float *as_left(const Work *w, Tile t, i64 columns) {
    i64 steps = whole_steps(columns);
    for (i64 i = 0; i < t.count; i++)
        pack_left(t.x + i * t.row, columns, 1, w->left + i / ROWS * ROWS * steps + i % ROWS * STEPS);
    return w->left;
}

/* The factors of aᵀ b for tiles a and b. */
static const float *as_turned(const Work *w, Tile t, i64 columns) {
    i64 steps = whole_steps(t.count);
    for (i64 i = 0; i < steps; i++)
        pack_right(i < t.count ? t.x + i * t.row : NULL, columns, steps, ROWS, w->turned + i * ROWS);
    return w->turned;
}

static const float *as_right(const Work *w, Tile t, i64 columns) {
    i64 steps = whole_steps(t.count);
    for (i64 i = 0; i < steps; i++)
        pack_right(i < t.count ? t.x + i * t.row : NULL, columns, steps, PANEL, w->right + i * PANEL);
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

/* The first tile of a thread's run, and behind the last one that of the next thread's. */
static i64 run_start(const Work *w, i64 thread) { return w->all_tiles * thread / w->threads; }

static float *sums_of_row(const Work *w, int which, i64 thread, i64 row) {
    i64 first_row = run_start(w, thread) / w->row_tiles;
    return w->parts[which][row != first_row] + (thread - w->thread) * w->stride;
}

/* This thread's sums over a batch row, before the first tile. */
static float *start_row(const Work *w, int which, i64 row, i64 channels) {
    return memset(sums_of_row(w, which, w->thread, row), 0, 4 * sums_size(channels));
}

/* Row i of sums to out, or added to it. */
static void put_sums(const Work *w, const float *sums, i64 i, i64 columns, int add, float *out) {
    for (i64 j = 0; j < columns; j++)
        out[j] = (add ? out[j] : 0) + sums[j / PANEL * w->sums_panel + i * PANEL + j % PANEL];
}

/* The sums (rows, columns) of all batch rows to out, for those that are in the runs of several threads after all have
   summed; the others come from `put_own_row`. All threads share the work. */
static void put_shared_rows(const Work *w, int which, i64 rows, i64 columns, float *out) {
#pragma omp barrier
    for (i64 thread = 1; thread < w->threads; thread++) {
        i64 row = run_start(w, thread) / w->row_tiles, first = thread - 1, last = thread;
        if (run_start(w, thread) % w->row_tiles == 0 || run_start(w, first) > row * w->row_tiles) continue;
        while (last + 1 < w->threads && run_start(w, last + 1) < (row + 1) * w->row_tiles) last++;
#pragma omp for
        for (i64 i = 0; i < rows; i++)
            for (i64 t = first; t <= last; t++)
                put_sums(w, sums_of_row(w, which, t, row), i, columns, t > first, out + (row * rows + i) * columns);
    }
}

/* Those of a batch row to out, if it is this thread's alone. */
static void put_own_row(const Work *w, int which, i64 row, i64 rows, i64 columns, float *out) {
    if (run_start(w, w->thread) > row * w->row_tiles || run_start(w, w->thread + 1) < (row + 1) * w->row_tiles) return;
    for (i64 i = 0; i < rows; i++)
        put_sums(w, sums_of_row(w, which, w->thread, row), i, columns, 0, out + (row * rows + i) * columns);
}

/* Tokens of x with all C channels, and zeros for masked ones. */
static Tile tokens_at(const Layer *l, const Work *w, i64 start, i64 count) {
    const float *x = l->x + start * l->dim;
    if (!l->mask && l->channels == l->dim) return tile_of(x, l->dim, count);
    for (i64 i = 0; i < count; i++, x += l->dim) {
        float *row = w->tokens + i * w->row;
        int counts = !l->mask || !l->mask[start + i];
        for (i64 d = 0; d < l->dim; d++) row[d] = counts ? x[d] : 0;
        if (l->channels > l->dim) row[l->dim] = counts;
    }
    return tile_of(w->tokens, w->row, count);
}

static void store(const float *tile, i64 row, i64 start, i64 count, i64 dim, float *x) {
    for (i64 i = 0; i < count; i++) memcpy(x + (start + i) * dim, tile + i * row, 4 * dim);
}

/* The values, every head times its weight. */
static Tile weighed_at(const Layer *l, const Work *w, i64 start, i64 count) {
    i64 size = l->dim / l->heads;
    for (i64 i = 0; i < count; i++)
        for (i64 h = 0; h < l->heads; h++) {
            const float *v = l->values + (start + i) * l->dim + h * size;
            float weight = l->weights[h * l->tokens + start + i], *out = w->tiles[0] + i * w->row + h * size;
            for (i64 d = 0; d < size; d++) out[d] = weight * v[d];
        }
    return tile_of(w->tiles[0], w->row, count);
}

/* As `inverse_norm` in cosine.py: a norm whose square is no normal number counts as 0, and has the inverse 0. */
INLINE float inverse_norm(float square) {
    float norm = sqrtf(square);
    return norm <= 1e-18f ? 0 : 1 / norm;
}

#define THREADS num_threads(most(1, least(l->threads, l->rows * ((l->tokens + TILE - 1) / TILE)))) /* each with work */
#define FOR_ROWS_OF_RUN                                   \
    for (i64 row = run_start(&w, w.thread) / w.row_tiles; \
         row * w.row_tiles < run_start(&w, w.thread + 1); row++)
#define FOR_TILES_OF_RUN                                              \
    for (i64 tile = most(run_start(&w, w.thread), row * w.row_tiles); \
         tile < least(run_start(&w, w.thread + 1), (row + 1) * w.row_tiles); tile++)
#define FOR_ALL_TILES for (i64 tile = 0; tile < w.all_tiles; tile++)

/* gram = Σ x xᵀ */
void hrr_gram(const Layer *l) {
    i64 channels = l->channels;
#pragma omp parallel THREADS
    {
        Work w = prepare(l);
        FOR_ROWS_OF_RUN {
            Layer r = at_row(l, row);
            float *sums = start_row(&w, 0, row, channels);
            FOR_TILES_OF_RUN {
                i64 start = tile % w.row_tiles * TILE, count = least(TILE, l->tokens - start);
                Tile x = tokens_at(&r, &w, start, count);
                const float *turned = as_turned(&w, x, channels), *right = as_right(&w, x, channels);
                for (i64 j = 0; j < channels; j += PANEL) /* the rows that reach the diagonal */
                    add_product(&w, count, least(j + PANEL, channels), least(PANEL, channels - j), turned,
                                right + j * whole_steps(count), sums + j / PANEL * w.sums_panel);
            }
            put_own_row(&w, 0, row, channels, channels, l->gram);
        }
        put_shared_rows(&w, 0, channels, channels, l->gram);
#pragma omp for
        for (i64 row = 0; row < l->rows; row++) {
            float *gram = l->gram + row * channels * channels;
            for (i64 i = 0; i < channels; i++)
                for (i64 j = 0; j < i; j++) gram[i * channels + j] = gram[j * channels + i];
        }
    }
}

/* values = x Wvᵀ, retrieved = x Wrᵀ where it is kept, and weights = exp(their cosines) */
void hrr_retrieve(const Layer *l) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads;
#pragma omp parallel THREADS
    {
        Work w = prepare(l);
        i64 packed = -1;
        pack_shared(l->wv, 1, channels, channels, dim, w.shared[0]);
#pragma omp for schedule(dynamic)
        FOR_ALL_TILES {
            i64 row = tile / w.row_tiles, start = tile % w.row_tiles * TILE, count = least(TILE, l->tokens - start);
            Layer r = at_row(l, row);
            if (row != packed) pack_weights(r.wr, 1, channels, channels, dim, w.weights[0]);
            packed = row;
            const float *x = as_left(&w, tokens_at(&r, &w, start, count), channels);
            multiply_tile(count, dim, channels, x, w.shared[0], w.tiles[0], w.row, 0);
            multiply_tile(count, dim, channels, x, w.weights[0], w.tiles[1], w.row, 0);
            store(w.tiles[0], w.row, start, count, dim, r.values);
            if (r.retrieved) store(w.tiles[1], w.row, start, count, dim, r.retrieved);
            for (i64 h = 0; h < l->heads; h++)
                for (i64 i = 0; i < count; i++) {
                    const float *v = w.tiles[0] + i * w.row + h * size, *retrieved = w.tiles[1] + i * w.row + h * size;
                    float product = 0, v_square = 0, r_square = 0;
#pragma omp simd reduction(+ : product, v_square, r_square)
                    for (i64 d = 0; d < size; d++) {
                        product += v[d] * retrieved[d];
                        v_square += v[d] * v[d];
                        r_square += retrieved[d] * retrieved[d];
                    }
                    float cosine = product * inverse_norm(v_square) * inverse_norm(r_square);
                    r.weights[h * l->tokens + start + i] = exp2_of_one(LOG2_E * cosine);
                }
        }
    }
}

/* out = (weights ∘ values) Woᵀ; out may be values */
void hrr_project(const Layer *l) {
    i64 dim = l->dim;
#pragma omp parallel THREADS
    {
        Work w = prepare(l);
        pack_shared(l->wo, 1, dim, dim, dim, w.shared[0]);
#pragma omp for schedule(dynamic)
        FOR_ALL_TILES {
            i64 row = tile / w.row_tiles, start = tile % w.row_tiles * TILE, count = least(TILE, l->tokens - start);
            Layer r = at_row(l, row);
            const float *weighed = as_left(&w, weighed_at(&r, &w, start, count), dim);
            multiply_tile(count, dim, dim, weighed, w.shared[0], w.tiles[1], w.row, 0);
            store(w.tiles[1], w.row, start, count, dim, r.out);
        }
    }
}

/* values = x Wvᵀ unless known, grad_wo = grad_outᵀ (weights ∘ values), and delta = Σ grad_wo ∘ Wo over a head's columns */
void hrr_project_gradient(const Layer *l) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads;
#pragma omp parallel THREADS
    {
        Work w = prepare(l);
        if (!l->known) pack_shared(l->wv, 1, channels, channels, dim, w.shared[0]);
        FOR_ROWS_OF_RUN {
            Layer r = at_row(l, row);
            float *sums = start_row(&w, 0, row, channels);
            FOR_TILES_OF_RUN {
                i64 start = tile % w.row_tiles * TILE, count = least(TILE, l->tokens - start);
                if (!l->known) {
                    const float *x = as_left(&w, tokens_at(&r, &w, start, count), channels);
                    multiply_tile(count, dim, channels, x, w.shared[0], w.tiles[1], w.row, 0);
                    store(w.tiles[1], w.row, start, count, dim, r.values);
                }
                Tile grad = tile_of(r.grad_out + start * dim, dim, count);
                add_product(&w, count, dim, dim, as_turned(&w, grad, dim),
                            as_right(&w, weighed_at(&r, &w, start, count), dim), sums);
            }
            put_own_row(&w, 0, row, dim, dim, l->grad_wo);
        }
        put_shared_rows(&w, 0, dim, dim, l->grad_wo);
#pragma omp for
        for (i64 i = 0; i < l->rows * l->heads; i++) {
            const float *grad = l->grad_wo + i / l->heads * dim * dim;
            i64 first = i % l->heads * size;
            float delta = 0;
            for (i64 e = 0; e < dim; e++) {
                float sum = 0;
                for (i64 d = first; d < first + size; d++) sum += grad[e * dim + d] * l->wo[e * dim + d];
                delta += sum;
            }
            l->delta[i] = delta;
        }
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
#pragma omp parallel THREADS
    {
        Work w = prepare(l);
        float *dr = w.tiles[0], *dv = w.tiles[1], *grads[2] = {dr, dv}, *grad_x = w.tiles[3];
        pack_shared(l->wo, dim, 1, dim, dim, w.shared[0]);
        pack_shared(l->wv, channels, 1, dim, dim, w.shared[1]);
        FOR_ROWS_OF_RUN {
            Layer r = at_row(l, row);
            float *sums[2] = {start_row(&w, 0, row, channels), start_row(&w, 1, row, channels)};
            if (!r.retrieved) pack_weights(r.wr, 1, channels, channels, dim, w.weights[0]);
            pack_weights(r.wr, channels, 1, dim, dim, w.weights[1]);
            FOR_TILES_OF_RUN {
                i64 start = tile % w.row_tiles * TILE, count = least(TILE, l->tokens - start);
                Tile x = tokens_at(&r, &w, start, count);
                Tile v = tile_of(r.values + start * dim, dim, count);
                Tile retrieved = tile_of(r.retrieved ? r.retrieved + start * dim : w.tiles[2], dim, count);
                if (!r.retrieved) {
                    retrieved.row = w.row;
                    multiply_tile(count, dim, channels, as_left(&w, x, channels), w.weights[0], w.tiles[2], w.row, 0);
                }
                Tile grad = tile_of(r.grad_out + start * dim, dim, count);
                multiply_tile(count, dim, dim, as_left(&w, grad, dim), w.shared[0], dv, w.row, 0);
                for (i64 i = 0; i < count; i++)
                    for (i64 h = 0; h < l->heads; h++)
                        differentiate_cosine(r.weights[h * l->tokens + start + i], r.delta[h], size,
                                             v.x + i * dim + h * size, retrieved.x + i * retrieved.row + h * size,
                                             dv + i * w.row + h * size, dr + i * w.row + h * size);
                const float *right = as_right(&w, x, channels);
                for (int i = 0; i < 2; i++) {
                    Tile d = tile_of(grads[i], w.row, count);
                    add_product(&w, count, dim, channels, as_turned(&w, d, dim), right, sums[i]);
                    const float *weights = i ? w.shared[1] : w.weights[1];
                    multiply_tile(count, dim, dim, as_left(&w, d, dim), weights, grad_x, w.row, i);
                }
                store(grad_x, w.row, start, count, dim, r.out);
            }
            put_own_row(&w, 0, row, dim, channels, l->grad_wr);
            put_own_row(&w, 1, row, dim, channels, l->grad_wv);
        }
        put_shared_rows(&w, 0, dim, channels, l->grad_wr);
        put_shared_rows(&w, 1, dim, channels, l->grad_wv);
    }
}

/* out += x (grad_gram + grad_gramᵀ), its first E columns */
void hrr_add_gram_gradient(const Layer *l) {
    i64 dim = l->dim, channels = l->channels;
#pragma omp parallel THREADS
    {
        Work w = prepare(l);
        i64 packed = -1;
#pragma omp for schedule(dynamic)
        FOR_ALL_TILES {
            i64 row = tile / w.row_tiles, start = tile % w.row_tiles * TILE, count = least(TILE, l->tokens - start);
            Layer r = at_row(l, row);
            if (row != packed) {
                pack_weights(r.grad_gram, channels, 1, channels, dim, w.weights[0]);
                pack_weights(r.grad_gram, 1, channels, channels, dim, w.weights[1]);
                for (i64 i = 0; i < round_up(dim, PANEL) * whole_steps(channels); i++) w.weights[0][i] += w.weights[1][i];
            }
            packed = row;
            const float *x = as_left(&w, tokens_at(&r, &w, start, count), channels);
            for (i64 i = 0; i < count; i++)
                memcpy(w.tiles[0] + i * w.row, r.out + (start + i) * dim, 4 * dim);
            multiply_tile(count, dim, channels, x, w.weights[0], w.tiles[0], w.row, 1);
            store(w.tiles[0], w.row, start, count, dim, r.out);
        }
    }
}

/* One thread's c (rows, columns) = a b, or +=, for a (rows, depth) and b with element (s, j) at b[s·b_step + j·b_column]. */
static void matrix_product(const Work *w, i64 rows, i64 columns, i64 depth, const float *a, const float *b, i64 b_step,
                           i64 b_column, float *c, int add) {
    pack_weights(b, b_step, b_column, depth, columns, w->weights[0]);
    for (i64 i = 0; i < rows; i += TILE) {
        i64 count = least(TILE, rows - i);
        const float *left = as_left(w, tile_of(a + i * depth, depth, count), depth);
        multiply_tile(count, columns, depth, left, w->weights[0], w->tiles[0], w->row, 0);
        for (i64 k = 0; k < count; k++) {
            float *to = c + (i + k) * columns;
            const float *from = w->tiles[0] + k * w->row;
            if (add)
                for (i64 j = 0; j < columns; j++) to[j] += from[j];
            else
                memcpy(to, from, 4 * columns);
        }
    }
}

/* β[n] = Σ_i S[i, (n - i) mod D] of a matrix S (D, D), as the matrix with β[(i + n) mod D] at (i, n): `hankel` of
   `sum_of_bindings` in ops.py. */
static void unbind(const Work *w, i64 size, const float *state, float *unbinding) {
    float *bound = memset(w->tiles[0], 0, 4 * size);
    for (i64 i = 0; i < size; i++, state += size) {
        for (i64 j = 0; j < size - i; j++) bound[i + j] += state[j];
        for (i64 j = size - i; j < size; j++) bound[i + j - size] += state[j];
    }
    for (i64 i = 0; i < size; i++, unbinding += size) {
        memcpy(unbinding, bound + i, 4 * (size - i));
        memcpy(unbinding + size - i, bound, 4 * i);
    }
}

#define FOR_HEADS for (i64 head = 0; head < l->rows * l->heads; head++) /* of all batch rows */

/* keys_gram = Wk gram; of every head, unbinding M from its state keys_gram Wvᵀ, and wr = M Wq */
void hrr_retrieval(const Layer *l) {
    i64 channels = l->channels, size = l->dim / l->heads;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l);
        float *state = w.parts[0][0];
#pragma omp for schedule(dynamic)
        FOR_HEADS {
            Layer r = at_row(l, head / l->heads);
            i64 first = head % l->heads * size, at = first * channels;
            float *unbinding = r.unbinding + first * size;
            matrix_product(&w, size, channels, channels, l->wk + at, r.gram, channels, 1, r.keys_gram + at, 0);
            matrix_product(&w, size, size, channels, r.keys_gram + at, l->wv + at, 1, channels, state, 0);
            unbind(&w, size, state, unbinding);
            matrix_product(&w, size, channels, size, unbinding, l->wq + at, channels, 1, r.wr + at, 0);
        }
    }
}

/* From grad_wr, what reaches the projections through the state: grad_wq, grad_wk, grad_wv increased; and grad_gram */
void hrr_state_gradients(const Layer *l) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads, panels = (channels + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(l->threads)
    {
        Work w = prepare(l);
        float *state = w.parts[0][0], *grad_state = w.parts[0][1], *sums = w.parts[1][0];
#pragma omp for schedule(dynamic)
        FOR_HEADS {
            Layer r = at_row(l, head / l->heads);
            i64 first = head % l->heads * size, at = first * channels;
            const float *grad_wr = r.grad_wr + at;
            float *bound_values = r.bound_values + at;
            matrix_product(&w, size, channels, size, r.unbinding + first * size, grad_wr, channels, 1, r.grad_wq + at, 0);
            matrix_product(&w, size, size, channels, grad_wr, l->wq + at, 1, channels, state, 0);
            unbind(&w, size, state, grad_state);
            matrix_product(&w, size, channels, size, grad_state, l->wv + at, channels, 1, bound_values, 0);
            matrix_product(&w, size, channels, channels, bound_values, r.gram, channels, 1, r.grad_wk + at, 0);
            matrix_product(&w, size, channels, size, grad_state, r.keys_gram + at, channels, 1, r.grad_wv + at, 1);
        }
#pragma omp for
        for (i64 part = 0; part < l->rows * w.threads; part++) { /* some columns of grad_gram = Wkᵀ bound_values */
            Layer r = at_row(l, part / w.threads);
            i64 first = panels * (part % w.threads) / w.threads * PANEL;
            i64 columns = least(panels * (part % w.threads + 1) / w.threads * PANEL, channels) - first;
            memset(sums, 0, 4 * sums_size(channels));
            for (i64 e = 0; e < dim; e += TILE) {
                Tile keys = tile_of(l->wk + e * channels, channels, least(TILE, dim - e));
                Tile values = tile_of(r.bound_values + e * channels + first, channels, keys.count);
                add_product(&w, keys.count, channels, columns, as_turned(&w, keys, channels),
                            as_right(&w, values, columns), sums);
            }
            for (i64 i = 0; i < channels; i++) put_sums(&w, sums, i, columns, 0, r.grad_gram + i * channels + first);
        }
    }
}
