/* The integer product and what follows it. Weights lie in panels of PANEL outputs: (panels, depth / 4, PANEL, 4).
   Four-bit weights are expanded panel by panel into a buffer that stays in cache: code · multiple fits 8 bits. */

typedef struct {
    int8_t *codes;   /* (depth / 4, PANEL, 4), times the multiples except where SMALL_CODES */
    VI *multiples;   /* (groups, TILE_VECTORS), each twice in its 32 bits */
} Expanded;

/* Four bytes of each lane, as two products of 16 bits, times `twice`; all fit 8 bits. */
FN VI times(VI bytes, VI twice)
{
    VS b = (VS)bytes, even = (b << 8 >> 8) * (VS)twice, odd = (b >> 8) * (VS)twice;
    return (VI)((even & 255) | (odd << 8));
}

/* A 4-bit panel is (depth / 8, PANEL, 4): byte t holds code 8k + t + 8 in its low half and 8k + 4 + t + 8 above. */
FN void expand(const Product *p, int64_t panel, Expanded to)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), groups = p->group ? p->depth / p->group : 1;
    const uint8_t *from = p->weight + panel * PANEL * Kp / 2;
    const VU low = 0x0f0f0f0f + (VU){0}, eights = 0x08080808 + (VU){0}, signs = 0x80808080 + (VU){0};
    for (int64_t i = 0; i < groups * TILE_VECTORS; i++)
        for (int lane = 0; lane < LANES; lane++) {
            int multiple = p->group ? p->multiples[(panel * groups * TILE_VECTORS + i) * LANES + lane] : 1;
            to.multiples[i][lane] = (multiple & 0xffff) | (int)((unsigned)multiple << 16);
        }
    for (int64_t k = 0; k < Kp / 8; k++) {
        int64_t group = p->group ? least(8 * k / p->group, groups - 1) : 0;
        for (int j = 0; j < TILE_VECTORS; j++) {
            VU both = (VU)load_int(from + (k * PANEL + j * LANES) * 4);
            for (int half = 0; half < 2; half++) {
                VI code = (VI)((((both >> 4 * half & low) | signs) - eights) ^ signs); /* byte by byte, no borrow */
                if (p->group && !SMALL_CODES) code = times(code, to.multiples[group * TILE_VECTORS + j]);
                memcpy(to.codes + ((2 * k + half) * PANEL + j * LANES) * 4, &code, sizeof code);
            }
        }
    }
}

/* acc[i][j] += Σ_k a[i][k] b[k][j] */
FN void integer_sums(VI acc[TILE_ROWS][TILE_VECTORS], const uint8_t *const a[TILE_ROWS], const int8_t *b, int64_t Kp)
{
    for (int64_t k = 0; k < Kp; k += 4, b += 4 * PANEL) {
        VI weights[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) weights[j] = load_int(b + 4 * LANES * j);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            VI codes = broadcast(a[i] + k);
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = dot4(acc[i][j], codes, weights[j]);
        }
    }
}

#if SMALL_CODES
/* The same for 4-bit codes: 16 products of at most 255 · 8 fit 16 bits, so 32 columns are summed there in half the
   instructions, and multiplied by their group's multiple on the way to 32 bits. */
FN void small_sums(VI acc[TILE_ROWS][TILE_VECTORS], const uint8_t *const a[TILE_ROWS], Expanded b, const Product *p)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), groups = p->group ? p->depth / p->group : 1;
    int64_t run = !p->group || p->group % 32 == 0 ? 32 : 8;
    for (int64_t k0 = 0; k0 < Kp; k0 += run) {
        VS part[TILE_ROWS][TILE_VECTORS] = {0};
        for (int64_t k = k0; k < least(k0 + run, Kp); k += 4) {
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
                VI weights = load_int(b.codes + (k * PANEL / 4 + j * LANES) * 4);
                UNROLL for (int i = 0; i < TILE_ROWS; i++)
                    part[i][j] += (VS)_mm256_maddubs_epi16((__m256i)broadcast(a[i] + k), (__m256i)weights);
            }
        }
        int64_t group = p->group ? least(k0 / p->group, groups - 1) : 0;
        UNROLL for (int j = 0; j < TILE_VECTORS; j++)
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                acc[i][j] += (VI)_mm256_madd_epi16((__m256i)part[i][j], (__m256i)b.multiples[group * TILE_VECTORS + j]);
    }
}
#endif

/* `gate` is that of row m's image */
FN void finish(const Product *p, const float *gate, int64_t m, int64_t n, VF v)
{
    int64_t left = p->outputs - n;
    if (left <= 0) return;
    if (p->gelu) v = gelu(v);
    if (gate) v = v * load_upto(gate + n, left);
    if (p->residual) v = v + load_upto(p->residual + m * p->outputs + n, left);
    store_upto(p->out + m * p->outputs + n, v, left);
}

FN void product_tile(const Product *p, Expanded b, int64_t panel, int64_t m0)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), rows = least(TILE_ROWS, p->rows - m0);
    const uint8_t *a[TILE_ROWS];
    VI acc[TILE_ROWS][TILE_VECTORS] = {0};
    UNROLL for (int i = 0; i < TILE_ROWS; i++) a[i] = p->codes + (m0 + least(i, rows - 1)) * Kp;
#if SMALL_CODES
    if (p->bits == 4) small_sums(acc, a, b, p);
    else
#endif
        integer_sums(acc, a, b.codes, Kp);
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
    UNROLL for (int i = 0; i < TILE_ROWS; i++) {
        if (i >= rows) break;
        const float *gate = p->gate ? p->gate + (m0 + i) / p->tokens * p->stride : 0;
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) finish(p, gate, m0 + i, panel * PANEL + j * LANES, y[i][j]);
    }
}

WORK void multiply_some(const Product *p, int thread, int threads)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), panels = padded(p->outputs, PANEL) / PANEL;
    int64_t groups = p->group ? p->depth / p->group : 1;
    Expanded b = {0};
    if (p->bits == 4) {
        b.codes = aligned_alloc(64, (size_t)padded(PANEL * Kp, 64));
        b.multiples = aligned_alloc(64, (size_t)padded(groups * TILE_VECTORS * (int64_t)sizeof(VI), 64));
    }
    for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; panel++) {
        if (p->bits == 4) expand(p, panel, b);
        else b.codes = (int8_t *)p->weight + panel * PANEL * Kp;
        for (int64_t m = 0; m < p->rows; m += TILE_ROWS) product_tile(p, b, panel, m);
    }
    if (p->bits == 4) free(b.codes);
    free(b.multiples);
}

void EXPORT(multiply)(const Product *p) { PARALLEL(multiply_some, p); }
