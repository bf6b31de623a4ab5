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

#define KEYS 128      /* of a chunk; a multiple of every PANEL */
#define KEY_ROWS 132  /* the next multiple of ROWS */
#define QUERIES 48    /* of a tile in the backward pass; a multiple of ROWS */
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

/* Rows base + index[0..count) of x (.., dim), times factor, to out (count, stride), zeros behind. */
static void pack_rows(const float *x, const i64 *index, i64 count, i64 dim, i64 stride, float factor, float *out) {
    for (i64 i = 0; i < count; i++, out += stride) {
        const float *row = x + index[i] * dim;
        for (i64 d = 0; d < dim; d++) out[d] = factor * row[d];
        for (i64 d = dim; d < stride; d++) out[d] = 0;
    }
}

/* The same rows as columns, in panels (count / PANEL, dim, PANEL); zeros behind the last. */
static void pack_columns(const float *x, const i64 *index, i64 count, i64 dim, float *out) {
    for (i64 first = 0; first < count; first += PANEL, out += dim * PANEL)
        for (i64 j = 0; j < PANEL; j++) {
            const float *row = x + (first + j < count ? index[first + j] * dim : 0);
            float factor = first + j < count;
            for (i64 d = 0; d < dim; d++) out[d * PANEL + j] = factor ? row[d] : 0;
        }
}

/* What is to be known of a chunk of keys, to say which pairs count. */
typedef struct {
    i64 earlier;           /* rounds in which a pair may have met */
    float bias[KEYS];      /* HIDDEN for a masked key, else 0 */
    int32_t position[KEYS];
    int32_t *blocks;       /* (earlier, KEYS) */
} Rules;

static int has_rules(const Problem *p, i64 round) { return p->key_mask || p->lag >= 0 || (p->q_blocks && round > 0); }

static void gather_rules(const Problem *p, i64 round, i64 sequence, const i64 *index, i64 count, Rules *rules) {
    const uint8_t *mask = p->key_mask ? p->key_mask + sequence / p->heads * p->num_keys : 0;
    rules->earlier = p->q_blocks ? round : 0;
    for (i64 j = 0; j < KEYS; j++) {
        i64 token = j < count ? index[j] : 0;
        rules->bias[j] = mask && mask[token] ? HIDDEN : 0;
        rules->position[j] = token;
        for (i64 r = 0; r < rules->earlier; r++)
            rules->blocks[r * KEYS + j] = p->k_blocks[(r * p->batch * p->heads + sequence) * p->num_keys + token];
    }
}

/* Hides the scores of one query with the keys of the chunk where the pair does not count. */
static void hide(const Problem *p, const Rules *rules, i64 sequence, i64 token, i64 count, float *scores) {
    int32_t last = p->lag >= 0 ? token - p->lag : INT32_MAX;
    i64 rows = p->batch * p->heads * p->num_queries, row = sequence * p->num_queries + token;
    for (i64 j = 0; j < count; j += LANES) {
        ivec hidden = IVEC(rules->position + j) > last;
        for (i64 r = 0; r < rules->earlier; r++)
            hidden |= IVEC(rules->blocks + r * KEYS + j) == p->q_blocks[r * rows + row];
        vec kept = VEC(scores + j) + VEC(rules->bias + j), none = (vec){0} + HIDDEN;
        VEC(scores + j) = (vec)((hidden & (ivec)none) | (~hidden & (ivec)kept));
    }
}

/* Floats of scratch memory that a thread needs. */
i64 smyrf_scratch(i64 key_dim, i64 value_dim, i64 rounds) {
    i64 dims = round_up(key_dim, PANEL) + round_up(value_dim, PANEL);
    return KEY_ROWS * (3 * dims + rounds) + 2 * QUERIES * (dims + KEY_ROWS) + 16 * 32;
}

/* `count` queries of a block with all its keys, in one round. */
static void forward_queries(const Problem *p, i64 round, i64 sequence, const i64 *q_index, const i64 *k_index,
                            i64 count, float *scratch) {
    i64 dim = p->key_dim, value_dim = p->value_dim, stride = round_up(value_dim, LANES);
    i64 q_first = sequence * p->num_queries, k_first = sequence * p->num_keys;
    Rules rules = {.blocks = (int32_t *)take(&scratch, p->rounds * KEYS)};
    float *k = take(&scratch, KEYS * dim), *v = take(&scratch, KEYS * stride), *q = take(&scratch, ROWS * dim);
    float *scores = take(&scratch, ROWS * KEYS), *sums = take(&scratch, ROWS * stride);
    for (i64 key = 0; key < p->block_keys; key += KEYS) {
        i64 keys = least(KEYS, p->block_keys - key), ruled = has_rules(p, round);
        int first = round == 0 && key == 0, last = round + 1 == p->rounds && key + keys == p->block_keys;
        pack_columns(p->k + k_first * dim, k_index + key, keys, dim, k);
        pack_rows(p->v + k_first * value_dim, k_index + key, keys, value_dim, stride, 1, v);
        if (ruled) gather_rules(p, round, sequence, k_index + key, keys, &rules);
        for (i64 query = 0; query < count; query += ROWS) {
            i64 rows = least(ROWS, count - query);
            const i64 *index = q_index + query;
            pack_rows(p->q + q_first * dim, index, rows, dim, dim, p->scale * LOG2_E, q);
            multiply(rows, keys, dim, q, dim, 1, k, PANEL, dim * PANEL, scores, KEYS, PANEL, 0);
            for (i64 i = 0; i < rows; i++) {
                float *score = scores + i * KEYS, *sum = sums + i * stride;
                i64 row = q_first + index[i];
                if (ruled) hide(p, &rules, sequence, index[i], keys, score);
                for (i64 j = keys; j < round_up(keys, LANES); j++) score[j] = 2 * HIDDEN;
                vec tops = VEC(score), masses = {0};
                for (i64 j = LANES; j < keys; j += LANES) tops = larger(VEC(score + j), tops);
                float top = first ? tops[0] : p->lse[row], mass = 0;
                for (int lane = 0; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
                for (i64 j = 0; j < keys; j += LANES) masses += VEC(score + j) = exp2_of(VEC(score + j) - top);
                for (int lane = 0; lane < LANES; lane++) mass += masses[lane];
                if (first)
                    memset(sum, 0, 4 * stride);
                else {
                    float fade = exp2_of_one(p->lse[row] - top), *before = p->out + row * value_dim;
                    mass += fade * p->mass[row];
                    for (i64 d = 0; d < value_dim; d++) sum[d] = fade * before[d];
                }
                p->lse[row] = top;
                p->mass[row] = mass;
            }
            multiply(rows, value_dim, keys, scores, KEYS, 1, v, stride, PANEL, sums, stride, PANEL, 1);
            for (i64 i = 0; i < rows; i++) {
                i64 row = q_first + index[i];
                float top = p->lse[row], factor = 1;
                if (last) {
                    factor = top < HIDDEN / 2 ? 0 : 1 / p->mass[row];
                    p->lse[row] = top < HIDDEN / 2 ? -INFINITY : LN_2 * (top + log2f(p->mass[row]));
                }
                for (i64 d = 0; d < value_dim; d++) p->out[row * value_dim + d] = factor * sums[i * stride + d];
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
    i64 dim = p->key_dim, value_dim = p->value_dim;
    i64 stride = round_up(dim, LANES), value_stride = round_up(value_dim, LANES), ruled = has_rules(p, round);
    i64 q_first = sequence * p->num_queries, k_first = sequence * p->num_keys;
    Rules rules = {.blocks = (int32_t *)take(&scratch, p->rounds * KEYS)};
    float *k = take(&scratch, KEYS * stride), *k_columns = take(&scratch, KEYS * dim);
    float *v_columns = take(&scratch, KEYS * value_dim);
    float *dk = take(&scratch, KEY_ROWS * stride), *dv = take(&scratch, KEY_ROWS * value_stride);
    float *q = take(&scratch, QUERIES * stride), *dq = take(&scratch, QUERIES * stride);
    float *grad_out = take(&scratch, QUERIES * value_stride);
    float *weights = take(&scratch, QUERIES * KEYS + ROWS), *grad_scores = take(&scratch, QUERIES * KEYS + ROWS);
    const float *keys = p->k + k_first * dim, *values = p->v + k_first * value_dim;
    pack_rows(keys, k_index, count, dim, stride, 1, k);
    pack_columns(keys, k_index, count, dim, k_columns);
    pack_columns(values, k_index, count, value_dim, v_columns);
    if (ruled) gather_rules(p, round, sequence, k_index, count, &rules);
    for (i64 query = 0; query < p->block_queries; query += QUERIES) {
        i64 rows = least(QUERIES, p->block_queries - query);
        const i64 *index = q_index + query;
        pack_rows(p->q + q_first * dim, index, rows, dim, stride, p->scale * LOG2_E, q);
        pack_rows(p->grad_out + q_first * value_dim, index, rows, value_dim, value_stride, 1, grad_out);
        multiply(rows, count, dim, q, stride, 1, k_columns, PANEL, dim * PANEL, weights, KEYS, PANEL, 0);
        multiply(rows, count, value_dim, grad_out, value_stride, 1, v_columns, PANEL, value_dim * PANEL, grad_scores,
                 KEYS, PANEL, 0);
        for (i64 i = 0; i < rows; i++) {
            float *weight = weights + i * KEYS, *grad = grad_scores + i * KEYS;
            float shift = p->shift[q_first + index[i]], delta = p->delta[q_first + index[i]];
            if (ruled) hide(p, &rules, sequence, index[i], count, weight);
            for (i64 j = 0; j < count; j += LANES) {
                vec w = exp2_of(VEC(weight + j) - shift);
                VEC(weight + j) = w;
                VEC(grad + j) = w * (VEC(grad + j) - delta);
            }
        }
        multiply(rows, dim, count, grad_scores, KEYS, 1, k, stride, PANEL, dq, stride, PANEL, 0);
        multiply(count, dim, rows, grad_scores, 1, KEYS, q, stride, PANEL, dk, stride, PANEL, query > 0);
        multiply(count, value_dim, rows, weights, 1, KEYS, grad_out, value_stride, PANEL, dv, value_stride, PANEL,
                 query > 0);
        put_rows(dq, rows, stride, dim, index, p->scale, !first, grad_q + q_first * dim);
    }
    put_rows(dk, count, stride, dim, k_index, LN_2, round > 0, p->grad_k + k_first * dim);
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
