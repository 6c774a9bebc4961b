/* Attention of one head at a time. Queries lie in the lanes, so that the softmax needs no sums across lanes: KEYS keys
   at a time meet QUERIES queries, then KEYS columns of the values meet the weights of the softmax. Numbers are bf16
   where PAIRS, else float; norms, sums and the softmax are float. Memory: a head's keys and values, and QUERIES rows
   of scores. */
#include "heads.h"

/* 16 queries or 32: with more, most lanes of the last ones would be empty. */
enum { QUERY_VECTORS = LANES == 4 ? 4 : 2, QUERIES = QUERY_VECTORS * LANES };
#ifdef USE_AMX
enum { KEYS = BLOCK_ROWS };
#else
enum { KEYS = TILE_VECTORS > QUERY_VECTORS ? 8 : TILE_ROWS };
#endif

typedef struct {
    int64_t tokens, columns, width, value_width; /* width: columns padded for keys and queries */
    Low *keys;     /* (padded tokens, width) */
    Low *values;   /* (padded tokens / W, value_width, W); by AMX (padded columns, value_width) */
    Low *row;      /* (LANES, width), of queries */
    Low *queries;  /* (width / W, QUERIES, W) */
    float *scores; /* (padded tokens, QUERIES); in their place the weights, Low (padded tokens / W, QUERIES, W) */
    float *out;    /* (padded columns, QUERIES) */
} Head;

/* 2ᵗ, where PAIRS by a polynomial of degree 3 (7.5e-5), because bf16 rounds it. */
FN VF softmax_weight(VF t)
{
#if PAIRS
    t = limited(t);
    VF n = rounded(t), r = t - n;
    VF p = r * 5.5171667509e-2f + 2.4261112216e-1f;
    p = p * r + 6.9326098589e-1f;
    return scaled(p * r + 9.9992807361e-1f, n);
#else
    return power_of_two(t);
#endif
}

#ifdef USE_AMX
/* to (KEYS, QUERIES) = a b: a of `count` rows, `row` numbers apart; in both `pairs` of neighbors k lie side by side, and
   fill registers */
FN void head_block(float *to, const Low *a, int64_t row, int64_t count, const Low *b, int64_t pairs)
{
    Left left = left_of(a, 2 * row, count);
    FENCE;
    clear_block();
    for (int64_t at = 0; at < 4 * pairs; at += 64) multiply_block(left, at, b, 1, QUERY_VECTORS, BOTH);
    store_block((char *)to, 4 * QUERIES, QUERY_VECTORS);
}
#else
/* acc[i][j] = Σ_k a[i · row + k · step] b[k][j], b of QUERIES columns; W neighbors k lie side by side in both */
FN void head_tile(VF acc[KEYS][QUERY_VECTORS], const Low *a, int64_t row, int64_t step, const Low *b, int64_t steps)
{
    const Low *rows[KEYS];
    UNROLL for (int i = 0; i < KEYS; i++) {
        rows[i] = a + i * row;
        UNROLL for (int j = 0; j < QUERY_VECTORS; j++) acc[i][j] = (VF){0};
    }
    for (int64_t k = 0; k < steps; k++) {
        VI columns[QUERY_VECTORS];
        UNROLL for (int j = 0; j < QUERY_VECTORS; j++) columns[j] = load_int(b + (k * QUERIES + j * LANES) * W);
        UNROLL for (int i = 0; i < KEYS; i++) {
            VI x = broadcast(rows[i] + k * step);
            UNROLL for (int j = 0; j < QUERY_VECTORS; j++) acc[i][j] = multiply_add(acc[i][j], x, columns[j]);
        }
    }
}
#endif

/* Behind the last key a tile has copies of it: they leave the largest score as it is. */
FN void pack_keys(const Head *own, const Part *k)
{
    int64_t T = own->tokens, t;
    for (t = 0; t < T; t += LANES) prepare(k, own->keys + t * own->width, own->width, t, least(T - t, LANES));
    for (t = T; t < padded(T, KEYS); t++) prepare(k, own->keys + t * own->width, own->width, T - 1, 1);
}

#ifdef USE_AMX
/* Pairs of tokens lie in the lanes, a column of each head after the other, and are transposed. */
FN void pack_values(const Head *own, const Part *v)
{
    int64_t T = own->tokens, H = own->columns;
    for (int64_t t = 0; t < T; t += 2 * LANES)
        for (int64_t d = 0; d < H; d += LANES) {
            VF block[LANES];
            UNROLL for (int i = 0; i < LANES; i++) {
                const Low *x = v->x + (t + 2 * i) * v->stride + d;
                VF first = load_halves(x, t + 2 * i < T ? H - d : 0);
                VF second = load_halves(x + v->stride, t + 2 * i + 1 < T ? H - d : 0);
                block[i] = (VF)((VU)first >> 16 | (VU)second);
            }
            transpose(block);
            Low *to = own->values + d * own->value_width + t;
            UNROLL for (int i = 0; i < LANES; i++) memcpy(to + i * own->value_width, block + i, sizeof *block);
        }
}
#else
FN void pack_values(const Head *own, const Part *v)
{
    for (int64_t t = 0; t < own->tokens; t += W) {
        const Low *x = v->x + t * v->stride;
        Low *to = own->values + t * own->value_width;
        for (int64_t d = 0; d < own->columns; d++) {
            to[d * W] = x[d];
            if (W == 2) to[d * W + 1] = t + 1 < own->tokens ? x[v->stride + d] : 0;
        }
    }
}
#endif

/* QUERIES queries from t on; behind the last token the lanes keep what was there. */
FN void pack_queries(const Head *own, const Part *q, int64_t t)
{
    for (int64_t j = 0; j < QUERY_VECTORS && t + j * LANES < own->tokens; j++) {
        prepare(q, own->row, own->width, t + j * LANES, least(own->tokens - t - j * LANES, LANES));
        for (int64_t k = 0; k < own->width; k += LANES * W) {
            VF block[LANES];
            UNROLL for (int i = 0; i < LANES; i++) memcpy(block + i, own->row + i * own->width + k, sizeof *block);
            transpose(block);
            UNROLL for (int i = 0; i < LANES; i++)
                memcpy(own->queries + (k / W + i) * QUERIES * W + j * LANES * W, block + i, sizeof *block);
        }
    }
}

/* Scores, and the largest one of each query. */
FN void multiply_keys(const Head *own, VF most[QUERY_VECTORS])
{
    UNROLL for (int j = 0; j < QUERY_VECTORS; j++) most[j] = splat(-INFINITY);
    for (int64_t t = 0; t < own->tokens; t += KEYS) {
        const Low *keys = own->keys + t * own->width;
        float *to = own->scores + t * QUERIES;
#ifdef USE_AMX
        head_block(to, keys, own->width, KEYS, own->queries, own->width / 2);
        for (int i = 0; i < KEYS; i++)
            UNROLL for (int j = 0; j < QUERY_VECTORS; j++)
                most[j] = at_least(load(to + i * QUERIES + j * LANES), most[j]);
#else
        VF acc[KEYS][QUERY_VECTORS];
        head_tile(acc, keys, own->width, W, own->queries, padded(own->columns, W) / W);
        UNROLL for (int i = 0; i < KEYS; i++)
            UNROLL for (int j = 0; j < QUERY_VECTORS; j++) {
                store(to + i * QUERIES + j * LANES, acc[i][j]);
                most[j] = at_least(acc[i][j], most[j]);
            }
#endif
    }
}

/* Weights 2^((score − most) · scale) in place of the scores, and their sums, of what they were rounded to. */
FN void softmax(const Head *own, const VF most[QUERY_VECTORS], VF total[QUERY_VECTORS])
{
    const VI ones = splat_int(PAIRS ? 0x3f803f80 : 0x3f800000);
    float scale = 1.44269504f / sqrtf((float)own->columns), *from = own->scores, *to = own->scores;
    VF offset[QUERY_VECTORS];
    UNROLL for (int j = 0; j < QUERY_VECTORS; j++) offset[j] = most[j] * -scale, total[j] = (VF){0};
    for (int64_t t = 0; t < own->tokens; t += W, from += W * QUERIES, to += QUERIES)
        UNROLL for (int j = 0; j < QUERY_VECTORS; j++) {
            VF weight = softmax_weight(load(from + j * LANES) * scale + offset[j]);
#if PAIRS
            VF second = {0};
            if (t + 1 < own->tokens) second = softmax_weight(load(from + QUERIES + j * LANES) * scale + offset[j]);
            weight = (VF)(((VU)weight + 0x8000) >> 16 | (((VU)second + 0x8000) & 0xffff0000));
#endif
            total[j] = multiply_add(total[j], (VI)weight, ones);
            store(to + j * LANES, weight);
        }
#ifdef USE_AMX
    for (int64_t t = padded(own->tokens, W); t < padded(own->tokens, KEYS); t += W, to += QUERIES)
        UNROLL for (int j = 0; j < QUERY_VECTORS; j++) store(to + j * LANES, (VF){0});
#endif
}

/* Weights times values, over the sums of the weights, to rows of `stride` of the tokens from t on. */
FN void multiply_values(const Head *own, const VF total[QUERY_VECTORS], float *out, int64_t stride, int64_t t)
{
    const Low *weights = (const Low *)own->scores;
    for (int64_t d = 0; d < own->columns; d += KEYS) {
#ifdef USE_AMX
        const Low *values = own->values + d * own->value_width;
        int64_t pairs = padded(own->tokens, KEYS) / 2;
        head_block(own->out + d * QUERIES, values, own->value_width, own->columns - d, weights, pairs);
#else
        VF acc[KEYS][QUERY_VECTORS];
        head_tile(acc, own->values + d * W, W, own->value_width * W, weights, padded(own->tokens, W) / W);
        UNROLL for (int i = 0; i < KEYS; i++)
            UNROLL for (int j = 0; j < QUERY_VECTORS; j++) store(own->out + (d + i) * QUERIES + j * LANES, acc[i][j]);
#endif
    }
    for (int64_t j = 0; j < QUERY_VECTORS; j++) {
        VF inverse = 1.f / total[j];
        for (int64_t d = 0; d < own->columns; d += LANES) {
            VF block[LANES];
            UNROLL for (int i = 0; i < LANES; i++) block[i] = load(own->out + (d + i) * QUERIES + j * LANES) * inverse;
            transpose(block);
            UNROLL for (int64_t i = 0; i < LANES; i++)
                if (t + j * LANES + i < own->tokens)
                    store_upto(out + (t + j * LANES + i) * stride + d, block[i], own->columns - d);
        }
    }
}

/* Tokens t … end of a pair of image and head, if there is such a pair. */
FN void prefetch_tokens(const Attention *a, int64_t pair, int64_t t, int64_t end)
{
    for (int64_t number = 0; pair < a->images * a->heads && number < 3; number++) {
        Part part = part_of(a, pair, number);
        prefetch(&part, t, least(end, a->tokens));
    }
}

/* One pair of image and head; what pair `next` reads is fetched meanwhile. */
FN void attend(const Attention *a, int64_t pair, int64_t next, const Head *own)
{
    int64_t T = a->tokens, stride = a->heads * a->head;
    Part q = part_of(a, pair, 0), k = part_of(a, pair, 1), v = part_of(a, pair, 2);
    float *out = a->out + pair / a->heads * T * stride + pair % a->heads * a->head;
    pack_keys(own, &k);
    pack_values(own, &v);
    for (int64_t t = 0; t < T; t += QUERIES) {
        VF most[QUERY_VECTORS], total[QUERY_VECTORS];
        prefetch_tokens(a, next, t, t + QUERIES);
        pack_queries(own, &q, t);
        multiply_keys(own, most);
        softmax(own, most, total);
        multiply_values(own, total, out, stride, t);
    }
}

FN void *zeros(int64_t bytes)
{
    size_t size = (size_t)padded(bytes, 64);
    void *start = aligned_alloc(64, size);
    return start ? memset(start, 0, size) : 0;
}

WORK int attend_some(const Attention *shared, int64_t *next)
{
    const Attention kept = *shared, *a = &kept; /* which no store can change */
    int64_t T = padded(a->tokens, W * KEYS), H = a->head, pairs = a->images * a->heads, low = sizeof(Low);
    Head own = {.tokens = a->tokens, .columns = H, .width = padded(H, W * LANES), .value_width = padded(H, KEYS)};
    int64_t rows = T;
#ifdef USE_AMX
    own.value_width = T, rows = padded(H, KEYS);
#endif
    own.keys = zeros(T * own.width * low), own.values = zeros(rows * own.value_width * low);
    own.row = zeros(LANES * own.width * low), own.queries = zeros(QUERIES * own.width * low);
    own.scores = zeros(T * QUERIES * 4), own.out = zeros((padded(H, KEYS) + LANES) * QUERIES * 4);
    int failed = !own.keys || !own.values || !own.row || !own.queries || !own.scores || !own.out;
    int64_t pair = take(next, pairs);
    begin();
    prefetch_tokens(a, pair, 0, a->tokens);
    for (int64_t then; !failed && pair < pairs; pair = then) attend(a, pair, then = take(next, pairs), &own);
    end();
    free(own.keys), free(own.values), free(own.row), free(own.queries), free(own.scores), free(own.out);
    return failed;
}

int EXPORT(attend)(const Attention *a) PARALLEL(attend_some, a)
