/* The integer product and what follows it. Weights lie in panels of PANEL outputs: (panels, depth / 4, PANEL, 4).
   Four-bit weights are expanded panel by panel into a buffer that stays in cache: code · multiple fits 8 bits. */

/* A 4-bit panel is (depth / 8, PANEL, 4): byte t holds code 8k + t + 8 in its low half and 8k + 4 + t + 8 above. */
FN void expand(const Product *p, int64_t panel, int8_t *to)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), groups = p->group ? p->depth / p->group : 1;
    const uint8_t *from = p->weight + panel * PANEL * Kp / 2;
    for (int64_t k = 0; k < Kp / 8; k++) {
        const int8_t *multiples = p->group ? p->multiples + (panel * groups + least(8 * k / p->group, groups - 1)) * PANEL : 0;
        for (int64_t n = 0; n < PANEL; n++) {
            int8_t times = multiples ? multiples[n] : 1;
            for (int64_t t = 0; t < 4; t++) {
                uint8_t both = from[(k * PANEL + n) * 4 + t];
                to[(2 * k * PANEL + n) * 4 + t] = (int8_t)(((both & 15) - 8) * times);
                to[((2 * k + 1) * PANEL + n) * 4 + t] = (int8_t)(((both >> 4) - 8) * times);
            }
        }
    }
}

FN void finish(const Product *p, int64_t m, int64_t n, VF v)
{
    int64_t left = p->outputs - n;
    if (left <= 0) return;
    if (p->gelu) v = gelu(v);
    if (p->gate) v = v * load_upto(p->gate + m / p->tokens * p->stride + n, left);
    if (p->residual) v = v + load_upto(p->residual + m * p->outputs + n, left);
    store_upto(p->out + m * p->outputs + n, v, left);
}

FN void product_tile(const Product *p, const int8_t *b, int64_t panel, int64_t m0)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), rows = least(TILE_ROWS, p->rows - m0);
    const uint8_t *a[TILE_ROWS];
    VI acc[TILE_ROWS][TILE_VECTORS] = {0};
    UNROLL for (int i = 0; i < TILE_ROWS; i++) a[i] = p->codes + (m0 + least(i, rows - 1)) * Kp;
    for (int64_t k = 0; k < Kp; k += 4, b += 4 * PANEL) {
        VI weights[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) weights[j] = load_int(b + 4 * LANES * j);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            VI codes = broadcast(a[i] + k);
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = dot4(acc[i][j], codes, weights[j]);
        }
    }
    VF y[TILE_ROWS][TILE_VECTORS];
    UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
        int64_t n = panel * PANEL + j * LANES;
        VI offset = load_int(p->offsets + n);
        VF channel = load(p->channel + n), bias = load(p->bias + n);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            float step = p->steps[m0 + least(i, rows - 1)];
            y[i][j] = __builtin_convertvector(acc[i][j] - offset, VF) * (channel * step) + bias;
        }
    }
    if (p->rank) {
        int64_t Rp = padded(p->rank, LOW_PANEL), pairs = (p->rank + 1) / 2;
        const Low *low[TILE_ROWS];
        UNROLL for (int i = 0; i < TILE_ROWS; i++) low[i] = (const Low *)p->low + (m0 + least(i, rows - 1)) * Rp;
        low_rank_tile(y, low, p->l1 + panel * PANEL * pairs * 2, pairs, TILE_VECTORS);
    }
    UNROLL for (int i = 0; i < TILE_ROWS; i++)
        if (i < rows) UNROLL for (int j = 0; j < TILE_VECTORS; j++) finish(p, m0 + i, panel * PANEL + j * LANES, y[i][j]);
}

WORK void multiply_some(const Product *p, int thread, int threads)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), panels = padded(p->outputs, PANEL) / PANEL;
    int8_t *buffer = p->bits == 4 ? malloc((size_t)(PANEL * Kp)) : 0;
    for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; panel++) {
        const int8_t *b = buffer ? buffer : (const int8_t *)p->weight + panel * PANEL * Kp;
        if (buffer) expand(p, panel, buffer);
        for (int64_t m = 0; m < p->rows; m += TILE_ROWS) product_tile(p, b, panel, m);
    }
    free(buffer);
}

void EXPORT(multiply)(const Product *p) { PARALLEL(multiply_some, p); }
