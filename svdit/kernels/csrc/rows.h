/* Activations to codes: LayerNorm, modulation, in_shift, in_scale, Hadamard, steps, low-rank projection.
   TILE_ROWS rows at a time stay in cache between the passes. The sums of the Hadamard transform run in the order of
   reference.rotate, so that without LayerNorm the codes are the reference's bit for bit. */

#if PAIRS
typedef uint16_t Low;
#else
typedef float Low;
#endif

/* acc[i][j] += Σ_k a[i][k] b[k][j]: a of `pairs` · 2 numbers a row, b packed (pairs, vectors · LANES, 2) bf16 */
FN void low_rank_tile(VF acc[TILE_ROWS][TILE_VECTORS], const Low *const a[TILE_ROWS], const uint16_t *b,
                      int64_t pairs, int vectors)
{
    for (int64_t k = 0; k < pairs; k++, b += 2 * LANES * vectors) {
#if PAIRS
        UNROLL for (int j = 0; j < vectors; j++) {
            VI both = load_int(b + 2 * LANES * j);
            UNROLL for (int i = 0; i < TILE_ROWS; i++) acc[i][j] = dot2(acc[i][j], broadcast(a[i] + 2 * k), both);
        }
#else
        UNROLL for (int odd = 0; odd < 2; odd++) {
            VF column[TILE_VECTORS];
            UNROLL for (int j = 0; j < vectors; j++) {
                VI both = load_int(b + 2 * LANES * j);
                column[j] = (VF)(odd ? both & splat_int((int32_t)0xffff0000) : both << 16);
            }
            UNROLL for (int i = 0; i < TILE_ROWS; i++) {
                VF row = splat(a[i][2 * k + odd]);
                UNROLL for (int j = 0; j < vectors; j++) acc[i][j] += row * column[j];
            }
        }
#endif
    }
}

FN void to_low(Low *to, VF x)
{
#if PAIRS
    VH h = __builtin_convertvector(bf16_bits(x), VH);
    memcpy(to, &h, sizeof h);
#else
    store(to, x);
#endif
}

/* One stage of the transform inside a vector: lanes i and i ^ h become their sum and difference. */
FN VF butterfly(VF x, int h)
{
    VI partner;
    VF sign, other;
    UNROLL for (int i = 0; i < LANES; i++) partner[i] = i ^ h, sign[i] = i & h ? -1.f : 1.f;
#ifdef __clang__
    for (int i = 0; i < LANES; i++) other[i] = x[partner[i]];
#else
    other = __builtin_shuffle(x, partner);
#endif
    return other + x * sign;
}

FN void hadamard(float *x, int64_t columns, int64_t block)
{
    for (int64_t h = 1; h < block; h *= 2)
        for (int64_t k = 0; k < columns; k += 2 * h)
            for (int64_t i = k; i < k + h; i++) {
                float a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    float root = (float)(1 / sqrt((double)block));
    for (int64_t k = 0; k < columns; k++) x[k] *= root;
}

/* The published block size, in registers. */
FN void hadamard64(float *x, int64_t columns)
{
    enum { V = 64 / LANES };
    for (int64_t k = 0; k < columns; k += 64) {
        VF v[V];
        UNROLL for (int i = 0; i < V; i++) {
            v[i] = load(x + k + i * LANES);
            UNROLL for (int h = 1; h < LANES; h *= 2) v[i] = butterfly(v[i], h);
        }
        UNROLL for (int h = 1; h < V; h *= 2)
            UNROLL for (int i = 0; i < V; i++) if (!(i & h)) {
                VF a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
        UNROLL for (int i = 0; i < V; i++) store(x + k + i * LANES, v[i] * 0.125f);
    }
}

/* Mean and one over the standard deviation. */
FN void moments(const float *x, int64_t n, float *mean, float *inverse)
{
    int64_t whole = n / LANES * LANES, k;
    VF total = {0};
    float rest = 0;
    for (k = 0; k < n; k += LANES) total += load_upto(x + k, n - k);
    *mean = sum(total) / (float)n;
    total = (VF){0};
    for (k = 0; k < whole; k += LANES) { VF d = load(x + k) - *mean; total += d * d; }
    for (; k < n; k++) rest += (x[k] - *mean) * (x[k] - *mean);
    *inverse = 1.f / sqrtf((sum(total) + rest) / (float)n + 1e-6f);
}

/* x̂ of row m into `hat`, padded with zeros. */
FN void transform_row(const Rows *r, int64_t m, float *hat)
{
    int64_t K = r->depth, image = r->shift ? m / r->tokens * r->stride : 0;
    const float *x = r->x + m * K;
    float mean = 0, inverse = 1;
    if (r->shift) moments(x, K, &mean, &inverse);
    for (int64_t k = 0; k < K; k += LANES) {
        VF v = load_upto(x + k, K - k);
        if (r->shift) {
            VF scale = load_upto(r->scale + image + k, K - k), shift = load_upto(r->shift + image + k, K - k);
            v = (v - mean) * inverse * (scale + 1.f) + shift;
        }
        if (r->in_shift) v -= load(r->in_shift + k);
        if (r->in_inverse) v *= load(r->in_inverse + k);
        store(hat + k, v);
    }
    for (int64_t k = K; k < padded(K, DEPTH_STEP); k++) hat[k] = 0;
    if (r->hadamard == 64) hadamard64(hat, K);
    else if (r->hadamard) hadamard(hat, K, r->hadamard);
}

/* Codes with the offset, from place `at` on. */
FN void store_codes(const Rows *r, int64_t at, VI codes)
{
    if (r->wide) store_shorts((int16_t *)r->codes + at, codes);
    else store_bytes((uint8_t *)r->codes + at, codes + (int32_t)r->offset);
}

/* Codes of row m; its step is returned, not a number where the row holds one that is not finite.
   Products with 1 / step round as quotients do unless they lie within 2.3e-5 of the middle between two integers;
   rows with such a number are divided. */
FN float quantize_row(const Rows *r, const float *hat, int64_t columns, int64_t m)
{
    VF most = {0}, poison = {0};
    for (int64_t k = 0; k < columns; k += LANES) {
        VF v = load(hat + k);
        most = at_least(magnitude(v), most), poison += v * 0.f;
    }
    float step = largest(most) / 127.f, inverse = 1.f / step;
    VI doubt = {0};
    for (int64_t k = 0; k < columns; k += LANES) {
        VF ratio = load(hat + k) * inverse;
        VI code = nearest(ratio);
        doubt |= magnitude(ratio - __builtin_convertvector(code, VF)) > 0.49997f;
        store_codes(r, m * columns + k, code);
    }
    if (any(doubt) || !(step > 1e-30f && step < 1e30f)) {
        if (step == 0) step = 1;
        for (int64_t k = 0; k < columns; k += LANES) {
            VF ratio = at_least(at_most(load(hat + k) / step, splat(127.f)), splat(-127.f));
            store_codes(r, m * columns + k, nearest(ratio));
        }
    }
    return step + sum(poison);
}

/* The step of one group as stored; `poison` becomes no number where the group holds one that is not finite. */
FN float group_step(const Rows *r, const float *x, VF *poison)
{
    VF top = splat(-INFINITY), bottom = splat(INFINITY);
    for (int64_t k = 0; k < r->group; k += LANES) {
        VF v = load(x + k);
        top = at_least(v, top), bottom = at_most(v, bottom), *poison += v * 0.f;
    }
    float most = largest(top), opposite = largest(-bottom), ideal;
    if (r->lo == 0) ideal = most / (float)r->hi;
    else if (r->lo == -r->hi) ideal = (most > opposite ? most : opposite) / (float)r->hi;
    else {
        int64_t first = 0; /* of two equally large ones the first counts */
        if (most == opposite) while (fabsf(x[first]) < most) first++;
        ideal = (most > opposite || (most == opposite && x[first] > 0) ? most : -opposite) / (float)r->lo;
    }
    return from_bf16((uint16_t)bf16_bits(splat(ideal == 0 ? 1 : ideal))[0]);
}

/* Codes and steps of row m in groups, of which all are no numbers where the row holds one that is not finite. A step
   that bf16 rounds to zero makes quotients infinite, and 0 / 0 a code of 0. */
FN void quantize_groups(const Rows *r, const float *hat, int64_t m)
{
    int64_t groups = r->depth / r->group;
    float *steps = r->steps + m * groups;
    VF poison = {0}, lo = splat((float)r->lo), hi = splat((float)r->hi);
    for (int64_t g = 0; g < groups; g++) {
        const float *x = hat + g * r->group;
        steps[g] = group_step(r, x, &poison);
        for (int64_t k = 0; k < r->group; k += LANES) {
            VF ratio = load(x + k) / steps[g];
            VI codes = nearest(at_least(at_most(ratio, hi), lo)) & (ratio == ratio);
            store_codes(r, m * r->depth + g * r->group + k, codes);
        }
    }
    for (int64_t g = 0; g < groups; g++) steps[g] += sum(poison);
}

WORK void quantize_some(const Rows *r, int64_t *next)
{
    int64_t Kp = padded(r->depth, DEPTH_STEP), Rp = padded(r->rank, LOW_PANEL), blocks = padded(r->rows, TILE_ROWS) / TILE_ROWS;
    float *hat = malloc(TILE_ROWS * (size_t)Kp * sizeof(float));
    Low *half = malloc(TILE_ROWS * (size_t)Kp * sizeof(Low));
    for (int64_t block; (block = take(next)) < blocks;) {
        int64_t m0 = block * TILE_ROWS, rows = least(TILE_ROWS, r->rows - m0);
        const Low *a[TILE_ROWS];
        for (int64_t i = 0; i < rows; i++) {
            float *row = hat + i * Kp;
            transform_row(r, m0 + i, row);
            if (r->group) quantize_groups(r, row, m0 + i);
            else r->steps[m0 + i] = quantize_row(r, row, Kp, m0 + i);
            if (r->rank && PAIRS) for (int64_t k = 0; k < Kp; k += LANES) to_low(half + i * Kp + k, load(row + k));
        }
        for (int64_t i = 0; i < TILE_ROWS; i++) a[i] = (PAIRS ? half : (Low *)hat) + least(i, rows - 1) * Kp;
        for (int64_t c = 0; c < Rp; c += LOW_PANEL) {
            VF acc[TILE_ROWS][TILE_VECTORS] = {0};
            low_rank_tile(acc, a, r->l2 + c * Kp, Kp / 2, 2);
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                if (i < rows) UNROLL for (int j = 0; j < 2; j++)
                    to_low((Low *)r->low + (m0 + i) * Rp + c + j * LANES, acc[i][j]);
        }
    }
    free(hat);
    free(half);
}

void EXPORT(quantize_rows)(const Rows *r) { PARALLEL(quantize_some, r); }
