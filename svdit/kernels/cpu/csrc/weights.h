/* Quantized or float weights, float activations. Up to FEW rows of x (adaLN): FOUR rows of weights at a time, read as
   they are stored, meet two rows of x. More rows of x: ROWS rows of weights are decoded once to floats, and TILE_VECTORS
   of them at a time meet TILE_ROWS of x. Both add the same numbers in the same order, CHUNK columns after the other, so
   the sums of a row of x depend on no other row, nor on the number of threads. */

enum { FEW = 8, FOUR = 4, CHUNK = 2 * LANES, ROWS = 64 };

/* LANES codes of a chunk, its first or its second half; of 4 bits those of even or those of odd columns. */
FN VF decode(const uint8_t *codes, int half, int64_t bits)
{
    if (bits == 32) return load((const float *)codes + half * LANES);
    if (bits == 8) return __builtin_convertvector(load_bytes(codes + half * LANES), VF);
    VI both = load_bytes(codes), code = (half ? both >> 4 : both) & 15;
#if defined(USE_VNNI) && LANES == 16
    return ordered(__builtin_convertvector(NUMBERS - 8, VF), code); /* one instruction, which also does the & 15 */
#else
    return __builtin_convertvector(code - 8, VF);
#endif
}

/* A row of x in the order of `decode`, zeros behind its last column; vectors lie `stride` apart. */
FN void arrange(VF *to, int64_t stride, const float *x, int64_t columns, int64_t bits)
{
    for (int64_t k = 0; k < columns; k += CHUNK, to += 2 * stride) {
        VF first = load_upto(x + k, columns - k), second = load_upto(x + k + LANES, columns - k - LANES);
        to[0] = bits == 4 ? picked(first, second, NUMBERS * 2) : first;
        to[stride] = bits == 4 ? picked(first, second, NUMBERS * 2 + 1) : second;
    }
}

/* acc[i][j] += Σ x[i] codes[j] over a chunk that begins at column k of x */
FN void chunk_sums(VF acc[2][FOUR], const float *const x[2], int64_t k, const uint8_t *const codes[FOUR], int64_t bits)
{
    VF left[2] = {load(x[0] + k), load(x[0] + k + LANES)}, right[2] = {load(x[1] + k), load(x[1] + k + LANES)};
    UNROLL for (int j = 0; j < FOUR; j++)
        UNROLL for (int half = 0; half < 2; half++) {
            VF c = decode(codes[j], half, bits);
            acc[0][j] += left[half] * c, acc[1][j] += right[half] * c;
        }
}

/* acc[i][j] += Σ_k x[i][k] weight[n0 + j][k], group by group. Memory is read in order, FOUR rows ahead: four streams that
   start anew every row are too much for the processor's own prefetcher. */
FN void few_sums(VF acc[2][FOUR], const WeightOnly *w, const float *const x[2], int64_t n0, int64_t bits)
{
    int64_t K = w->depth, size = K / w->groups, step = FOUR * CHUNK * bits / 8;
    const uint8_t *codes[FOUR], *ahead = w->weight + (n0 + FOUR) * K * bits / 8;
    const float *scales[FOUR];
    for (int64_t j = 0, n; j < FOUR; j++) {
        n = least(n0 + j, w->outputs - 1);
        codes[j] = w->weight + n * K * bits / 8, scales[j] = w->scales + n * w->groups;
    }
    for (int64_t g = 0; g < w->groups; g++) {
        VF part[2][FOUR] = {0};
        int64_t k = g * size, left;
        for (; (left = (g + 1) * size - k) >= CHUNK; k += CHUNK, ahead += step) {
            UNROLL for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(ahead + line);
            chunk_sums(part, x, k, codes, bits);
            UNROLL for (int j = 0; j < FOUR; j++) codes[j] += CHUNK * bits / 8;
        }
        if (left) { /* only behind the last group, where more must not be read */
            uint8_t ends[FOUR][CHUNK * 4];
            size_t bytes = (size_t)(left * bits / 8);
            for (int j = 0; j < FOUR; j++) {
                memset(ends[j] + bytes, 0, sizeof ends[j] - bytes);
                codes[j] = memcpy(ends[j], codes[j], bytes);
            }
            chunk_sums(part, x, k, codes, bits);
        }
        UNROLL for (int j = 0; j < FOUR; j++)
            UNROLL for (int i = 0; i < 2; i++) acc[i][j] += part[i][j] * scales[j][g];
    }
}

/* The rows of x, arranged, times ROWS rows of weights from n0 on */
WORK void weigh_piece(const WeightOnly *w, const float *x, int64_t n0)
{
    int64_t Kp = padded(w->depth, CHUNK), end = least(n0 + ROWS, w->outputs);
    for (; n0 < end; n0 += FOUR)
        for (int64_t m = 0; m < w->rows; m += 2) {
            const float *pair[2] = {x + m * Kp, x + least(m + 1, w->rows - 1) * Kp};
            VF acc[2][FOUR] = {0};
            if (w->bits == 32) few_sums(acc, w, pair, n0, 32);
            else if (w->bits == 8) few_sums(acc, w, pair, n0, 8);
            else few_sums(acc, w, pair, n0, 4);
            for (int64_t i = 0; i < least(2, w->rows - m); i++) {
                float y[FOUR];
                four_sums(y, acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
                for (int64_t n = n0; n < least(n0 + FOUR, end); n++)
                    w->out[(m + i) * w->outputs + n] = y[n - n0] + (w->bias ? w->bias[n] : 0);
            }
        }
}

WORK int weigh_few(const WeightOnly *shared, int64_t *next)
{
    const WeightOnly kept = *shared, *w = &kept;
    int64_t Kp = padded(w->depth, CHUNK), pieces = padded(w->outputs, ROWS) / ROWS;
    float *x = aligned_alloc(64, (size_t)padded(w->rows * Kp * (int64_t)sizeof(float), 64));
    if (!x) return 1;
    for (int64_t m = 0; m < w->rows; m++) arrange((VF *)(x + m * Kp), 1, w->x + m * w->depth, w->depth, w->bits);
    for (int64_t piece; (piece = take(next, pieces)) < pieces;) weigh_piece(w, x, piece * ROWS);
    free(x);
    return 0;
}

/* A row of weights as floats, zeros behind its last column; vectors lie TILE_VECTORS apart. */
FN void decode_row(VF *to, const uint8_t *codes, int64_t columns, int64_t bits)
{
    uint8_t end[CHUNK * 4] = {0};
    for (int64_t left = columns; left > 0; left -= CHUNK, to += 2 * TILE_VECTORS, codes += CHUNK * bits / 8) {
        if (left < CHUNK) codes = memcpy(end, codes, (size_t)(left * bits / 8));
        to[0] = decode(codes, 0, bits), to[TILE_VECTORS] = decode(codes, 1, bits);
    }
}

/* ROWS rows of weights from n0 on: (ROWS / TILE_VECTORS, vectors, TILE_VECTORS) */
FN void decode_rows(VF *to, const WeightOnly *w, int64_t n0, int64_t bits)
{
    int64_t K = w->depth, vectors = padded(K, CHUNK) / LANES;
    for (int64_t n = 0; n < ROWS; n++)
        decode_row(to + n / TILE_VECTORS * TILE_VECTORS * vectors + n % TILE_VECTORS,
                   w->weight + least(n0 + n, w->outputs - 1) * K * bits / 8, K, bits);
}

/* sums[i][j] = Σ_k x[i][k] weight[j][k] for the first `rows` of x */
TIGHT void tile_sums(VF sums[TILE_ROWS][TILE_VECTORS], const VF *x, const VF *weight, int64_t vectors, int rows)
{
    VF acc[TILE_ROWS][TILE_VECTORS] = {0};
    for (int64_t k = 0; k < vectors; k++, x += TILE_ROWS, weight += TILE_VECTORS)
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] += x[i] * weight[j];
    memcpy(sums, acc, sizeof acc);
}

/* Up to TILE_ROWS rows of x from m0 on times TILE_VECTORS rows of weights from n0 on */
FN void weigh_tile(const WeightOnly *w, const VF *x, const VF *weight, int64_t m0, int64_t rows, int64_t n0)
{
    int64_t size = (w->groups > 1 ? w->depth / w->groups : padded(w->depth, CHUNK)) / LANES;
    VF acc[TILE_ROWS][TILE_VECTORS] = {0}, part[TILE_ROWS][TILE_VECTORS];
    float y[TILE_ROWS * TILE_VECTORS];
    for (int64_t g = 0; g < w->groups; g++, x += size * TILE_ROWS, weight += size * TILE_VECTORS) {
        if (rows > TILE_ROWS / 2) tile_sums(part, x, weight, size, TILE_ROWS);
        else tile_sums(part, x, weight, size, TILE_ROWS / 2);
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
            float scale = w->scales[least(n0 + j, w->outputs - 1) * w->groups + g];
            UNROLL for (int i = 0; i < TILE_ROWS; i++) acc[i][j] += part[i][j] * scale;
        }
    }
    const VF *sums = acc[0];
    UNROLL for (int i = 0; i < TILE_ROWS * TILE_VECTORS; i += 4)
        four_sums(y + i, sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < least(TILE_VECTORS, w->outputs - n0); j++)
            w->out[(m0 + i) * w->outputs + n0 + j] = y[i * TILE_VECTORS + j] + (w->bias ? w->bias[n0 + j] : 0);
}

WORK int weigh_many(const WeightOnly *shared, int64_t *next)
{
    const WeightOnly kept = *shared, *w = &kept;
    int64_t K = w->depth, vectors = padded(K, CHUNK) / LANES, panels = padded(w->outputs, ROWS) / ROWS;
    int64_t tiles = padded(w->rows, TILE_ROWS) / TILE_ROWS, parts = least(tiles, padded(4 * team(), panels) / panels);
    VF *x = aligned_alloc(64, (size_t)((TILE_ROWS + ROWS) * vectors) * sizeof(VF)), *weight = x + TILE_ROWS * vectors;
    if (!x) return 1;
    for (int64_t piece, panel, last = -1; (piece = take(next, panels * parts)) < panels * parts; last = panel) {
        int64_t part = piece % parts, n0 = (panel = piece / parts) * ROWS;
        if (panel == last);
        else if (w->bits == 32) decode_rows(weight, w, n0, 32);
        else if (w->bits == 8) decode_rows(weight, w, n0, 8);
        else decode_rows(weight, w, n0, 4);
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; tile++) {
            int64_t m0 = tile * TILE_ROWS, rows = least(TILE_ROWS, w->rows - m0);
            for (int64_t i = 0; i < rows; i++) arrange(x + i, TILE_ROWS, w->x + (m0 + i) * K, K, w->bits);
            for (int64_t n = 0; n < least(ROWS, w->outputs - n0); n += TILE_VECTORS)
                weigh_tile(w, x, weight + n * vectors, m0, rows, n0 + n);
        }
    }
    free(x);
    return 0;
}

int EXPORT(weigh)(const WeightOnly *w)
{
    if (w->rows <= FEW) PARALLEL(weigh_few, w)
    PARALLEL(weigh_many, w)
}
