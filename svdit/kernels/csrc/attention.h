/* Attention of one head at a time in fp32: keys transposed into panels, TILE_ROWS queries against all tokens,
   softmax in the buffer of scores, then the product with the values. Memory: a head's keys and values, and
   TILE_ROWS rows of scores. */

/* acc[i][j] += Σ_k a[i][k] b[k][j]; b has rows `stride` apart */
FN void float_tile(VF acc[TILE_ROWS][TILE_VECTORS], const float *const a[TILE_ROWS], const float *b, int64_t depth,
                   int64_t stride)
{
    for (int64_t k = 0; k < depth; k++) {
        VF columns[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) columns[j] = load(b + k * stride + j * LANES);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            VF row = splat(a[i][k]);
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] += row * columns[j];
        }
    }
}

/* e^(score − largest) in place; returns one over the sum. What stands behind the last token adds less than rounding. */
FN float softmax(float *scores, int64_t tokens, int64_t columns)
{
    VF most = splat(-INFINITY), total = {0};
    for (int64_t t = tokens; t < columns; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < columns; t += LANES) most = at_least(load(scores + t), most);
    VF top = splat(largest(most));
    for (int64_t t = 0; t < columns; t += LANES) {
        VF e = exponential(load(scores + t) - top);
        store(scores + t, e);
        total += e;
    }
    return 1.f / sum(total);
}

FN void attend(const Attention *a, int64_t pair, float *keys, float *values, float *scores)
{
    int64_t T = a->tokens, H = a->head, Tp = padded(T, PANEL), Hp = padded(H, PANEL), stride = 3 * a->heads * H;
    const float *q = a->qkv + pair / a->heads * T * stride + pair % a->heads * H, *k = q + a->heads * H, *v = k + a->heads * H;
    float *out = a->out + pair / a->heads * T * a->heads * H + pair % a->heads * H, root = 1.f / sqrtf((float)H);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t d = 0; d < H; d++) keys[(t / PANEL * H + d) * PANEL + t % PANEL] = k[t * stride + d] * root;
        memcpy(values + t * Hp, v + t * stride, 4 * (size_t)H);
    }
    for (int64_t m = 0; m < T; m += TILE_ROWS) {
        const float *queries[TILE_ROWS], *rows[TILE_ROWS];
        float inverse[TILE_ROWS];
        for (int64_t i = 0; i < TILE_ROWS; i++) {
            queries[i] = q + least(m + i, T - 1) * stride;
            rows[i] = scores + i * Tp;
        }
        for (int64_t n = 0; n < Tp; n += PANEL) {
            VF acc[TILE_ROWS][TILE_VECTORS] = {0};
            float_tile(acc, queries, keys + n * H, H, PANEL);
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                UNROLL for (int j = 0; j < TILE_VECTORS; j++) store(scores + i * Tp + n + j * LANES, acc[i][j]);
        }
        for (int64_t i = 0; i < TILE_ROWS; i++) inverse[i] = softmax(scores + i * Tp, T, Tp);
        for (int64_t d = 0; d < Hp; d += PANEL) {
            VF acc[TILE_ROWS][TILE_VECTORS] = {0};
            float_tile(acc, rows, values + d, T, Hp);
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
                    int64_t left = H - d - j * LANES;
                    if (m + i < T && left > 0)
                        store_upto(out + (m + i) * a->heads * H + d + j * LANES, acc[i][j] * inverse[i], left);
                }
        }
    }
}

WORK void attend_some(const Attention *a, int64_t *next)
{
    int64_t pairs = a->images * a->heads;
    size_t columns = (size_t)padded(a->tokens, PANEL);
    float *keys = calloc(columns * (size_t)a->head, sizeof(float));
    float *values = calloc((size_t)(a->tokens * padded(a->head, PANEL)), sizeof(float));
    float *scores = malloc(TILE_ROWS * columns * sizeof(float));
    for (int64_t pair; (pair = take(next)) < pairs;)
        attend(a, pair, keys, values, scores);
    free(keys);
    free(values);
    free(scores);
}

void EXPORT(attend)(const Attention *a) { PARALLEL(attend_some, a); }
