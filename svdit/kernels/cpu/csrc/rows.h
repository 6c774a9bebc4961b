/* Activations to codes: gated activation or norm and modulation, in_shift, in_scale, Hadamard, steps, low-rank
   projection. BLOCK_ROWS rows at a time stay in cache between the passes. The sums of the Hadamard transform run in the
   order of reference.rotate, so that behind it all codes are the reference's bit for bit. */

#if WORDS || defined(USE_AMX)
/* sums[i][j] += Σ_k a[i][k] b[k][j] over the pairs from `first` to `last`; of words at most RUN fit 32 bits */
FN void pair_sums(Sum *sums, const Branch *const *a, const uint16_t *b, int64_t first, int64_t last, int rows, int vectors)
{
    for (int64_t k = first; k < last; k++) {
        VI columns[TILE_VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) columns[j] = load_int(b + (k * vectors + j) * LANES * 2);
        UNROLL for (int i = 0; i < rows; i++) {
            VI row = broadcast(a[i] + 2 * k);
            UNROLL for (int j = 0; j < vectors; j++)
                sums[i * vectors + j] = multiply_pairs(sums[i * vectors + j], row, columns[j]);
        }
    }
}
#endif

/* acc[i][j] += Σ_k a[i][k] b[k][j]: a of `pairs` · 2 numbers a row, b packed (pairs, vectors · LANES, 2), words or bf16 */
FN void low_rank_tile(VF *acc, const Branch *const *a, const uint16_t *b, int64_t pairs, int rows, int vectors)
{
#if WORDS
    for (int64_t first = 0; first < pairs; first += RUN) {
        VI sums[TILE_ROWS * TILE_VECTORS] = {0};
        pair_sums(sums, a, b, first, least(first + RUN, pairs), rows, vectors);
        UNROLL for (int i = 0; i < rows * vectors; i++) acc[i] += __builtin_convertvector(sums[i], VF);
    }
#elif defined(USE_AMX)
    pair_sums(acc, a, b, 0, pairs, rows, vectors);
#else
    for (int64_t k = 0; k < pairs; k++, b += 2 * LANES * vectors)
        UNROLL for (int odd = 0; odd < 2; odd++) {
            VF column[TILE_VECTORS];
            UNROLL for (int j = 0; j < vectors; j++) {
                VI both = load_int(b + 2 * LANES * j);
                column[j] = (VF)(odd ? both & splat_int((int32_t)0xffff0000) : both << 16);
            }
            UNROLL for (int i = 0; i < rows; i++) {
                VF row = splat(a[i][2 * k + odd]);
                UNROLL for (int j = 0; j < vectors; j++) acc[i * vectors + j] += row * column[j];
            }
        }
#endif
}

FN void to_low(Low *to, VF x)
{
#if PAIRS
    VH h = to_bf16_quickly(x);
    memcpy(to, &h, sizeof h);
#else
    store(to, x);
#endif
}

/* `count` numbers, a multiple of LANES, as the branch takes them, and the step of WORDS, for `top`, the largest magnitude.
   Where WORD / top is infinite, below 5e-35, words are zeros, which lie in the low bits of what is no number. */
FN float to_branch(Branch *to, const float *x, int64_t count, float top)
{
#if WORDS
    float inverse = WORD / top;
    for (int64_t k = 0; k < count; k += LANES) store_shorts(to + k, (VI)(load(x + k) * inverse + ROUND));
#elif defined(USE_AMX)
    for (int64_t k = 0; k < count; k += LANES) {
        VF v = load(x + k);
        to_low(to + k, v), to_low(to + count + k, v - load_halves(to + k, LANES));
    }
#else
    memcpy(to, x, (size_t)count * sizeof *x);
#endif
    return top / WORD;
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

enum { BLOCK = 64, VECTORS = BLOCK / LANES, LAST = 6 - STAGES }; /* VECTORS = 2^LAST */

/* The published block size, in registers. Inside a vector lanes i and i ^ h become their sum and difference. */
FN void hadamard64(VF v[VECTORS])
{
    const VF one = splat(1.f);
    UNROLL for (int s = 0; s < STAGES; s++) {
        VI order = across(1 << s), negative = (NUMBERS & 1 << s) != 0;
        VF sign = (VF)((VI)one | (negative & (int32_t)0x80000000));
        UNROLL for (int i = 0; i < VECTORS; i++) v[i] = ordered(v[i], order) + v[i] * sign;
    }
    UNROLL for (int s = 0; s < LAST; s++)
        UNROLL for (int i = 0; i < VECTORS; i++) if (!(i >> s & 1)) {
            VF a = v[i], b = v[i + (1 << s)];
            v[i] = a + b, v[i + (1 << s)] = a - b;
        }
    UNROLL for (int i = 0; i < VECTORS; i++) v[i] *= 0.125f;
}

/* Modulation, in_shift and in_scale of one image as one factor and one term per column, of `padded depth` each. */
typedef struct {
    int64_t image;
    float *factor, *term;
} Folded;

FN void fold(const Rows *r, int64_t image, Folded *to)
{
    const float *shift = r->shift + image * r->stride, *scale = r->scale + image * r->stride;
    to->image = image;
    for (int64_t k = 0; k < r->depth; k += LANES) {
        VF term = load_upto(shift + k, r->depth - k), factor = load_upto(scale + k, r->depth - k) + 1.f;
        if (r->in_shift) term -= load(r->in_shift + k);
        if (r->in_inverse) term *= load(r->in_inverse + k), factor *= load(r->in_inverse + k);
        store(to->term + k, term), store(to->factor + k, factor);
    }
}

FN VF prepared(const Rows *r, const Row *row, const Folded *folded, int64_t k, int64_t left)
{
    VF v = element(row, k, left);
    if (r->shift) return (v - row->mean) * row->inverse * load(folded->factor + k) + load(folded->term + k);
    if (r->in_shift) v -= load(r->in_shift + k);
    if (r->in_inverse) v *= load(r->in_inverse + k);
    return v;
}

/* x̂ of row m into `hat`, padded with zeros; returns its largest magnitude, or what is no number. The row that follows is
   fetched meanwhile. */
FN float transform_row(const Rows *r, int64_t m, float *hat, Folded *folded)
{
    int64_t K = r->depth, bytes = (r->glu ? 2 : 1) * (r->bf16 ? 2 : 4); /* of a column */
    const char *next = (const char *)r->x + (m + 1) * K * bytes;
    Row row = row_at(r->x, r->bf16, m * K * (r->glu ? 2 : 1), K);
    VI most = {0};
    row.glu = r->glu;
    if (r->shift) {
        if (m / r->tokens != folded->image) fold(r, m / r->tokens, folded);
        moments(&row, r->rms, 1e-6f);
    }
    if (r->hadamard == BLOCK)
        for (int64_t k = 0; k < K; k += BLOCK) {
            VF v[VECTORS];
            for (int64_t line = 0; line < BLOCK * bytes; line += 64) __builtin_prefetch(next + k * bytes + line, 0, 2);
            UNROLL for (int i = 0; i < VECTORS; i++) v[i] = prepared(r, &row, folded, k + i * LANES, LANES);
            hadamard64(v);
            UNROLL for (int i = 0; i < VECTORS; i++) {
                store(hat + k + i * LANES, v[i]);
                most = larger(most, (VI)magnitude(v[i]));
            }
        }
    else {
        for (int64_t k = 0; k < K; k += LANES) store(hat + k, prepared(r, &row, folded, k, K - k));
        for (int64_t k = K; k < padded(K, DEPTH_STEP); k++) hat[k] = 0;
        if (r->hadamard) hadamard(hat, K, r->hadamard);
        for (int64_t k = 0; k < K; k += LANES) most = larger(most, (VI)magnitude(load(hat + k)));
    }
    return from_bits(largest_of(most));
}

/* Codes that have the offset, of which only the low bits count, from place `at` on. */
FN void store_codes(const Rows *r, int64_t at, VI codes)
{
    if (r->wide) store_shorts((int16_t *)r->codes + at, codes);
    else store_bytes((uint8_t *)r->codes + at, codes);
}

/* Codes of row m, whose largest magnitude is `top`; their step is returned, no number where the row holds one that is
   not finite.
   Products with 1 / step round as quotients do unless they lie within 2.3e-5 of the middle between two integers;
   rows with such a number are divided. */
FN float quantize_row(const Rows *r, const float *hat, int64_t m, float top)
{
    int64_t columns = padded(r->depth, DEPTH_STEP);
    float step = top / 127.f, inverse = 1.f / step;
    const float origin = ROUND + (float)r->offset; /* which leaves code + offset in the low bits */
    VF far = {0};
    for (int64_t k = 0; k < columns; k += LANES) {
        VF x = load(hat + k), ratio = x * inverse, shifted = ratio + origin;
        far = at_least(magnitude(ratio - (shifted - origin)), far);
        store_codes(r, m * columns + k, (VI)shifted);
    }
    if (largest(far) > 0.49997f || !(step > 1e-30f && step < 1e30f)) {
        if (step == 0) step = 1;
        for (int64_t k = 0; k < columns; k += LANES) {
            VF ratio = at_least(at_most(load(hat + k) / step, splat(127.f)), splat(-127.f));
            store_codes(r, m * columns + k, nearest(ratio) + (int32_t)r->offset);
        }
    }
    return top < INFINITY ? step : NAN;
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
    return from_bf16(to_bf16(splat(ideal == 0 ? 1 : ideal))[0]);
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
            store_codes(r, m * r->depth + g * r->group + k, codes + (int32_t)r->offset);
        }
    }
    for (int64_t g = 0; g < groups; g++) steps[g] += sum(poison);
}

enum { PROJECTED = TILE_ROWS * TILE_VECTORS / 2 }; /* rows whose sums of a panel of columns the registers hold */

/* Columns c … of x̂ L2ᵀ, for `rows` rows x̂, to rows of `sums`, in units of the steps of words */
FN void project_panel(const Rows *r, const Branch *hat, float *sums, int64_t rows, int64_t c, int vectors)
{
    int64_t Kp = padded(r->depth, DEPTH_STEP), Rp = padded(r->rank, LANES), chunks = 0;
    const uint16_t *l2 = r->l2 + c * Kp;
    VF started[BLOCK_ROWS][2] = {0};
#ifdef USE_AMX
    chunks = Kp / 32;
    clear_block();
    for (int part = 0; part < PARTS; part++) {
        Left a = left_of(hat + part * Kp, 2 * PARTS * Kp, BLOCK_ROWS);
        for (int64_t k = 0; k < chunks; k++) multiply_block(a, 64 * k, l2, 1, vectors, BOTH);
    }
    store_block((char *)started, sizeof *started, vectors);
#endif
    for (int64_t m = 0; m < rows; m += PROJECTED) {
        VF acc[PROJECTED * 2];
        UNROLL for (int i = 0; i < PROJECTED; i++)
            UNROLL for (int j = 0; j < vectors; j++) acc[i * vectors + j] = started[m + i][j];
        for (int part = 0; part < PARTS; part++) {
            const Branch *a[PROJECTED];
            UNROLL for (int i = 0; i < PROJECTED; i++)
                a[i] = hat + (least(m + i, rows - 1) * PARTS + part) * Kp + 32 * chunks;
            low_rank_tile(acc, a, l2 + 32 * chunks * LANES * vectors, Kp / 2 - 16 * chunks, PROJECTED, vectors);
        }
        UNROLL for (int i = 0; i < PROJECTED; i++)
            if (m + i < rows)
                UNROLL for (int j = 0; j < vectors; j++) store(sums + (m + i) * Rp + c + j * LANES, acc[i * vectors + j]);
    }
}

/* The branch's share of rows m0 …: x̂ L2ᵀ, of `rows` rows x̂ and their steps. */
FN void project_rows(const Rows *r, const Branch *hat, const float *steps, float *sums, int64_t m0, int64_t rows)
{
    int64_t Rp = padded(r->rank, LANES);
    for (int64_t c = 0; c < Rp; c += LOW_PANEL) {
        if (Rp - c >= LOW_PANEL) project_panel(r, hat, sums, rows, c, 2);
        else project_panel(r, hat, sums, rows, c, 1);
    }
    for (int64_t i = 0; i < rows; i++) {
        VI most = {0};
        for (int64_t k = 0; WORDS && k < Rp; k += LANES) {
            VF x = load(sums + i * Rp + k) * (load(r->l2_steps + k) * steps[i]);
            store(sums + i * Rp + k, x);
            most = larger(most, (VI)magnitude(x));
        }
        float step = to_branch((Branch *)r->low + (m0 + i) * PARTS * Rp, sums + i * Rp, Rp, from_bits(largest_of(most)));
        r->low_steps[m0 + i] = step;
    }
}

WORK int quantize_some(const Rows *shared, int64_t *next)
{
    const Rows kept = *shared, *r = &kept; /* which no store can change, so that it stays in registers */
    int64_t Kp = padded(r->depth, DEPTH_STEP), blocks = padded(r->rows, BLOCK_ROWS) / BLOCK_ROWS;
    int64_t own = sizeof(Branch) < sizeof(float) ? 1 : BLOCK_ROWS; /* rows of x̂ */
    int64_t sums = BLOCK_ROWS * padded(r->rank, LANES), floats = padded((2 + own) * Kp + sums, 16);
    float *buffer = aligned_alloc(64, (size_t)floats * sizeof(float)), *hat = buffer + 2 * Kp, steps[BLOCK_ROWS];
    Branch *half = own == 1 && r->rank ? aligned_alloc(64, (size_t)padded(BLOCK_ROWS * PARTS * Kp, 32) * sizeof(Branch)) : 0;
    Folded folded = {-1, buffer, buffer + Kp};
    int failed = !buffer || (own == 1 && r->rank && !half);
    begin();
    for (int64_t block; !failed && (block = take(next, blocks)) < blocks;) {
        int64_t m0 = block * BLOCK_ROWS, rows = least(BLOCK_ROWS, r->rows - m0);
        for (int64_t i = 0; i < rows; i++) {
            float *row = hat + i % own * Kp, top = transform_row(r, m0 + i, row, &folded);
            if (r->group) quantize_groups(r, row, m0 + i);
            else r->steps[m0 + i] = quantize_row(r, row, m0 + i, top);
            if (half) steps[i] = to_branch(half + i * PARTS * Kp, row, Kp, top);
        }
        if (r->rank) project_rows(r, half ? half : (Branch *)hat, steps, hat + own * Kp, m0, rows);
    }
    end();
    free(buffer);
    free(half);
    return failed;
}

int EXPORT(quantize_rows)(const Rows *r) PARALLEL(quantize_some, r)
