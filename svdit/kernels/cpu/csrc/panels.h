/* Weights lie in panels of PANEL outputs: (panels, depth / 4, PANEL, 4). Panels of 4 bits, and where WIDE all panels,
   are expanded one by one into a buffer that stays in cache. */

typedef struct {
    void *codes;    /* (depth / CODES, PANEL, CODES) for `dot`; 4-bit codes where WIDE (depth / 4, PANEL, 4) */
    VI *multiples;  /* where WIDE (groups, TILE_VECTORS), each twice in its 32 bits */
    VF *scales;     /* with `floats` (groups, TILE_VECTORS) */
    VI *starts;     /* and then −offset · the sum of a group's codes */
    int64_t size;   /* bytes from one panel to the next */
} Expanded;

/* Four bytes of each lane, as two products of 16 bits, times `twice`; all fit 8 bits. */
FN VI times(VI bytes, VI twice)
{
    VS b = (VS)bytes, even = (b << 8 >> 8) * (VS)twice, odd = (b >> 8) * (VS)twice;
    return (VI)((even & 255) | (odd << 8));
}

/* acc + the sum of each lane's four signed bytes; of no use where activations are signed too */
FN VI byte_sum(VI acc, VI bytes)
{
#if WIDE
    return acc + (VI)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)bytes), _mm256_set1_epi16(1));
#else
    return dot(acc, splat_int(0x01010101), bytes);
#endif
}

/* What stands for whole groups: multiples, or the scales that they are of the outputs' steps. */
FN void expand_groups(const Product *p, int64_t panel, int64_t groups, Expanded to)
{
    const uint8_t *bytes = (const uint8_t *)p->multiples + panel * groups * PANEL;
    const uint16_t *halves = (const uint16_t *)p->multiples + panel * groups * PANEL;
    const float *channel = p->channel + panel * PANEL;
    for (int64_t i = 0; i < groups * TILE_VECTORS; i++) {
        if (p->floats) to.scales[i] = load_halves(halves + i * LANES, LANES) * load(channel + i % TILE_VECTORS * LANES);
        else {
            VI multiple = p->group ? load_bytes(bytes + i * LANES) : splat_int(1);
            to.multiples[i] = (multiple & 0xffff) | multiple << 16;
        }
    }
}

/* Vector j of a panel's first and second four columns of eight */
FN void store_eight(VI *to, int j, VI first, VI second)
{
#ifdef USE_I8MM
    to[2 * j] = (VI)picked((VF)first, (VF)second, (VI){0, 4, 1, 5});
    to[2 * j + 1] = (VI)picked((VF)first, (VF)second, (VI){2, 6, 3, 7});
#else
    memcpy(to + j, &first, sizeof first);
    memcpy(to + TILE_VECTORS + j, &second, sizeof second);
#endif
}

/* A 4-bit panel is (depth / 8, PANEL, 4): byte t holds code 8k + t + 8 in its low half and 8k + 4 + t + 8 above.
   Codes are multiplied by their group's integer, which fits 8 bits, except where WIDE. */
FN void expand_nibbles(const Product *p, int64_t panel, int64_t size, Expanded to)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), groups = p->depth / size;
    const uint8_t *from = p->weight + panel * PANEL * Kp / 2;
    const VU low = 0x0f0f0f0f + (VU){0}, eights = 0x08080808 + (VU){0}, signs = 0x80808080 + (VU){0};
    for (int64_t k = 0; k < Kp / 8; k++) {
        int64_t group = least(8 * k / size, groups - 1);
        for (int j = 0; j < TILE_VECTORS; j++) {
            VU both = (VU)load_int(from + (k * PANEL + j * LANES) * 4);
            VI code[2];
            for (int half = 0; half < 2; half++) {
                code[half] = (VI)((((both >> 4 * half & low) | signs) - eights) ^ signs); /* byte by byte, no borrow */
                if (p->group && !p->floats && !WIDE) code[half] = times(code[half], to.multiples[group * TILE_VECTORS + j]);
            }
            store_eight((VI *)to.codes + 2 * k * TILE_VECTORS, j, code[0], code[1]);
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

/* With what the sums of groups start, so that the offset of activations falls out of them. */
FN void expand_starts(const Product *p, int64_t size, Expanded to)
{
    for (int64_t g = 0; g < p->depth / size; g++)
        for (int j = 0; j < TILE_VECTORS; j++) {
            VI total = {0};
            for (int64_t k = g * size / 4; p->offset && k < (g + 1) * size / 4; k++)
                total = byte_sum(total, load_int((VI *)to.codes + k * TILE_VECTORS + j));
            to.starts[g * TILE_VECTORS + j] = total * -(int32_t)p->offset;
        }
}

/* Panel number `panel` of the weight, groups of `size` columns, into the buffers of `own`. */
FN Expanded expand(const Product *p, int64_t panel, int64_t size, Expanded own)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP);
    if (p->bits == 4 || p->floats) expand_groups(p, panel, p->depth / size, own);
    if (p->bits == 4) expand_nibbles(p, panel, size, own);
    else if (WIDE) expand_bytes(p, panel, own);
    else own.codes = (uint8_t *)p->weight + panel * PANEL * Kp;
    if (p->floats) expand_starts(p, size, own);
    return own;
}

/* Buffers for `count` panels: `bytes` of codes, and the numbers of `groups`; `multiples`, the start of all, is null where
   there is no memory. */
FN Expanded new_panels(int64_t count, int64_t bytes, int64_t groups)
{
    int64_t each = padded(groups * TILE_VECTORS * (int64_t)sizeof(VI), 64), size = padded(bytes, 64) + 3 * each;
    char *buffer = aligned_alloc(64, (size_t)(count * size));
    if (!buffer) return (Expanded){0};
    return (Expanded){buffer + 3 * each, (VI *)buffer, (VF *)(buffer + each), (VI *)(buffer + 2 * each), size};
}

/* Number i of them. */
FN Expanded panel_of(Expanded all, int64_t i)
{
    int64_t at = i * all.size;
    return (Expanded){(char *)all.codes + at, (VI *)((char *)all.multiples + at), (VF *)((char *)all.scales + at),
                      (VI *)((char *)all.starts + at), all.size};
}
