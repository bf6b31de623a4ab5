/* The folded HRR layer (attention/hrr/folded.py) on a CPU, in float32; attention/hrr/native.py calls it.

   Forward and backward are each one parallel region. Their passes over tokens take a tile through all that a pass does
   with it while it is in a core's cache. For what sums over tokens, the tiles are divided into runs, the same in every
   call: a thread sums over those of each batch row in a run, and where a row is in several runs, their sums are added
   up. Products of C x C matrices are divided by blocks of rows.

   Legend: B batch rows of N tokens of E channels, in H heads of D; x has C channels, E or, with a last one of ones,
   E + 1. */

#include "../native.h"

#define TILE 48  /* tokens; a multiple of ROWS */
#define BLOCK 24 /* rows of a matrix, at most TILE */
#define SHORT 4  /* a thread's share of the tiles over that of a short run */

/* Field by field as _Layer in native.py; the forward pass takes no gradients. */
typedef struct {
    const float *x, *grad_out;          /* (B, N, E) */
    const uint8_t *mask;                /* (B, N), 1 = ignored; or NULL */
    const float *wq, *wk, *wv;          /* (E, C) */
    const float *wo;                    /* (E, E) */
    float *out, *grad_x;                /* (B, N, E) */
    float *weights;                     /* (B, H, N) */
    float *gram;                        /* (B, C, C) */
    float *values;                      /* (B, N, E), or the place of out or grad_x, where they are not kept */
    float *retrieved;                   /* (B, N, E), or NULL where it is not kept */
    float *grad_wq, *grad_wk, *grad_wv; /* (B, E, C) */
    float *grad_wo;                     /* (B, E, E) */
    float *scratch;                     /* `hrr_scratch` */
    i64 rows, tokens, dim, channels, heads;
    i64 mask_superposition; /* whether ignored tokens count as zeros in the superposition */
    i64 threads;
} Layer;

/* What lies between the passes, of one batch row. */
typedef struct {
    float *keys_gram, *wr;         /* (E, C): Wk gram; the projections that retrieve */
    float *bound_values, *grad_wr; /* (E, C) */
    float *state, *grad_state;     /* (E, D): every head's */
    float *grad_gram;              /* (C, C) */
    float *delta;                  /* (H) */
} Matrices;

/* What a thread works with. */
typedef struct {
    float *shared[2];  /* right factors of up to C steps: all threads' own together */
    float *weights[2]; /* and this thread's */
    float *tokens;     /* (TILE, row) */
    float *tiles[4];   /* (TILE, row) */
    float *square;     /* C x C, in whole ROWS and PANELs */
    float *sums; /* of every run, two over its tiles of its first batch row, and two of another one, if there are others:
                    (C / PANEL, C, PANEL), with as many rows as make whole ROWS */
    i64 row, sums_panel, sums_size;
    i64 sums_rows;            /* one or two: the batch rows of a run that have sums */
    i64 row_tiles, all_tiles; /* tiles of a batch row, of all */
    i64 threads, runs;        /* for each thread a long one and a short one; a single thread has one */
} Work;

static i64 sums_size(i64 channels) {
    return round_up(round_up(channels, ROWS) * round_up(channels, PANEL), CACHE_LINE);
}

static i64 weights_size(i64 channels) { return round_up(round_up(channels, PANEL) * channels, CACHE_LINE); }

static i64 thread_size(i64 channels) {
    return 5 * TILE * row_of(channels) + CACHE_LINE + 2 * weights_size(channels) + sums_size(channels);
}

static i64 sums_rows(const Layer *l) { return least(l->rows, 2); }

static i64 matrices_size(const Layer *l) {
    i64 weights = l->dim * l->channels, state = l->dim * (l->dim / l->heads), gram = l->channels * l->channels;
    return 4 * round_up(weights, CACHE_LINE) + 2 * round_up(state, CACHE_LINE) + round_up(gram, CACHE_LINE) +
           round_up(l->heads, CACHE_LINE);
}

/* Floats of scratch memory. */
i64 hrr_scratch(const Layer *l) {
    i64 of_run = 2 * sums_rows(l) * sums_size(l->channels);
    return l->rows * matrices_size(l) + 2 * weights_size(l->channels) +
           l->threads * (thread_size(l->channels) + 2 * of_run);
}

static Work prepare(const Layer *l) {
    Work w = {.row = row_of(l->channels)};
    w.sums_panel = round_up(l->channels, ROWS) * PANEL, w.sums_size = sums_size(l->channels);
    float *scratch = l->scratch + l->rows * matrices_size(l);
    w.row_tiles = (l->tokens + TILE - 1) / TILE, w.all_tiles = l->rows * w.row_tiles;
    w.threads = omp_get_num_threads(), w.runs = w.threads > 1 ? 2 * w.threads : 1;
    w.sums_rows = sums_rows(l);
    for (int i = 0; i < 2; i++) w.shared[i] = take(&scratch, weights_size(l->channels));
    w.sums = take(&scratch, w.runs * w.sums_rows * 2 * w.sums_size);
    scratch += omp_get_thread_num() * thread_size(l->channels);
    w.square = take(&scratch, w.sums_size);
    for (int i = 0; i < 2; i++) w.weights[i] = take(&scratch, weights_size(l->channels));
    w.tokens = take(&scratch, TILE * w.row);
    for (int i = 0; i < 4; i++) w.tiles[i] = take(&scratch, TILE * w.row);
    return w;
}

/* The layer of one batch row. */
static Layer at_row(const Layer *l, i64 row) {
    Layer r = *l;
    i64 size = row * l->tokens * l->dim, weights = row * l->dim * l->channels;
    r.x += size, r.values += size, r.weights += row * l->heads * l->tokens;
    r.gram += row * l->channels * l->channels;
    if (r.grad_out) {
        r.grad_out += size, r.grad_x += size, r.grad_wo += row * l->dim * l->dim;
        r.grad_wq += weights, r.grad_wk += weights, r.grad_wv += weights;
    } else
        r.out += size;
    if (r.mask) r.mask += row * l->tokens;
    if (r.retrieved) r.retrieved += size;
    return r;
}

static Matrices matrices_at(const Layer *l, i64 row) {
    float *scratch = l->scratch + row * matrices_size(l);
    i64 weights = l->dim * l->channels, state = l->dim * (l->dim / l->heads);
    Matrices m;
    m.keys_gram = take(&scratch, weights), m.wr = take(&scratch, weights);
    m.bound_values = take(&scratch, weights), m.grad_wr = take(&scratch, weights);
    m.state = take(&scratch, state), m.grad_state = take(&scratch, state);
    m.grad_gram = take(&scratch, l->channels * l->channels), m.delta = take(&scratch, l->heads);
    return m;
}

/* A panel of columns of a matrix b (depth, columns), with element (s, j) at b[s·b_step + j·b_column]. */
static void pack_weights_panel(const float *b, i64 b_step, i64 b_column, i64 depth, i64 columns, i64 first,
                               float *out) {
    i64 width = least(PANEL, columns - first);
    out += first * depth;
    b += first * b_column;
    if (width < PANEL) memset(out, 0, 4 * PANEL * depth);
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

/* Some tokens: `count` rows, one every `row` floats; `ahead` as in Left. */
typedef struct {
    const float *x;
    i64 row, count;
    const float *ahead;
} Tile;

static Tile tile_of(const float *x, i64 row, i64 count) { return (Tile){x, row, count, NULL}; }

/* The same as a left factor, while the product of which another tile of some (B, N, E) is fetched. */
static Tile fetching(const Layer *l, const Work *w, const float *x, i64 tile, Tile t) {
    i64 start = tile / w->row_tiles * l->tokens + tile % w->row_tiles * TILE;
    t.ahead = tile < w->all_tiles ? x + start * l->dim : NULL;
    return t;
}

static Left left_of(Tile t) { return (Left){t.x, t.row, t.ahead}; }

/* The same rows elsewhere, `out_row` floats apart. */
static Tile copy_of(Tile t, i64 columns, i64 out_row, float *out) {
    for (i64 i = 0; i < t.count; i++) memcpy(out + i * out_row, t.x + i * t.row, 4 * columns);
    return tile_of(out, out_row, t.count);
}

/* A tile as a left factor, whose strips are read whole: one that ends within a strip moves to `room`, a tile's. */
static Tile as_left(const Work *w, Tile t, i64 columns, float *room) {
    return t.count % ROWS ? copy_of(t, columns, w->row, room) : t;
}

/* A tile (count, row) = a b for a left factor a, or += */
static void multiply_tile(Tile a, i64 columns, i64 depth, const float *weights, float *tile, i64 row, int add) {
    multiply(a.count, columns, depth, left_of(a), packed(weights, depth), tile, row, PANEL, add);
}

/* sums (rows, columns) += aᵀ b over the tokens of two tiles in scratch memory */
static void add_product(const Work *w, i64 rows, i64 columns, Tile a, const float *b, float *sums) {
    multiply_turned(rows, columns, a.count, left_of(a), of_rows(b, w->row), sums, PANEL, w->sums_panel, 1);
}

/* The first tile of a run, and behind the last one that of the next. */
static i64 run_start(const Work *w, i64 run) {
    i64 runs = w->runs / w->threads, thread = run / runs;
    i64 start = w->all_tiles * thread / w->threads, end = w->all_tiles * (thread + 1) / w->threads;
    return run % runs ? end - (end - start) / SHORT : start;
}

/* The runs in the order in which they are taken: the short ones last, by those who are done first. */
static i64 run_at(const Work *w, i64 i) {
    return i < w->threads ? w->runs / w->threads * i : 2 * (i - w->threads) + 1;
}

static float *sums_of_row(const Work *w, int which, i64 run, i64 row) {
    i64 at = run * w->sums_rows + (row != run_start(w, run) / w->row_tiles);
    return w->sums + (2 * at + which) * w->sums_size;
}

/* A run's sums over a batch row, before the first tile. */
static float *start_row(const Work *w, int which, i64 run, i64 row) {
    return memset(sums_of_row(w, which, run, row), 0, 4 * w->sums_size);
}

/* Row i of sums to out, or added to it. */
static void put_sums(const Work *w, const float *sums, i64 i, i64 columns, int add, float *out) {
    sums += i * PANEL;
    for (i64 j = 0; j < columns; j += PANEL, sums += w->sums_panel)
        for (i64 k = 0; k < least(PANEL, columns - j); k++) out[j + k] = (add ? out[j + k] : 0) + sums[k];
}

/* The sums (rows, columns) of all batch rows to out, `out_row` floats apart, for those that are in several runs after
   all have been summed; the others come from `put_own_row`. All threads share the work. */
static void put_shared_rows(const Work *w, int which, i64 rows, i64 columns, float *out, i64 out_row) {
#pragma omp barrier
    for (i64 run = 1; run < w->runs; run++) {
        i64 row = run_start(w, run) / w->row_tiles, first = run - 1, last = run;
        if (run_start(w, run) % w->row_tiles == 0 || run_start(w, first) > row * w->row_tiles) continue;
        while (last + 1 < w->runs && run_start(w, last + 1) < (row + 1) * w->row_tiles) last++;
#pragma omp for
        for (i64 i = 0; i < rows; i++)
            for (i64 r = first; r <= last; r++)
                put_sums(w, sums_of_row(w, which, r, row), i, columns, r > first, out + row * out_row + i * columns);
    }
}

/* Those of a batch row to out, if all of it is in this run. */
static void put_own_row(const Work *w, int which, i64 run, i64 row, i64 rows, i64 columns, float *out, i64 out_row) {
    if (run_start(w, run) > row * w->row_tiles || run_start(w, run + 1) < (row + 1) * w->row_tiles) return;
    for (i64 i = 0; i < rows; i++)
        put_sums(w, sums_of_row(w, which, run, row), i, columns, 0, out + row * out_row + i * columns);
}

/* Tokens of x with all C channels, as a left factor; where the mask counts, zeros for ignored ones. As the factors of a
   sum they must be a copy: rows at distances of powers of two share few places of the cache. */
static Tile tokens_at(const Layer *l, const Work *w, i64 start, i64 count, i64 mask_counts, int copied) {
    const float *x = l->x + start * l->dim;
    const uint8_t *mask = mask_counts ? l->mask : NULL;
    if (!mask && !copied && l->channels == l->dim && count % ROWS == 0) return tile_of(x, l->dim, count);
    for (i64 i = 0; i < count; i++, x += l->dim) {
        float *row = w->tokens + i * w->row;
        int counts = !mask || !mask[start + i];
        if (counts)
            memcpy(row, x, 4 * l->dim);
        else
            memset(row, 0, 4 * l->dim);
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

#define FOR_RUNS for (i64 i = 0; i < w->runs; i++)
#define FOR_ROWS_OF_RUN                                                  \
    for (i64 run = run_at(w, i), row = run_start(w, run) / w->row_tiles; \
         row * w->row_tiles < run_start(w, run + 1); row++)
#define FOR_TILES_OF_RUN                                         \
    for (i64 tile = most(run_start(w, run), row * w->row_tiles); \
         tile < least(run_start(w, run + 1), (row + 1) * w->row_tiles); tile++)
#define FOR_ALL_TILES for (i64 tile = 0; tile < w->all_tiles; tile++)

/* gram = Σ x xᵀ */
static void sum_gram(const Layer *l, const Work *w) {
    i64 channels = l->channels, size = channels * channels;
#pragma omp for schedule(dynamic) nowait
    FOR_RUNS
    FOR_ROWS_OF_RUN {
        Layer r = at_row(l, row);
        float *sums = start_row(w, 0, run, row);
        FOR_TILES_OF_RUN {
            i64 start = tile % w->row_tiles * TILE, count = least(TILE, l->tokens - start);
            Tile x = tokens_at(&r, w, start, count, l->mask_superposition, 1);
            for (i64 j = 0; j < channels; j += PANEL) /* the rows that reach the diagonal */
                add_product(w, least(j + PANEL, channels), least(PANEL, channels - j), x, x.x + j,
                            sums + j / PANEL * w->sums_panel);
        }
        put_own_row(w, 0, run, row, channels, channels, l->gram, size);
    }
    put_shared_rows(w, 0, channels, channels, l->gram, size);
#pragma omp for schedule(static, BLOCK)
    for (i64 k = 0; k < l->rows * channels; k++) { /* below the diagonal */
        i64 i = k % channels;
        float *gram = l->gram + k / channels * size;
        for (i64 j = 0; j < i; j++) gram[i * channels + j] = gram[j * channels + i];
    }
}

/* Rows of one head's matrices. */
typedef struct {
    i64 row, head;    /* batch row, and which head of all batch rows */
    i64 first, count; /* rows, of the head's */
    i64 of_head;      /* the head's first row, of the batch row's */
} Block;

static i64 blocks_of(const Layer *l) { return (l->dim / l->heads + BLOCK - 1) / BLOCK; }

static Block block_at(const Layer *l, i64 i) {
    i64 head = i / blocks_of(l), first = i % blocks_of(l) * BLOCK, size = l->dim / l->heads;
    return (Block){head / l->heads, head, first, least(BLOCK, size - first), head % l->heads * size};
}

#define FOR_BLOCKS for (i64 i = 0; i < l->rows * l->heads * blocks_of(l); i++)

/* c (count, columns) = a b, or +=, for rows of a (count, depth). */
static void multiply_block(const Work *w, i64 count, i64 columns, i64 depth, const float *a, const float *right,
                           float *c, int add) {
    Tile left = as_left(w, tile_of(a, depth, count), depth, w->tokens);
    multiply_tile(left, columns, depth, right, w->tiles[0], w->row, 0);
    for (i64 i = 0; i < count; i++, c += columns) {
        const float *row = w->tiles[0] + i * w->row;
        if (add)
            for (i64 j = 0; j < columns; j++) c[j] += row[j];
        else
            memcpy(c, row, 4 * columns);
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
    for (i64 i = 0; i < size; i++) {
        memcpy(unbinding + i * size, bound + i, 4 * (size - i));
        memcpy(unbinding + i * size + size - i, bound, 4 * i);
    }
}

/* keys_gram = Wk gram; every head's state = keys_gram Wvᵀ; and wr = M Wq for what unbinds from it, M. */
static void find_retrieval(const Layer *l, const Work *w) {
    i64 channels = l->channels, size = l->dim / l->heads, row = -1, head = -1;
    float *unbinding = w->square; /* each thread makes its own */
#pragma omp for
    FOR_BLOCKS {
        Block b = block_at(l, i);
        Matrices m = matrices_at(l, b.row);
        i64 at = b.of_head + b.first;
        if (b.row != row) pack_weights(at_row(l, b.row).gram, channels, 1, channels, channels, w->weights[0]);
        if (b.head != head) pack_weights(l->wv + b.of_head * channels, 1, channels, channels, size, w->weights[1]);
        row = b.row, head = b.head;
        float *keys_gram = m.keys_gram + at * channels;
        multiply_block(w, b.count, channels, channels, l->wk + at * channels, w->weights[0], keys_gram, 0);
        multiply_block(w, b.count, size, channels, keys_gram, w->weights[1], m.state + at * size, 0);
    }
    head = -1;
#pragma omp for
    FOR_BLOCKS {
        Block b = block_at(l, i);
        Matrices m = matrices_at(l, b.row);
        if (b.head != head) {
            unbind(w, size, m.state + b.of_head * size, unbinding);
            pack_weights(l->wq + b.of_head * channels, channels, 1, size, channels, w->weights[0]);
        }
        head = b.head;
        multiply_block(w, b.count, channels, size, unbinding + b.first * size, w->weights[0],
                       m.wr + (b.of_head + b.first) * channels, 0);
    }
}

/* The weights of all heads and tokens = exp(the cosines of v and r).

   Inlined, this and `differentiate_cosines` can become several copies that round differently, and which one takes a
   tile can depend on which thread was free. */
NOINLINE void weigh(const Layer *l, i64 start, Tile v, Tile r) {
    i64 size = l->dim / l->heads;
    for (i64 h = 0; h < l->heads; h++) {
        float weights[TILE] = {0}, v_squares[TILE], r_squares[TILE];
        for (i64 i = 0; i < v.count; i++) {
            const float *v_row = v.x + i * v.row + h * size, *r_row = r.x + i * r.row + h * size;
            float product = 0, v_square = 0, r_square = 0;
#pragma omp simd reduction(+ : product, v_square, r_square)
            for (i64 d = 0; d < size; d++) {
                product += v_row[d] * r_row[d];
                v_square += v_row[d] * v_row[d];
                r_square += r_row[d] * r_row[d];
            }
            weights[i] = product, v_squares[i] = v_square, r_squares[i] = r_square;
        }
#pragma omp simd
        for (i64 i = 0; i < v.count; i++)
            weights[i] = weights[i] * inverse_norm(v_squares[i]) * inverse_norm(r_squares[i]);
        for (i64 i = 0; i < v.count; i += LANES) VEC(weights + i) = exp2_of(LOG2_E * VEC(weights + i));
        memcpy(l->weights + h * l->tokens + start, weights, 4 * v.count);
    }
}

/* values = x Wvᵀ, retrieved = x wrᵀ where it is kept, and weights = exp(their cosines) */
static void retrieve(const Layer *l, const Work *w) {
    i64 dim = l->dim, channels = l->channels, packed = -1;
    pack_shared(l->wv, 1, channels, channels, dim, w->shared[0]);
#pragma omp for schedule(dynamic)
    FOR_ALL_TILES {
        i64 row = tile / w->row_tiles, start = tile % w->row_tiles * TILE, count = least(TILE, l->tokens - start);
        Layer r = at_row(l, row);
        if (row != packed) pack_weights(matrices_at(l, row).wr, 1, channels, channels, dim, w->weights[0]);
        packed = row;
        Tile x = tokens_at(&r, w, start, count, 0, 0);
        multiply_tile(x, dim, channels, w->shared[0], w->tiles[0], w->row, 0);
        x = fetching(l, w, l->x, tile + w->threads, x);
        multiply_tile(x, dim, channels, w->weights[0], w->tiles[1], w->row, 0);
        store(w->tiles[0], w->row, start, count, dim, r.values);
        if (r.retrieved) store(w->tiles[1], w->row, start, count, dim, r.retrieved);
        weigh(&r, start, tile_of(w->tiles[0], w->row, count), tile_of(w->tiles[1], w->row, count));
    }
}

/* The exponentials in weights over their sum; `normalize_` in chunked.py. Where all tokens are ignored they become
   zeros, or 1/N each if such tokens enter the superposition. */
static void normalize(const Layer *l) {
#pragma omp for
    for (i64 head = 0; head < l->rows * l->heads; head++) {
        float *weights = l->weights + head * l->tokens;
        const uint8_t *mask = l->mask ? l->mask + head / l->heads * l->tokens : NULL;
        if (mask) {
            float ignored = !l->mask_superposition && !memchr(mask, 0, l->tokens);
            for (i64 t = 0; t < l->tokens; t++)
                if (mask[t]) weights[t] = ignored;
        }
        double total = 0;
        for (i64 t = 0; t < l->tokens; t++) total += weights[t];
        float divisor = total == 0 ? 1 : total;
        for (i64 t = 0; t < l->tokens; t++) weights[t] /= divisor;
    }
}

/* out = (weights ∘ values) Woᵀ; out may be values */
static void project(const Layer *l, const Work *w) {
    i64 dim = l->dim;
    pack_shared(l->wo, 1, dim, dim, dim, w->shared[0]);
#pragma omp for schedule(dynamic)
    FOR_ALL_TILES {
        i64 row = tile / w->row_tiles, start = tile % w->row_tiles * TILE, count = least(TILE, l->tokens - start);
        Layer r = at_row(l, row);
        Tile weighed = fetching(l, w, l->values, tile + w->threads, weighed_at(&r, w, start, count));
        multiply_tile(weighed, dim, dim, w->shared[0], w->tiles[1], w->row, 0);
        store(w->tiles[1], w->row, start, count, dim, r.out);
    }
}

#define THREADS num_threads(most(1, least(l->threads, l->rows * ((l->tokens + TILE - 1) / TILE)))) /* each with work */

/* out, weights and gram; values and retrieved where they are kept */
void hrr_forward(const Layer *l) {
#pragma omp parallel THREADS
    {
        Work prepared = prepare(l), *w = &prepared;
        sum_gram(l, w);
        find_retrieval(l, w);
        retrieve(l, w);
        normalize(l);
        project(l, w);
    }
}

/* values = x Wvᵀ unless they were kept, grad_wo = grad_outᵀ (weights ∘ values), and delta = Σ grad_wo ∘ Wo over the
   columns of a head */
static void differentiate_projection(const Layer *l, const Work *w) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads, kept = l->retrieved != NULL;
    if (!kept) pack_shared(l->wv, 1, channels, channels, dim, w->shared[0]);
#pragma omp for schedule(dynamic) nowait
    FOR_RUNS
    FOR_ROWS_OF_RUN {
        Layer r = at_row(l, row);
        float *sums = start_row(w, 0, run, row);
        FOR_TILES_OF_RUN {
            i64 start = tile % w->row_tiles * TILE, count = least(TILE, l->tokens - start);
            if (!kept) {
                Tile x = fetching(l, w, l->x, tile + 1, tokens_at(&r, w, start, count, 0, 0));
                multiply_tile(x, dim, channels, w->shared[0], w->tiles[1], w->row, 0);
                store(w->tiles[1], w->row, start, count, dim, r.values);
            }
            Tile grad = copy_of(tile_of(r.grad_out + start * dim, dim, count), dim, w->row, w->tiles[2]);
            grad = fetching(l, w, l->grad_out, tile + 1, grad);
            add_product(w, dim, dim, grad, weighed_at(&r, w, start, count).x, sums);
        }
        put_own_row(w, 0, run, row, dim, dim, l->grad_wo, dim * dim);
    }
    put_shared_rows(w, 0, dim, dim, l->grad_wo, dim * dim);
#pragma omp for
    for (i64 i = 0; i < l->rows * l->heads; i++) {
        const float *grad = at_row(l, i / l->heads).grad_wo;
        i64 first = i % l->heads * size;
        float delta = 0;
        for (i64 e = 0; e < dim; e++) {
            float sum = 0;
            for (i64 d = first; d < first + size; d++) sum += grad[e * dim + d] * l->wo[e * dim + d];
            delta += sum;
        }
        matrices_at(l, i / l->heads).delta[i % l->heads] = delta;
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

/* The same for all heads and tokens; dv and dr have rows as far apart. */
NOINLINE void differentiate_cosines(const Layer *l, i64 start, const float *delta, Tile v, Tile r, float *dv, float *dr,
                                    i64 row) {
    i64 size = l->dim / l->heads;
    for (i64 i = 0; i < v.count; i++)
        for (i64 h = 0; h < l->heads; h++)
            differentiate_cosine(l->weights[h * l->tokens + start + i], delta[h], size, v.x + i * v.row + h * size,
                                 r.x + i * r.row + h * size, dv + i * row + h * size, dr + i * row + h * size);
}

/* grad_wr, grad_wv but for what the state contributes, and grad_x but for what the Gram matrix does; grad_x may be
   values */
static void differentiate_retrieval(const Layer *l, const Work *w) {
    i64 dim = l->dim, channels = l->channels, packed = -1;
    float *dr = w->tiles[0], *dv = w->tiles[1], *grads[2] = {dr, dv}, *grad_x = w->tiles[3];
    float *grad_wr = matrices_at(l, 0).grad_wr; /* and those of the other rows behind it */
    pack_shared(l->wo, dim, 1, dim, dim, w->shared[0]);
    pack_shared(l->wv, channels, 1, dim, dim, w->shared[1]);
#pragma omp for schedule(dynamic) nowait
    FOR_RUNS
    FOR_ROWS_OF_RUN {
        Layer r = at_row(l, row);
        Matrices m = matrices_at(l, row);
        float *sums[2] = {start_row(w, 0, run, row), start_row(w, 1, run, row)};
        if (row != packed && !r.retrieved) pack_weights(m.wr, 1, channels, channels, dim, w->weights[0]);
        if (row != packed) pack_weights(m.wr, channels, 1, dim, dim, w->weights[1]);
        packed = row;
        FOR_TILES_OF_RUN {
            i64 start = tile % w->row_tiles * TILE, count = least(TILE, l->tokens - start);
            Tile x = tokens_at(&r, w, start, count, 0, 1);
            Tile v = tile_of(r.values + start * dim, dim, count);
            Tile retrieved = tile_of(r.retrieved ? r.retrieved + start * dim : w->tiles[2], dim, count);
            if (!r.retrieved) {
                retrieved.row = w->row;
                multiply_tile(x, dim, channels, w->weights[0], w->tiles[2], w->row, 0);
            }
            Tile grad = as_left(w, tile_of(r.grad_out + start * dim, dim, count), dim, grad_x);
            multiply_tile(grad, dim, dim, w->shared[0], dv, w->row, 0);
            differentiate_cosines(&r, start, m.delta, v, retrieved, dv, dr, w->row);
            for (int i = 0; i < 2; i++) {
                Tile d = tile_of(grads[i], w->row, count);
                add_product(w, dim, channels, d, x.x, sums[i]);
                multiply_tile(d, dim, dim, i ? w->shared[1] : w->weights[1], grad_x, w->row, i);
            }
            store(grad_x, w->row, start, count, dim, r.grad_x);
        }
        put_own_row(w, 0, run, row, dim, channels, grad_wr, matrices_size(l));
        put_own_row(w, 1, run, row, dim, channels, l->grad_wv, dim * channels);
    }
    put_shared_rows(w, 0, dim, channels, grad_wr, matrices_size(l));
    put_shared_rows(w, 1, dim, channels, l->grad_wv, dim * channels);
}

/* From grad_wr, what reaches the projections through the state: grad_wq, grad_wk, grad_wv increased; and grad_gram */
static void differentiate_state(const Layer *l, const Work *w) {
    i64 dim = l->dim, channels = l->channels, size = dim / l->heads, panels = (channels + PANEL - 1) / PANEL;
    i64 row = -1, head = -1;
    float *unbinding = w->square;
#pragma omp for
    FOR_BLOCKS {
        Block b = block_at(l, i);
        Matrices m = matrices_at(l, b.row);
        i64 of_head = b.of_head * channels, at = of_head + b.first * channels;
        if (b.head != head) {
            unbind(w, size, m.state + b.of_head * size, unbinding);
            pack_weights(m.grad_wr + of_head, channels, 1, size, channels, w->weights[0]);
            pack_weights(l->wq + of_head, 1, channels, channels, size, w->weights[1]);
        }
        head = b.head;
        multiply_block(w, b.count, channels, size, unbinding + b.first * size, w->weights[0],
                       at_row(l, b.row).grad_wq + at, 0);
        multiply_block(w, b.count, size, channels, m.grad_wr + at, w->weights[1],
                       m.grad_state + (b.of_head + b.first) * size, 0);
    }
    head = -1;
#pragma omp for schedule(static) nowait /* a thread has the same blocks in the next loop */
    FOR_BLOCKS {
        Block b = block_at(l, i);
        Matrices m = matrices_at(l, b.row);
        i64 of_head = b.of_head * channels, at = of_head + b.first * channels;
        if (b.head != head) {
            unbind(w, size, m.grad_state + b.of_head * size, unbinding);
            pack_weights(l->wv + of_head, channels, 1, size, channels, w->weights[0]);
            pack_weights(m.keys_gram + of_head, channels, 1, size, channels, w->weights[1]);
        }
        head = b.head;
        const float *rows = unbinding + b.first * size;
        multiply_block(w, b.count, channels, size, rows, w->weights[0], m.bound_values + at, 0);
        multiply_block(w, b.count, channels, size, rows, w->weights[1], at_row(l, b.row).grad_wv + at, 1);
    }
#pragma omp for schedule(static)
    FOR_BLOCKS {
        Block b = block_at(l, i);
        Layer r = at_row(l, b.row);
        i64 at = (b.of_head + b.first) * channels;
        if (b.row != row) pack_weights(r.gram, channels, 1, channels, channels, w->weights[0]);
        row = b.row;
        multiply_block(w, b.count, channels, channels, matrices_at(l, row).bound_values + at, w->weights[0],
                       r.grad_wk + at, 0);
    }
#pragma omp for
    for (i64 part = 0; part < l->rows * w->threads; part++) { /* some columns of grad_gram = Wkᵀ bound_values */
        Matrices m = matrices_at(l, part / w->threads);
        i64 first = panels * (part % w->threads) / w->threads * PANEL;
        i64 columns = least(panels * (part % w->threads + 1) / w->threads * PANEL, channels) - first;
        float *sums = memset(w->square, 0, 4 * w->sums_size);
        for (i64 e = 0; e < dim; e += TILE) {
            Tile keys = tile_of(l->wk + e * channels, channels, least(TILE, dim - e));
            Tile values = tile_of(m.bound_values + e * channels + first, channels, keys.count);
            keys = copy_of(keys, channels, w->row, w->tokens), values = copy_of(values, columns, w->row, w->tiles[0]);
            add_product(w, channels, columns, keys, values.x, sums);
        }
        for (i64 i = 0; i < channels; i++) put_sums(w, sums, i, columns, 0, m.grad_gram + i * channels + first);
    }
}

/* grad_x += x (grad_gram + grad_gramᵀ), its first E columns */
static void add_gram_gradient(const Layer *l, const Work *w) {
    i64 dim = l->dim, channels = l->channels, packed = -1, size = round_up(dim, PANEL) * channels;
#pragma omp for schedule(dynamic)
    FOR_ALL_TILES {
        i64 row = tile / w->row_tiles, start = tile % w->row_tiles * TILE, count = least(TILE, l->tokens - start);
        Layer r = at_row(l, row);
        if (row != packed) {
            const float *grad_gram = matrices_at(l, row).grad_gram;
            pack_weights(grad_gram, channels, 1, channels, dim, w->weights[0]);
            pack_weights(grad_gram, 1, channels, channels, dim, w->weights[1]);
            for (i64 i = 0; i < size; i++) w->weights[0][i] += w->weights[1][i];
        }
        packed = row;
        Tile x = tokens_at(&r, w, start, count, l->mask_superposition, 0);
        x = fetching(l, w, l->x, tile + w->threads, x);
        multiply_tile(x, dim, channels, w->weights[0], w->tiles[0], w->row, 0);
        for (i64 i = 0; i < count; i++)
            for (i64 d = 0; d < dim; d++) r.grad_x[(start + i) * dim + d] += w->tiles[0][i * w->row + d];
    }
}

/* Gradients of x and, by batch row, of the weights. */
void hrr_backward(const Layer *l) {
#pragma omp parallel THREADS
    {
        Work prepared = prepare(l), *w = &prepared;
        differentiate_projection(l, w);
        find_retrieval(l, w);
        differentiate_retrieval(l, w);
        differentiate_state(l, w);
        add_gram_gradient(l, w);
    }
}
