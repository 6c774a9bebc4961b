/* The integer product and what follows it. Weights lie in panels of PANEL outputs: (panels, depth / 4, PANEL, 4).
   Panels of 4 bits, and where WIDE all panels, are expanded one by one into a buffer that stays in cache. */

typedef struct {
    void *codes;     /* (depth / CODES, PANEL, CODES) for `dot`; 4-bit codes where WIDE (depth / 4, PANEL, 4) */
    VI *multiples;   /* (groups, TILE_VECTORS), each twice in its 32 bits */
} Expanded;

/* Four bytes of each lane, as two products of 16 bits, times `twice`; all fit 8 bits. */
FN VI times(VI bytes, VI twice)
{
    VS b = (VS)bytes, even = (b << 8 >> 8) * (VS)twice, odd = (b >> 8) * (VS)twice;
    return (VI)((even & 255) | (odd << 8));
}

/* A 4-bit panel is (depth / 8, PANEL, 4): byte t holds code 8k + t + 8 in its low half and 8k + 4 + t + 8 above.
   Codes are multiplied by their group's multiple, which fits 8 bits, except where WIDE. */
FN void expand_nibbles(const Product *p, int64_t panel, Expanded to)
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
                if (p->group && !WIDE) code = times(code, to.multiples[group * TILE_VECTORS + j]);
                memcpy((VI *)to.codes + (2 * k + half) * TILE_VECTORS + j, &code, sizeof code);
            }
        }
    }
}

/* An 8-bit panel with its codes 16 bits wide. */
FN void expand_bytes(const Product *p, int64_t panel, Expanded to)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP);
    const VI *from = (const VI *)(p->weight + panel * PANEL * Kp);
    for (int64_t k = 0; k < Kp / 4; k++)
        for (int j = 0; j < TILE_VECTORS; j++) {
            VS bytes = (VS)load_int(from + k * TILE_VECTORS + j), even = bytes << 8 >> 8, odd = bytes >> 8;
            VI halves[2] = {((VI)even & 0xffff) | ((VI)odd << 16), (VI)((VU)even >> 16) | ((VI)odd & ~0xffff)};
            for (int half = 0; half < 2; half++)
                memcpy((VI *)to.codes + (2 * k + half) * TILE_VECTORS + j, halves + half, sizeof(VI));
        }
}

/* acc[i][j] += Σ_k a[i][k] b[k][j], the lanes of `dot` one after the other */
FN void integer_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], const VI *b, int64_t lanes)
{
    for (int64_t k = 0; k < lanes; k++, b += TILE_VECTORS) {
        VI weights[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) weights[j] = load_int(b + j);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            VI codes = broadcast(a[i] + k);
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = dot(acc[i][j], codes, weights[j]);
        }
    }
}

#if WIDE
/* The same for 4-bit codes: 16 products of at most 255 · 8 fit 16 bits, so 32 columns are summed there in half the
   instructions, and multiplied by their group's multiple on the way to 32 bits. */
FN void small_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], Expanded b, const Product *p)
{
    int64_t lanes = padded(p->depth, DEPTH_STEP) / 4, groups = p->group ? p->depth / p->group : 1;
    int64_t run = !p->group || p->group % 32 == 0 ? 8 : 2;
    const VI *codes = b.codes;
    for (int64_t start = 0; start < lanes; start += run) {
        VS part[TILE_ROWS][TILE_VECTORS] = {0};
        for (int64_t k = start; k < least(start + run, lanes); k++) {
            VI weights[TILE_VECTORS];
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) weights[j] = load_int(codes + k * TILE_VECTORS + j);
            UNROLL for (int i = 0; i < TILE_ROWS; i++) {
                __m256i row = (__m256i)broadcast(a[i] + k);
                UNROLL for (int j = 0; j < TILE_VECTORS; j++)
                    part[i][j] += (VS)_mm256_maddubs_epi16(row, (__m256i)weights[j]);
            }
        }
        int64_t group = p->group ? least(4 * start / p->group, groups - 1) : 0;
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
    int64_t lanes = Kp / (p->bits == 4 ? 4 : CODES);
    const int32_t *a[TILE_ROWS];
    VI acc[TILE_ROWS][TILE_VECTORS] = {0};
    UNROLL for (int i = 0; i < TILE_ROWS; i++) a[i] = (const int32_t *)p->codes + (m0 + least(i, rows - 1)) * lanes;
#if WIDE
    if (p->bits == 4) small_sums(acc, a, b, p);
    else
#endif
        integer_sums(acc, a, b.codes, lanes);
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
    int own = p->bits == 4 || WIDE; /* a buffer for panels */
    Expanded b = {0};
    if (own) b.codes = aligned_alloc(64, (size_t)padded(PANEL * Kp * 4 / (p->bits == 4 ? 4 : CODES), 64));
    if (p->bits == 4) b.multiples = aligned_alloc(64, (size_t)padded(groups * TILE_VECTORS * (int64_t)sizeof(VI), 64));
    for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; panel++) {
        if (p->bits == 4) expand_nibbles(p, panel, b);
        else if (WIDE) expand_bytes(p, panel, b);
        else b.codes = (uint8_t *)p->weight + panel * PANEL * Kp;
        for (int64_t m = 0; m < p->rows; m += TILE_ROWS) product_tile(p, b, panel, m);
    }
    if (own) free(b.codes);
    free(b.multiples);
}

void EXPORT(multiply)(const Product *p) { PARALLEL(multiply_some, p); }
