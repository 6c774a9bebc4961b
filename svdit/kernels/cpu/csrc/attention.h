/* Attention of one head at a time: keys, normed and turned, transposed into panels, TILE_ROWS queries against all
   tokens, softmax in the buffer of scores, then the product with the values. Numbers are bf16 where PAIRS, else float;
   norms, sums and the softmax are float. Memory: a head's keys and values, and TILE_ROWS rows of scores. */

typedef struct {
    Low *keys;     /* (panels of tokens, head / W, PANEL, W), padded with zeros */
    Low *values;   /* (tokens / W, padded head, W), padded with zeros */
    Low *queries;  /* (TILE_ROWS, padded head); before that, one key */
    float *scores; /* (TILE_ROWS, padded tokens); in their place the weights, which are Low */
} Head;

/* Scores become weights 2^((score − largest) · scale), in place; returns one over their sum. What stands behind the
   last token adds less than rounding. */
FN float softmax(float *scores, int64_t tokens, int64_t columns, float scale)
{
    VF most = splat(-INFINITY), total = {0};
    for (int64_t t = tokens; t < columns; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < columns; t += LANES) most = at_least(load(scores + t), most);
    VF top = splat(largest(most));
    for (int64_t t = 0; t < columns; t += LANES) {
        VF e = power_of_two((load(scores + t) - top) * scale);
        to_low((Low *)scores + t, e);
        total += e;
    }
    return 1.f / sum(total);
}

/* Query or key (`part` 0 or 1) of token t of one head, normed and turned, to (padded head), padded with zeros. */
FN Low *prepare(const Attention *a, Low *to, const Low *x, int64_t t, int64_t part)
{
    int64_t H = a->head;
    if (!a->weight && !a->cos) return memcpy(to, x, (size_t)H * sizeof(Low));
    const VF sign = (VF)((VI)splat(1.f) | (((NUMBERS & 1) - 1) & (int32_t)0x80000000)); /* −1 in even lanes */
    Row row = row_at(x, PAIRS, 0, H);
    if (a->weight) moments(&row, !a->bias, a->bias ? 1e-5f : 1e-6f);
    for (int64_t k = 0, left; (left = H - k) > 0; k += LANES) {
        VF v = element(&row, k, left);
        if (a->weight) v = (v - row.mean) * row.inverse * load_upto(a->weight + part * H + k, left);
        if (a->bias) v += load_upto(a->bias + part * H + k, left);
        if (a->cos) {
            VF sin = load_upto(a->sin + t * H + k, left) * sign;
            v = v * load_upto(a->cos + t * H + k, left) + ordered(v, across(1)) * sin;
        }
        to_low(to + k, v);
    }
    return to;
}

FN void pack_head(const Attention *a, const Head *to, const Low *k, const Low *v, int64_t stride)
{
    int64_t T = a->tokens, H = a->head, steps = padded(H, W) / W, Hp = padded(H, LANES);
    for (int64_t t = 0; t < T; t++) {
        const Low *key = prepare(a, to->queries, k + t * stride, t, 1);
        Low *cell = to->keys + (t / PANEL * steps * PANEL + t % PANEL) * W;
        for (int64_t d = 0; d < H / W; d++) memcpy(cell + d * PANEL * W, key + d * W, W * sizeof(Low));
        if (H % W) cell[H / W * PANEL * W] = key[H - 1];
    }
    for (int64_t t = 0; t < T; t += W)
        for (int64_t i = 0; i < least(W, T - t); i++)
            for (int64_t d = 0; d < H; d++) to->values[t * Hp + d * W + i] = v[(t + i) * stride + d];
}

FN void attend(const Attention *a, int64_t pair, const Head *own)
{
    int64_t T = a->tokens, H = a->head, Tp = padded(T, PANEL), Hp = padded(H, LANES), stride = 3 * a->heads * H;
    int64_t Tw = padded(T, W) / W, Hw = padded(H, W) / W;
    const Low *q = (const Low *)a->qkv + pair / a->heads * T * stride + pair % a->heads * H;
    float *out = a->out + pair / a->heads * T * a->heads * H + pair % a->heads * H;
    pack_head(a, own, q + a->heads * H, q + 2 * a->heads * H, stride);
    for (int64_t m = 0; m < T; m += TILE_ROWS) {
        const Low *queries[TILE_ROWS], *weights[TILE_ROWS];
        float inverse[TILE_ROWS];
        for (int64_t i = 0; i < TILE_ROWS; i++) {
            int64_t t = least(m + i, T - 1);
            queries[i] = prepare(a, own->queries + i * Hp, q + t * stride, t, 0);
            weights[i] = (const Low *)(own->scores + i * Tp);
        }
        for (int64_t n = 0; n < Tp; n += PANEL) {
            VF acc[TILE_ROWS][TILE_VECTORS] = {0};
            low_tile(acc, queries, own->keys + n * Hw * W, Hw, PANEL, TILE_VECTORS);
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                UNROLL for (int j = 0; j < TILE_VECTORS; j++) store(own->scores + i * Tp + n + j * LANES, acc[i][j]);
        }
        for (int64_t i = 0; i < TILE_ROWS; i++)
            inverse[i] = softmax(own->scores + i * Tp, T, Tp, 1.44269504f / sqrtf((float)H));
        for (int64_t d = 0, width; d < Hp; d += width) {
            VF acc[TILE_ROWS][TILE_VECTORS] = {0};
            int64_t tiles = padded(Hp - d, PANEL) / PANEL, vectors = padded(Hp - d, LANES * tiles) / (LANES * tiles);
            width = vectors * LANES; /* 3 and 2 instead of 4 and 1, which is too few to hide how long a product takes */
            UNROLL for (int n = 1; n <= TILE_VECTORS; n++)
                if (n == vectors) low_tile(acc, weights, own->values + d * W, Tw, Hp, n);
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
                    int64_t left = H - d - j * LANES;
                    if (m + i < T && left > 0 && j * LANES < width)
                        store_upto(out + (m + i) * a->heads * H + d + j * LANES, acc[i][j] * inverse[i], left);
                }
        }
    }
}

WORK int attend_some(const Attention *a, int64_t *next)
{
    int64_t pairs = a->images * a->heads;
    size_t tokens = (size_t)padded(a->tokens, PANEL), head = (size_t)padded(a->head, LANES);
    Head own = {
        calloc(tokens * head, sizeof(Low)), calloc(tokens * head, sizeof(Low)),
        calloc(TILE_ROWS * head, sizeof(Low)), malloc(TILE_ROWS * tokens * sizeof(float)),
    };
    int failed = !own.keys || !own.values || !own.queries || !own.scores;
    for (int64_t pair; !failed && (pair = take(next, pairs)) < pairs;) attend(a, pair, &own);
    free(own.keys);
    free(own.values);
    free(own.queries);
    free(own.scores);
    return failed;
}

int EXPORT(attend)(const Attention *a) PARALLEL(attend_some, a)
