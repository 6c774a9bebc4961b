/* Queries, keys and values of one head as attention.h reads them: normed, rotated, transposed. A row is a token's. */

/* Lanes of x and, from LANES on, of y. */
FN VF merged(VF x, VF y, VI order)
{
#if defined(USE_VNNI) && LANES == 16
    return (VF)_mm512_permutex2var_ps((__m512)x, (__m512i)order, (__m512)y);
#elif defined(__clang__)
    VF z;
    for (int i = 0; i < LANES; i++) z[i] = order[i] < LANES ? x[order[i]] : y[order[i] - LANES];
    return z;
#else
    return __builtin_shuffle(x, y, order);
#endif
}

/* The order in which every 2h lanes hold h lanes of x and the same of y: the first h, or with `+ h` the others. */
FN VI halves(int h) { return (NUMBERS & ~h) + (((NUMBERS & h) != 0) & LANES); }

FN void transpose(VF rows[LANES])
{
    UNROLL for (int h = 1; h < LANES; h *= 2)
        UNROLL for (int i = 0; i < LANES; i++) if (!(i & h)) {
            VF x = rows[i], y = rows[i + h];
            rows[i] = merged(x, y, halves(h)), rows[i + h] = merged(x, y, halves(h) + h);
        }
}

/* Lane i: the sum of row i. The rows are overwritten. */
FN VF row_sums(VF rows[LANES])
{
    UNROLL for (int h = 1; h < LANES; h *= 2)
        UNROLL for (int i = 0; i < LANES; i += 2 * h)
            rows[i] = merged(rows[i], rows[i + h], halves(h)) + merged(rows[i], rows[i + h], halves(h) + h);
    return rows[0];
}

FN VF root(VF x)
{
#if defined(USE_VNNI) && LANES == 16
    return (VF)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8
    return (VF)_mm256_sqrt_ps((__m256)x);
#elif defined(USE_NEON)
    return (VF)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

/* LANES columns, of which `left` are there; more are zeros. */
FN VF load_low(const Low *x, int64_t left)
{
#if PAIRS
    return load_halves(x, left);
#else
    return load_upto(x, left);
#endif
}

/* Queries, keys or values of one head: where they are in qkv, and which norm and angles apply to them. */
typedef struct {
    const Low *x;            /* the first token's */
    int64_t columns, stride; /* stride: between tokens */
    const float *weight, *bias, *cos, *sin;
} Part;

/* `number`: 0 for queries, 1 for keys, 2 for values, of a pair of image and head. */
FN Part part_of(const Attention *a, int64_t pair, int64_t number)
{
    int64_t H = a->head, at = (pair / a->heads * a->tokens * 3 + number) * a->heads + pair % a->heads;
    Part p = {.x = (const Low *)a->qkv + at * H, .columns = H, .stride = 3 * a->heads * H};
    if (number == 2) return p;
    if (a->weight) p.weight = a->weight + number * H;
    if (a->bias) p.bias = a->bias + number * H;
    p.cos = a->cos, p.sin = a->sin;
    return p;
}

/* Rows t … end, towards the L2 cache: the product that wrote them left most of them further away. */
FN void prefetch(const Part *p, int64_t t, int64_t end)
{
    for (; t < end; t++) {
        const char *row = (const char *)(p->x + t * p->stride), *last = row + p->columns * (int64_t)sizeof(Low) - 1;
        for (; row < last; row += 64) __builtin_prefetch(row, 0, 2);
        __builtin_prefetch(last, 0, 2);
    }
}

typedef struct {
    float mean[LANES], inverse[LANES];
} Moments;

/* Means, 0 for RMSNorm, and one over the deviations from them, of up to LANES rows from t on. */
FN Moments head_moments(const Part *p, int64_t t, int64_t rows)
{
    int64_t H = p->columns, whole = H / LANES * LANES;
    const VI there = NUMBERS < (int32_t)(H - whole);
    Moments m = {0};
    VF part[LANES] = {0};
    for (int64_t i = 0; p->bias && i < rows; i++) {
        const Low *x = p->x + (t + i) * p->stride;
        for (int64_t k = 0; k < whole; k += LANES) part[i] += load_low(x + k, LANES);
        part[i] += load_low(x + whole, H - whole);
    }
    if (p->bias) store(m.mean, row_sums(part) / (float)H);
    for (int64_t i = 0; i < rows; i++) {
        const Low *x = p->x + (t + i) * p->stride;
        VF d = (VF)((VI)(load_low(x + whole, H - whole) - m.mean[i]) & there), squares = d * d;
        for (int64_t k = 0; k < whole; k += LANES) d = load_low(x + k, LANES) - m.mean[i], squares += d * d;
        part[i] = squares;
    }
    store(m.inverse, 1.f / root(row_sums(part) / (float)H + (p->bias ? 1e-5f : 1e-6f)));
    return m;
}

/* Columns from k on of token t, x, normed and rotated; `left` of them are there, more become zeros. */
FN VF normed(const Part *p, VF x, float mean, float inverse, int64_t t, int64_t k, int64_t left)
{
    const VI sign = ((NUMBERS & 1) - 1) & (int32_t)0x80000000; /* of even lanes */
    if (p->weight) x = (x - mean) * inverse * load_upto(p->weight + k, left);
    if (p->bias) x += load_upto(p->bias + k, left);
    if (!p->cos) return x;
    VF sin = (VF)((VI)load_upto(p->sin + t * p->columns + k, left) ^ sign);
    return x * load_upto(p->cos + t * p->columns + k, left) + ordered(x, across(1)) * sin;
}

/* Up to LANES rows from t on to (rows, width), normed and rotated. */
FN void prepare(const Part *p, Low *to, int64_t width, int64_t t, int64_t rows)
{
    int64_t H = p->columns, k;
    Moments m = {0};
    if (p->weight) m = head_moments(p, t, rows);
    for (int64_t i = 0; i < rows; i++, to += width) {
        const Low *x = p->x + (t + i) * p->stride;
        float mean = m.mean[i], inverse = m.inverse[i];
        if (!p->weight && !p->cos) { memcpy(to, x, (size_t)H * sizeof *x); continue; }
        for (k = 0; k + LANES <= H; k += LANES)
            to_low(to + k, normed(p, load_low(x + k, LANES), mean, inverse, t + i, k, LANES));
        if (k < H) to_low(to + k, normed(p, load_low(x + k, H - k), mean, inverse, t + i, k, H - k));
    }
}
