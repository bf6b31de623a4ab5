/* Clustered attention on a CPU, forward and backward, in float32: attention/smyrf/native.py calls it.

   A cluster's keys and values are gathered, a chunk of them at a time, where they stay in a core's cache, and every
   product is computed in registers. Nothing else of the size of the gathered tokens, or of the scores, ever exists.

   Forward, a query's sums are kept relative to its largest score so far, at its own place, and grow with every chunk of
   keys and every round. Backward, with the merged output O and log-sum-exp L, every chunk's weights are exp(s - L):
   dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - δ),  dQ = dS K,  dK = dSᵀ Q,  δ = rowsum(dO ∘ O) - dL.
   Every token is in one cluster a round, and rounds follow each other, so that no two threads write to one place and
   results do not depend on who comes first.

   Exponentials are to base 2; queries are scaled by log2(e) as they are gathered.

   Legend: G = B·H sequences; R rounds of S = G·L blocks; M queries and N keys a block. */

#include "../native.h"

#define KEYS 128      /* of a chunk; a multiple of every PANEL */
#define KEY_ROWS 132  /* the next multiple of ROWS */
#define SCORES 144    /* floats from one query's scores to the next one's: `row_of` KEY_ROWS */
#define QUERIES 48    /* of a tile in the backward pass; a multiple of ROWS */
#define SPAN 512      /* keys that are gathered at a time in the forward pass, or fewer; a multiple of KEYS */
#define CACHED 65536  /* floats of gathered keys and values that stay in a core's second cache */
#define TILE 24       /* queries of a tile there; a multiple of ROWS */
#define HIDDEN -1e30f /* the score of a pair that does not count; finite, so that differences are numbers */

/* Where the tokens of (B, H, N, ..) lie: floats from one to the next along B, H and N. */
typedef struct {
    i64 batch, head, token;
} Strides;

/* Field by field as _Problem in native.py. */
typedef struct {
    const float *q, *k, *v;         /* (B, H, Nq, D), (B, H, Nk, D), (B, H, Nk, Dv), of any strides but the last, 1 */
    const i64 *q_index, *k_index;   /* (R·S, M), (R·S, N): tokens of the block's sequence */
    const uint8_t *key_mask;        /* (B, Nk), 1 = ignored; or NULL */
    int32_t *q_blocks, *k_blocks;   /* (R, G·Nq), (R, G·Nk): where a pair counts once, every token's block; or NULL */
    float *out, *lse;               /* (B, H, Nq, Dv), (G·Nq) */
    float *mass;                    /* (G·Nq): forward, sums of the weights */
    const float *grad_out;          /* (B, H, Nq, Dv) */
    const float *grad_lse;          /* (G·Nq), or NULL */
    float *shift, *delta;           /* (G·Nq): backward, L to base 2, and δ */
    float *grad_q, *grad_k, *grad_v; /* grad_q once for each of the `key_parts`, to be summed */
    float *scratch;                 /* as many times `smyrf_scratch` as threads */
    i64 batch, heads, num_queries, num_keys, key_dim, value_dim;
    i64 rounds, blocks, block_queries, block_keys; /* R, S, M, N */
    i64 lag;                        /* query i sees the keys j <= i - lag; negative: all */
    i64 key_parts;                  /* runs of a block's keys that different threads take in the backward pass */
    i64 threads;
    Strides q_strides, k_strides, v_strides, out_strides, grad_out_strides;
    Strides grad_q_strides, grad_k_strides, grad_v_strides;
    float scale;
} Problem;

/* The tokens of a sequence. */
typedef struct {
    float *x;
    i64 stride, dim;
} Rows;

static Rows rows_of(const Problem *p, const float *x, Strides s, i64 dim, i64 sequence) {
    return (Rows){(float *)x + sequence / p->heads * s.batch + sequence % p->heads * s.head, s.token, dim};
}

INLINE float *row_at(Rows rows, i64 token) { return rows.x + token * rows.stride; }

/* Some rows, times a number. */
static void gather_rows(Rows rows, const i64 *index, i64 count, float factor, float *out, i64 stride) {
    for (i64 i = 0; i < count; i++, out += stride) {
        const float *row = row_at(rows, index[i]);
        for (i64 d = 0; d < rows.dim; d++) out[d] = factor * row[d];
    }
}

/* Some rows as the columns of a packed right factor, and zeros up to a whole panel. */
static void gather_columns(Rows rows, const i64 *index, i64 count, float *out) {
    for (i64 first = 0; first < count; first += PANEL, out += rows.dim * PANEL)
        for (i64 j = 0; j < PANEL; j++) {
            const float *row = first + j < count ? row_at(rows, index[first + j]) : NULL;
            for (i64 d = 0; d < rows.dim; d++) out[d * PANEL + j] = row ? row[d] : 0;
        }
}

/* For rows to be in the cache when their time comes. */
static void prefetch_rows(Rows rows, const i64 *index, i64 count) {
    for (i64 i = 0; i < count; i++)
        for (i64 d = 0; d < rows.dim; d += 16) __builtin_prefetch(row_at(rows, index[i]) + d);
}

/* What is to be known of gathered keys, to say which pairs count. */
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

/* Hides the scores of one query with `count` keys, from the gathered key `first` on, where the pair does not count. */
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

/* Keys that are gathered at a time in the forward pass. */
static i64 span_of(i64 key_dim, i64 value_dim) {
    i64 chunks = CACHED / (KEYS * (key_dim + row_of(value_dim)));
    return chunks < 1 ? KEYS : least(chunks * KEYS, SPAN);
}

/* Floats of scratch memory that a thread needs. */
i64 smyrf_scratch(i64 key_dim, i64 value_dim, i64 rounds) {
    i64 dims = row_of(key_dim) + row_of(value_dim);
    i64 forward = span_of(key_dim, value_dim) * dims + TILE * (dims + SCORES);
    i64 backward = KEY_ROWS * 3 * dims + QUERIES * 2 * (dims + SCORES);
    return SPAN * rounds + (forward > backward ? forward : backward) + 16 * 32;
}

/* One query's scores with `count` keys become weights relative to the largest score so far; what its sums count before
   is brought to the new one. */
INLINE void weigh(float *score, i64 count, float *top, float *mass, float *sum, i64 value_dim) {
    for (i64 j = count; j < round_up(count, LANES); j++) score[j] = 2 * HIDDEN;
    vec tops = VEC(score), masses = {0};
    for (i64 j = LANES; j < count; j += LANES) tops = larger(VEC(score + j), tops);
    float before = *top, now = largest_of(tops);
    if (now > before) {
        *top = now;
        float fade = exp2_of_one(before - *top);
        *mass *= fade;
        for (i64 d = 0; d < value_dim; d++) sum[d] *= fade;
    }
    for (i64 j = 0; j < count; j += LANES) {
        vec weight = exp2_of(VEC(score + j) - *top);
        masses += weight;
        VEC(score + j) = weight;
    }
    *mass += sum_of(masses);
}

/* `count` queries of a block with all its keys, in one round. */
static void forward_queries(const Problem *p, i64 round, i64 sequence, const i64 *q_index, const i64 *k_index,
                            i64 count, float *scratch) {
    i64 dim = p->key_dim, value_dim = p->value_dim, q_stride = row_of(dim), stride = row_of(value_dim);
    i64 first_row = sequence * p->num_queries, ruled = has_rules(p, round), span = span_of(dim, value_dim);
    Rows queries = rows_of(p, p->q, p->q_strides, dim, sequence), keys = rows_of(p, p->k, p->k_strides, dim, sequence);
    Rows values = rows_of(p, p->v, p->v_strides, value_dim, sequence);
    Rows out = rows_of(p, p->out, p->out_strides, value_dim, sequence);
    float *lse = p->lse + first_row, *mass = p->mass + first_row;
    Rules rules = {.blocks = (int32_t *)take(&scratch, p->rounds * SPAN)};
    float *k = take(&scratch, span * dim), *v = take(&scratch, span * stride), *q = take(&scratch, TILE * q_stride);
    float *scores = take(&scratch, TILE * SCORES), *sums = take(&scratch, TILE * stride);
    for (i64 start = 0; start < p->block_keys; start += span) {
        i64 gathered = least(span, p->block_keys - start);
        int first = round == 0 && start == 0, last = round + 1 == p->rounds && start + gathered == p->block_keys;
        prefetch_rows(keys, k_index + start, gathered);
        prefetch_rows(queries, q_index, least(TILE, count));
        if (!first) prefetch_rows(out, q_index, least(TILE, count));
        for (i64 key = 0; key < gathered; key += KEYS)
            gather_columns(keys, k_index + start + key, least(KEYS, gathered - key), k + key * dim);
        gather_rows(values, k_index + start, gathered, 1, v, stride);
        if (ruled) gather_rules(p, round, sequence, k_index + start, gathered, &rules);
        for (i64 query = 0; query < count; query += TILE) {
            i64 rows = least(TILE, count - query), next = least(TILE, count - query - rows);
            const i64 *index = q_index + query;
            prefetch_rows(queries, index + rows, next);
            if (!first) prefetch_rows(out, index + rows, next);
            gather_rows(queries, index, rows, p->scale * LOG2_E, q, q_stride);
            for (i64 i = 0; i < rows; i++) {
                if (first) {
                    lse[index[i]] = 2 * HIDDEN;
                    mass[index[i]] = 0;
                    memset(sums + i * stride, 0, 4 * stride);
                } else
                    memcpy(sums + i * stride, row_at(out, index[i]), 4 * value_dim);
            }
            for (i64 key = 0; key < gathered; key += KEYS) {
                i64 chunk = least(KEYS, gathered - key);
                multiply(rows, chunk, dim, by_rows(q, q_stride), packed(k + key * dim, dim), scores, SCORES, PANEL, 0);
                for (i64 i = 0; i < rows; i++) {
                    if (ruled) hide(p, &rules, sequence, index[i], key, chunk, scores + i * SCORES);
                    weigh(scores + i * SCORES, chunk, lse + index[i], mass + index[i], sums + i * stride, value_dim);
                }
                multiply(rows, value_dim, chunk, by_rows(scores, SCORES), of_rows(v + key * stride, stride), sums,
                         stride, PANEL, 1);
            }
            for (i64 i = 0; i < rows; i++) {
                float top = lse[index[i]], factor = 1, *row = row_at(out, index[i]);
                if (last) {
                    factor = top < HIDDEN / 2 ? 0 : 1 / mass[index[i]];
                    lse[index[i]] = top < HIDDEN / 2 ? -INFINITY : LN_2 * (top + log2f(mass[index[i]]));
                }
                for (i64 d = 0; d < value_dim; d++) row[d] = factor * sums[i * stride + d];
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

/* Adds x (count, stride), times a number, to some rows, or writes it there. */
static void put_rows(const float *x, i64 count, i64 stride, const i64 *index, float factor, int add, Rows rows) {
    for (i64 i = 0; i < count; i++, x += stride) {
        float *row = row_at(rows, index[i]);
        if (add)
            for (i64 d = 0; d < rows.dim; d++) row[d] += factor * x[d];
        else
            for (i64 d = 0; d < rows.dim; d++) row[d] = factor * x[d];
    }
}

/* Up to KEYS keys of a block with all its queries, in one round; `grad_q` has what earlier keys gave, unless first. */
static void backward_keys(const Problem *p, i64 round, i64 sequence, const i64 *q_index, const i64 *k_index, i64 count,
                          Rows grad_q, int first, float *scratch) {
    i64 dim = p->key_dim, value_dim = p->value_dim, stride = row_of(dim), value_stride = row_of(value_dim);
    i64 first_row = sequence * p->num_queries, ruled = has_rules(p, round);
    Rules rules = {.blocks = (int32_t *)take(&scratch, p->rounds * SPAN)};
    float *k = take(&scratch, KEYS * stride), *k_columns = take(&scratch, KEYS * dim);
    float *v_columns = take(&scratch, KEYS * value_dim);
    float *dk = take(&scratch, KEY_ROWS * stride), *dv = take(&scratch, KEY_ROWS * value_stride);
    float *q = take(&scratch, QUERIES * stride), *grad = take(&scratch, QUERIES * value_stride);
    float *dq = take(&scratch, QUERIES * stride);
    float *weights = take(&scratch, QUERIES * SCORES), *grad_scores = take(&scratch, QUERIES * SCORES);
    Rows queries = rows_of(p, p->q, p->q_strides, dim, sequence), keys = rows_of(p, p->k, p->k_strides, dim, sequence);
    Rows values = rows_of(p, p->v, p->v_strides, value_dim, sequence);
    Rows grad_out = rows_of(p, p->grad_out, p->grad_out_strides, value_dim, sequence);
    prefetch_rows(keys, k_index, count);
    prefetch_rows(values, k_index, count);
    prefetch_rows(queries, q_index, least(QUERIES, p->block_queries));
    prefetch_rows(grad_out, q_index, least(QUERIES, p->block_queries));
    gather_rows(keys, k_index, count, 1, k, stride);
    gather_columns(keys, k_index, count, k_columns);
    gather_columns(values, k_index, count, v_columns);
    if (ruled) gather_rules(p, round, sequence, k_index, count, &rules);
    for (i64 query = 0; query < p->block_queries; query += QUERIES) {
        i64 rows = least(QUERIES, p->block_queries - query), next = least(QUERIES, p->block_queries - query - rows);
        const i64 *index = q_index + query;
        prefetch_rows(queries, index + rows, next);
        prefetch_rows(grad_out, index + rows, next);
        if (!first) prefetch_rows(grad_q, index + rows, next);
        gather_rows(queries, index, rows, p->scale * LOG2_E, q, stride);
        gather_rows(grad_out, index, rows, 1, grad, value_stride);
        multiply(rows, count, dim, by_rows(q, stride), packed(k_columns, dim), weights, SCORES, PANEL, 0);
        multiply(rows, count, value_dim, by_rows(grad, value_stride), packed(v_columns, value_dim), grad_scores, SCORES,
                 PANEL, 0);
        for (i64 i = 0; i < rows; i++) {
            float *weight = weights + i * SCORES, *grad_score = grad_scores + i * SCORES;
            float shift = p->shift[first_row + index[i]], delta = p->delta[first_row + index[i]];
            if (ruled) hide(p, &rules, sequence, index[i], 0, count, weight);
            for (i64 j = count; j < round_up(count, LANES); j++) weight[j] = 2 * HIDDEN;
            for (i64 j = 0; j < count; j += LANES) {
                VEC(weight + j) = exp2_of(VEC(weight + j) - shift);
                VEC(grad_score + j) = VEC(weight + j) * (VEC(grad_score + j) - delta);
            }
        }
        Left scores = by_rows(grad_scores, SCORES);
        multiply(rows, dim, count, scores, of_rows(k, stride), dq, stride, PANEL, 0);
        multiply_turned(count, dim, rows, scores, of_rows(q, stride), dk, stride, PANEL, query > 0);
        multiply_turned(count, value_dim, rows, by_rows(weights, SCORES), of_rows(grad, value_stride), dv, value_stride,
                        PANEL, query > 0);
        put_rows(dq, rows, stride, index, p->scale, !first, grad_q);
    }
    put_rows(dk, count, stride, k_index, LN_2, round > 0, rows_of(p, p->grad_k, p->grad_k_strides, dim, sequence));
    put_rows(dv, count, value_stride, k_index, 1, round > 0,
             rows_of(p, p->grad_v, p->grad_v_strides, value_dim, sequence));
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
            i64 sequence = row / p->num_queries, token = row % p->num_queries;
            const float *out = row_at(rows_of(p, p->out, p->out_strides, value_dim, sequence), token);
            const float *grad = row_at(rows_of(p, p->grad_out, p->grad_out_strides, value_dim, sequence), token);
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
                i64 sequence = block * sequences / p->blocks;
                const float *of_part = p->grad_q + item % parts * rows * p->key_dim;
                Rows grad_q = rows_of(p, of_part, p->grad_q_strides, p->key_dim, sequence);
                for (i64 key = start; key < least(start + part, p->block_keys); key += KEYS)
                    backward_keys(p, round, sequence, p->q_index + b * p->block_queries,
                                  p->k_index + b * p->block_keys + key, least(KEYS, p->block_keys - key), grad_q,
                                  round == 0 && key == start, scratch);
            }
        }
    }
}
