/* Clustered attention on a CPU, forward and backward, in float32: attention/smyrf/native.py calls it.

   A cluster's keys and values are packed, a chunk of them at a time, into panels that stay in a core's cache, and every
   product is computed in registers. Nothing else of the size of the gathered tokens, or of the scores, ever exists.

   Forward, a query's sums are kept relative to its largest score so far, at its own place, and grow with every chunk of
   keys and every round. Backward, with the merged output O and log-sum-exp L, every chunk's weights are exp(s - L):
   dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - δ),  dQ = dS K,  dK = dSᵀ Q,  δ = rowsum(dO ∘ O) - dL.
   Every token is in one cluster a round, and rounds follow each other, so that no two threads write to one place and
   results do not depend on who comes first.

   Exponentials are to base 2; queries are scaled by log2(e) as they are packed.

   Legend: G = B·H sequences; R rounds of S = G·L blocks; M queries and N keys a block. Rows of tokens: sequence times
   its length, plus the token. */

#include "../native.h"

#define KEYS 128      /* of a chunk; a multiple of every PANEL and of STEPS */
#define KEY_ROWS 132  /* the next multiple of ROWS */
#define SCORES 144    /* floats from one query's scores to the next one's: `row_of` KEY_ROWS */
#define QUERIES 48    /* of a tile in the backward pass; a multiple of ROWS and of STEPS */
#define SPAN 512      /* keys that are packed at a time in the forward pass, or fewer; a multiple of KEYS */
#define CACHED 65536  /* floats of packed keys and values that stay in a core's second cache */
#define TILE 24       /* queries of a tile there; a multiple of ROWS */
#define HIDDEN -1e30f /* the score of a pair that does not count; finite, so that differences are numbers */

/* Field by field as _Problem in native.py. */
typedef struct {
    const float *q, *k, *v;         /* (G·Nq, D), (G·Nk, D), (G·Nk, Dv) */
    const i64 *q_index, *k_index;   /* (R·S, M), (R·S, N): tokens of the block's sequence */
    const uint8_t *key_mask;        /* (B, Nk), 1 = ignored; or NULL */
    int32_t *q_blocks, *k_blocks;   /* (R, G·Nq), (R, G·Nk): where a pair counts once, the block of every token; or NULL */
    float *out, *lse;               /* (G·Nq, Dv), (G·Nq) */
    float *mass;                    /* (G·Nq): forward, sums of the weights */
    const float *grad_out;          /* (G·Nq, Dv) */
    const float *grad_lse;          /* (G·Nq), or NULL */
    float *shift, *delta;           /* (G·Nq): backward, L to base 2, and δ */
    float *grad_q, *grad_k, *grad_v; /* grad_q once for each of the `key_parts`, to be summed */
    float *scratch;                 /* as many times `smyrf_scratch` as threads */
    i64 batch, heads, num_queries, num_keys, key_dim, value_dim;
    i64 rounds, blocks, block_queries, block_keys; /* R, S, M, N */
    i64 lag;                        /* query i sees the keys j <= i - lag; negative: all */
    i64 key_parts;                  /* runs of a block's keys that different threads take in the backward pass */
    i64 threads;
    float scale;
} Problem;

INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
}

/* Rows of x (.., dim), times a number, as a left factor. */
static void gather_left(const float *x, const i64 *index, i64 count, i64 dim, float factor, float *out) {
    i64 strip = ROWS * whole_steps(dim);
    for (i64 i = 0; i < count; i++)
        pack_left(x + index[i] * dim, dim, factor, out + i / ROWS * strip + i % ROWS * STEPS);
}

/* Rows of x (.., dim) as a right factor. */
static void gather_right(const float *x, const i64 *index, i64 count, i64 dim, float *out) {
    i64 steps = whole_steps(count);
    for (i64 i = 0; i < steps; i++)
        pack_right(i < count ? x + index[i] * dim : NULL, dim, steps, PANEL, out + i * PANEL);
}

/* The same rows as columns of a right factor. */
static void gather_columns(const float *x, const i64 *index, i64 count, i64 dim, float *out) {
    i64 steps = whole_steps(dim);
    for (i64 first = 0; first < count; first += PANEL, out += steps * PANEL)
        for (i64 j = 0; j < PANEL; j++) {
            const float *row = first + j < count ? x + index[first + j] * dim : NULL;
            for (i64 d = 0; d < steps; d++) out[d * PANEL + j] = row && d < dim ? row[d] : 0;
        }
}

/* For rows of x (.., dim) to be in the cache when their time comes. */
static void prefetch_rows(const float *x, const i64 *index, i64 count, i64 dim) {
    for (i64 i = 0; i < count; i++)
        for (i64 d = 0; d < dim; d += 16) __builtin_prefetch(x + index[i] * dim + d);
}

/* What is to be known of packed keys, to say which pairs count. */
typedef struct {
    i64 earlier;           /* rounds in which a pair may have met */
    float bias[SPAN];      /* HIDDEN for a masked key, else 0 */
    int32_t position[SPAN];
    int32_t *blocks;       /* (earlier, SPAN) */
} Rules;

static int has_rules(const Problem *p, i64 round) { return p->key_mask || p->lag >= 0 || (p->q_blocks && round > 0); }

static void gather_rules(const Problem *p, i64 round, i64 sequence, const i64 *index, i64 count, Rules *rules) {
    const uint8_t *mask = p->key_mask ? p->key_mask + sequence / p->heads * p->num_keys : 0;
    rules->earlier = p->q_blocks ? round : 0;
    for (i64 j = 0; j < round_up(count, LANES); j++) {
        i64 token = j < count ? index[j] : 0;
        rules->bias[j] = mask && mask[token] ? HIDDEN : 0;
        rules->position[j] = token;
        for (i64 r = 0; r < rules->earlier; r++)
            rules->blocks[r * SPAN + j] = p->k_blocks[(r * p->batch * p->heads + sequence) * p->num_keys + token];
    }
}

/* Hides the scores of one query with `count` keys, from the packed key `first` on, where the pair does not count. */
static void hide(const Problem *p, const Rules *rules, i64 sequence, i64 token, i64 first, i64 count, float *scores) {
    int32_t last = p->lag >= 0 ? token - p->lag : INT32_MAX;
    i64 rows = p->batch * p->heads * p->num_queries, row = sequence * p->num_queries + token;
    for (i64 j = 0; j < count; j += LANES) {
        ivec hidden = IVEC(rules->position + first + j) > last;
        for (i64 r = 0; r < rules->earlier; r++)
            hidden |= IVEC(rules->blocks + r * SPAN + first + j) == p->q_blocks[r * rows + row];
        vec kept = VEC(scores + j) + VEC(rules->bias + first + j), none = (vec){0} + HIDDEN;
        VEC(scores + j) = (vec)((hidden & (ivec)none) | (~hidden & (ivec)kept));
    }
}

/* Keys that are packed at a time in the forward pass. */
static i64 span_of(i64 key_dim, i64 value_dim) {
    i64 chunks = CACHED / (KEYS * (whole_steps(key_dim) + round_up(value_dim, PANEL)));
    return chunks < 1 ? KEYS : least(chunks * KEYS, SPAN);
}

/* Floats of scratch memory that a thread needs. */
i64 smyrf_scratch(i64 key_dim, i64 value_dim, i64 rounds) {
    i64 dims = round_up(key_dim, PANEL) + round_up(value_dim, PANEL);
    i64 forward = span_of(key_dim, value_dim) * dims + TILE * (dims + SCORES + KEYS);
    i64 backward = KEY_ROWS * 3 * dims + QUERIES * (3 * dims + 2 * SCORES + KEYS);
    return SPAN * rounds + (forward > backward ? forward : backward) + 16 * 32;
}

/* One query's scores with `count` keys to weights relative to the largest score so far, as a row of a left factor; what
   its sums count before is brought to the new one. */
INLINE void weigh(float *score, i64 count, float *top, float *mass, float *sum, i64 value_dim, float *left) {
    for (i64 j = count; j < round_up(count, LANES); j++) score[j] = 2 * HIDDEN;
    vec tops = VEC(score), masses = {0};
    for (i64 j = LANES; j < count; j += LANES) tops = larger(VEC(score + j), tops);
    float before = *top;
    for (int lane = 0; lane < LANES; lane++) *top = tops[lane] > *top ? tops[lane] : *top;
    if (*top > before) {
        float fade = exp2_of_one(before - *top);
        *mass *= fade;
        for (i64 d = 0; d < value_dim; d++) sum[d] *= fade;
    }
    for (i64 j = 0; j < count; j += LANES) {
        vec weight = exp2_of(VEC(score + j) - *top);
        masses += weight;
        put_left(weight, left + j * ROWS);
    }
    for (int lane = 0; lane < LANES; lane++) *mass += masses[lane];
}

/* `count` queries of a block with all its keys, in one round. */
static void forward_queries(const Problem *p, i64 round, i64 sequence, const i64 *q_index, const i64 *k_index,
                            i64 count, float *scratch) {
    i64 dim = p->key_dim, value_dim = p->value_dim, steps = whole_steps(dim), stride = round_up(value_dim, PANEL);
    i64 q_first = sequence * p->num_queries, k_first = sequence * p->num_keys, ruled = has_rules(p, round);
    i64 span = span_of(dim, value_dim);
    const float *queries = p->q + q_first * dim;
    float *out = p->out + q_first * value_dim, *lse = p->lse + q_first, *mass = p->mass + q_first;
    Rules rules = {.blocks = (int32_t *)take(&scratch, p->rounds * SPAN)};
    float *k = take(&scratch, span * steps), *v = take(&scratch, span * stride), *q = take(&scratch, TILE * steps);
    float *scores = take(&scratch, TILE * SCORES), *weights = take(&scratch, TILE * KEYS);
    float *sums = take(&scratch, TILE * stride);
    for (i64 start = 0; start < p->block_keys; start += span) {
        i64 keys = least(span, p->block_keys - start);
        int first = round == 0 && start == 0, last = round + 1 == p->rounds && start + keys == p->block_keys;
        prefetch_rows(p->k + k_first * dim, k_index + start, keys, dim);
        prefetch_rows(queries, q_index, least(TILE, count), dim);
        if (!first) prefetch_rows(out, q_index, least(TILE, count), value_dim);
        for (i64 key = 0; key < keys; key += KEYS) {
            const i64 *index = k_index + start + key;
            gather_columns(p->k + k_first * dim, index, least(KEYS, keys - key), dim, k + key * steps);
            gather_right(p->v + k_first * value_dim, index, least(KEYS, keys - key), value_dim, v + key * stride);
        }
        if (ruled) gather_rules(p, round, sequence, k_index + start, keys, &rules);
        for (i64 query = 0; query < count; query += TILE) {
            i64 rows = least(TILE, count - query), next = least(TILE, count - query - rows);
            const i64 *index = q_index + query;
            prefetch_rows(queries, index + rows, next, dim);
            if (!first) prefetch_rows(out, index + rows, next, value_dim);
            gather_left(queries, index, rows, dim, p->scale * LOG2_E, q);
            for (i64 i = 0; i < rows; i++) {
                if (first) {
                    lse[index[i]] = 2 * HIDDEN;
                    mass[index[i]] = 0;
                    memset(sums + i * stride, 0, 4 * stride);
                } else
                    memcpy(sums + i * stride, out + index[i] * value_dim, 4 * value_dim);
            }
            for (i64 key = 0; key < keys; key += KEYS) {
                i64 chunk = least(KEYS, keys - key), strip = ROWS * whole_steps(chunk);
                multiply(rows, chunk, steps, q, k + key * steps, scores, SCORES, PANEL, 0);
                for (i64 i = 0; i < rows; i++) {
                    if (ruled) hide(p, &rules, sequence, index[i], key, chunk, scores + i * SCORES);
                    weigh(scores + i * SCORES, chunk, lse + index[i], mass + index[i], sums + i * stride, value_dim,
                          weights + i / ROWS * strip + i % ROWS * STEPS);
                }
                multiply(rows, value_dim, whole_steps(chunk), weights, v + key * stride, sums, stride, PANEL, 1);
            }
            for (i64 i = 0; i < rows; i++) {
                float top = lse[index[i]], factor = 1;
                if (last) {
                    factor = top < HIDDEN / 2 ? 0 : 1 / mass[index[i]];
                    lse[index[i]] = top < HIDDEN / 2 ? -INFINITY : LN_2 * (top + log2f(mass[index[i]]));
                }
                for (i64 d = 0; d < value_dim; d++) out[index[i] * value_dim + d] = factor * sums[i * stride + d];
            }
        }
    }
}

/* The block of every token in every round. */
static void number_blocks(i64 rounds, i64 blocks, i64 sequences, i64 size, i64 length, const i64 *index, int32_t *out) {
#pragma omp for
    for (i64 b = 0; b < rounds * blocks; b++) {
        i64 block = b % blocks, sequence = block * sequences / blocks;
        int32_t *row = out + (b / blocks * sequences + sequence) * length;
        for (i64 i = 0; i < size; i++) row[index[b * size + i]] = block;
    }
}

void smyrf_forward(const Problem *p) {
    i64 sequences = p->batch * p->heads, scratch_size = smyrf_scratch(p->key_dim, p->value_dim, p->rounds);
    i64 parts = (2 * p->threads + p->blocks - 1) / p->blocks; /* of a block's queries, for all threads to have work */
    i64 part = round_up((p->block_queries + parts - 1) / parts, QUERIES);
    parts = (p->block_queries + part - 1) / part;
#pragma omp parallel num_threads(p->threads)
    {
        float *scratch = p->scratch + omp_get_thread_num() * scratch_size;
        if (p->q_blocks) {
            number_blocks(p->rounds, p->blocks, sequences, p->block_queries, p->num_queries, p->q_index, p->q_blocks);
            number_blocks(p->rounds, p->blocks, sequences, p->block_keys, p->num_keys, p->k_index, p->k_blocks);
        }
        for (i64 round = 0; round < p->rounds; round++) {
#pragma omp for schedule(dynamic)
            for (i64 item = 0; item < p->blocks * parts; item++) {
                i64 block = item / parts, query = item % parts * part, b = round * p->blocks + block;
                forward_queries(p, round, block * sequences / p->blocks, p->q_index + b * p->block_queries + query,
                                p->k_index + b * p->block_keys, least(part, p->block_queries - query), scratch);
            }
        }
    }
}

/* Adds to the places of the rows of x (count, stride), or writes there. */
static void put_rows(const float *x, i64 count, i64 stride, i64 dim, const i64 *index, float factor, int add,
                     float *out) {
    for (i64 i = 0; i < count; i++, x += stride) {
        float *row = out + index[i] * dim;
        if (add)
            for (i64 d = 0; d < dim; d++) row[d] += factor * x[d];
        else
            for (i64 d = 0; d < dim; d++) row[d] = factor * x[d];
    }
}

/* Up to KEYS keys of a block with all its queries, in one round; `grad_q` holds what earlier keys gave, unless first. */
static void backward_keys(const Problem *p, i64 round, i64 sequence, const i64 *q_index, const i64 *k_index, i64 count,
                          float *grad_q, int first, float *scratch) {
    i64 dim = p->key_dim, value_dim = p->value_dim, steps = whole_steps(dim), value_steps = whole_steps(value_dim);
    i64 stride = round_up(dim, PANEL), value_stride = round_up(value_dim, PANEL), ruled = has_rules(p, round);
    i64 q_first = sequence * p->num_queries, k_first = sequence * p->num_keys;
    Rules rules = {.blocks = (int32_t *)take(&scratch, p->rounds * SPAN)};
    float *k = take(&scratch, KEYS * stride), *k_columns = take(&scratch, KEYS * steps);
    float *v_columns = take(&scratch, KEYS * value_steps);
    float *dk = take(&scratch, KEY_ROWS * stride), *dv = take(&scratch, KEY_ROWS * value_stride);
    float *q_left = take(&scratch, QUERIES * steps), *q_right = take(&scratch, QUERIES * stride);
    float *grad_left = take(&scratch, QUERIES * value_steps), *grad_right = take(&scratch, QUERIES * value_stride);
    float *dq = take(&scratch, QUERIES * stride), *grad_scores_left = take(&scratch, QUERIES * KEYS);
    float *weights = take(&scratch, QUERIES * SCORES), *grad_scores = take(&scratch, QUERIES * SCORES);
    const float *q = p->q + q_first * dim, *grad_out = p->grad_out + q_first * value_dim;
    const float *keys = p->k + k_first * dim, *values = p->v + k_first * value_dim;
    prefetch_rows(keys, k_index, count, dim);
    prefetch_rows(values, k_index, count, value_dim);
    prefetch_rows(q, q_index, least(QUERIES, p->block_queries), dim);
    prefetch_rows(grad_out, q_index, least(QUERIES, p->block_queries), value_dim);
    gather_right(keys, k_index, count, dim, k);
    gather_columns(keys, k_index, count, dim, k_columns);
    gather_columns(values, k_index, count, value_dim, v_columns);
    if (ruled) gather_rules(p, round, sequence, k_index, count, &rules);
    for (i64 query = 0; query < p->block_queries; query += QUERIES) {
        i64 rows = least(QUERIES, p->block_queries - query), whole_rows = whole_steps(rows);
        i64 next = least(QUERIES, p->block_queries - query - rows);
        const i64 *index = q_index + query;
        prefetch_rows(q, index + rows, next, dim);
        prefetch_rows(grad_out, index + rows, next, value_dim);
        if (!first) prefetch_rows(grad_q + q_first * dim, index + rows, next, dim);
        gather_left(q, index, rows, dim, p->scale * LOG2_E, q_left);
        gather_right(q, index, rows, dim, q_right);
        gather_left(grad_out, index, rows, value_dim, 1, grad_left);
        gather_right(grad_out, index, rows, value_dim, grad_right);
        multiply(rows, count, steps, q_left, k_columns, weights, SCORES, PANEL, 0);
        multiply(rows, count, value_steps, grad_left, v_columns, grad_scores, SCORES, PANEL, 0);
        for (i64 i = 0; i < rows; i++) {
            float *weight = weights + i * SCORES, *grad = grad_scores + i * SCORES;
            float *left = grad_scores_left + i / ROWS * ROWS * whole_steps(count) + i % ROWS * STEPS;
            float shift = p->shift[q_first + index[i]], delta = p->delta[q_first + index[i]];
            if (ruled) hide(p, &rules, sequence, index[i], 0, count, weight);
            for (i64 j = count; j < round_up(count, LANES); j++) weight[j] = 2 * HIDDEN;
            for (i64 j = 0; j < count; j += LANES) {
                vec w = exp2_of(VEC(weight + j) - shift), grad_score = w * (VEC(grad + j) - delta);
                VEC(weight + j) = w;
                VEC(grad + j) = grad_score;
                put_left(grad_score, left + j * ROWS);
            }
        }
        memset(weights + rows * SCORES, 0, 4 * (whole_rows - rows) * SCORES);
        memset(grad_scores + rows * SCORES, 0, 4 * (whole_rows - rows) * SCORES);
        multiply(rows, dim, whole_steps(count), grad_scores_left, k, dq, stride, PANEL, 0);
        multiply_turned(count, dim, whole_rows, grad_scores, ROWS, SCORES, q_right, dk, stride, PANEL, query > 0);
        multiply_turned(count, value_dim, whole_rows, weights, ROWS, SCORES, grad_right, dv, value_stride, PANEL,
                        query > 0);
        put_rows(dq, rows, stride, dim, index, p->scale, !first, grad_q + q_first * dim);
    }
    put_rows(dk, count, stride, dim, k_index, p->scale, round > 0, p->grad_k + k_first * dim);
    put_rows(dv, count, value_stride, value_dim, k_index, 1, round > 0, p->grad_v + k_first * value_dim);
}

void smyrf_backward(const Problem *p) {
    i64 sequences = p->batch * p->heads, rows = sequences * p->num_queries, value_dim = p->value_dim;
    i64 scratch_size = smyrf_scratch(p->key_dim, value_dim, p->rounds), parts = p->key_parts;
    i64 part = round_up((p->block_keys + parts - 1) / parts, KEYS);
#pragma omp parallel num_threads(p->threads)
    {
        float *scratch = p->scratch + omp_get_thread_num() * scratch_size;
        if (p->q_blocks) {
            number_blocks(p->rounds, p->blocks, sequences, p->block_queries, p->num_queries, p->q_index, p->q_blocks);
            number_blocks(p->rounds, p->blocks, sequences, p->block_keys, p->num_keys, p->k_index, p->k_blocks);
        }
#pragma omp for
        for (i64 row = 0; row < rows; row++) {
            const float *out = p->out + row * value_dim, *grad = p->grad_out + row * value_dim;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (i64 d = 0; d < value_dim; d++) sum += out[d] * grad[d];
            p->delta[row] = p->grad_lse ? sum - p->grad_lse[row] : sum;
            p->shift[row] = p->lse[row] == -INFINITY ? -HIDDEN : p->lse[row] * LOG2_E; /* no key: 2^(s - huge) = 0 */
        }
        for (i64 round = 0; round < p->rounds; round++) {
#pragma omp for schedule(dynamic)
            for (i64 item = 0; item < p->blocks * parts; item++) {
                i64 block = item / parts, start = item % parts * part, b = round * p->blocks + block;
                float *grad_q = p->grad_q + item % parts * rows * p->key_dim;
                for (i64 key = start; key < least(start + part, p->block_keys); key += KEYS)
                    backward_keys(p, round, block * sequences / p->blocks, p->q_index + b * p->block_queries,
                                  p->k_index + b * p->block_keys + key, least(KEYS, p->block_keys - key), grad_q,
                                  round == 0 && key == start, scratch);
            }
        }
    }
}
