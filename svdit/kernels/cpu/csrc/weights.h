/* Quantized or float weights, float activations: FOUR rows of weights at a time meet two rows of x, CHUNK columns after
   the other. Made for adaLN, whose few rows of x leave nothing to gain from packing: weights are read as they are
   stored. The sums of a row of x depend on no other row, nor on the number of threads. */

/* A thread takes ROWS rows of weights and up to TOKENS of x at once. */
enum { FOUR = 4, CHUNK = 2 * LANES, ROWS = 8 * FOUR, TOKENS = 64 };

/* CHUNK codes: all in order, or with 4 bits first those of even columns. */
FN void decode(VF to[2], const uint8_t *codes, int64_t bits)
{
    if (bits == 32) {
        memcpy(to, codes, 2 * sizeof *to);
        return;
    }
    VI first = load_bytes(codes), second = bits == 8 ? load_bytes(codes + LANES) : (first >> 4 & 15) - 8;
    if (bits == 4) first = (first & 15) - 8;
    to[0] = __builtin_convertvector(first, VF), to[1] = __builtin_convertvector(second, VF);
}

/* Columns to the order of `decode`, zeros behind the last one. */
FN void arrange(float *to, const float *x, int64_t columns, int64_t bits)
{
    for (int64_t k = 0; k < columns; k += CHUNK)
        for (int64_t i = 0; i < CHUNK; i++) {
            int64_t at = k + (bits == 4 ? i % LANES * 2 + i / LANES : i);
            *to++ = at < columns ? x[at] : 0;
        }
}

/* acc[i][j] += Σ x[i] codes[j] over a chunk that begins at column k of x */
FN void chunk_sums(VF acc[2][FOUR], const float *const x[2], int64_t k, const uint8_t *const codes[FOUR], int64_t bits)
{
    VF left[2] = {load(x[0] + k), load(x[0] + k + LANES)}, right[2] = {load(x[1] + k), load(x[1] + k + LANES)};
    UNROLL for (int j = 0; j < FOUR; j++) {
        VF c[2];
        decode(c, codes[j], bits);
        UNROLL for (int half = 0; half < 2; half++) acc[0][j] += left[half] * c[half], acc[1][j] += right[half] * c[half];
    }
}

/* acc[i][j] += Σ_k x[i][k] weight[n0 + j][k], group by group */
FN void few_sums(VF acc[2][FOUR], const WeightOnly *w, const float *const x[2], int64_t n0, int64_t bits)
{
    int64_t K = w->depth, size = K / w->groups;
    const uint8_t *codes[FOUR];
    const float *scales[FOUR];
    for (int64_t j = 0, n; j < FOUR; j++) {
        n = least(n0 + j, w->outputs - 1);
        codes[j] = w->weight + n * K * bits / 8, scales[j] = w->scales + n * w->groups;
    }
    for (int64_t g = 0; g < w->groups; g++) {
        VF part[2][FOUR] = {0};
        int64_t k = g * size, left;
        for (; (left = (g + 1) * size - k) >= CHUNK; k += CHUNK) {
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

/* `rows` rows of x, arranged, from row m0 on times ROWS rows of weights from n0 on */
WORK void weigh_piece(const WeightOnly *w, const float *x, int64_t m0, int64_t rows, int64_t n0)
{
    int64_t Kp = padded(w->depth, CHUNK), end = least(n0 + ROWS, w->outputs);
    for (; n0 < end; n0 += FOUR)
        for (int64_t m = 0; m < rows; m += 2) {
            const float *pair[2] = {x + m * Kp, x + least(m + 1, rows - 1) * Kp};
            VF acc[2][FOUR] = {0};
            if (w->bits == 32) few_sums(acc, w, pair, n0, 32);
            else if (w->bits == 8) few_sums(acc, w, pair, n0, 8);
            else few_sums(acc, w, pair, n0, 4);
            for (int64_t i = 0; i < least(2, rows - m); i++)
                for (int64_t n = n0; n < least(n0 + FOUR, end); n++)
                    w->out[(m0 + m + i) * w->outputs + n] = sum(acc[i][n % FOUR]) + (w->bias ? w->bias[n] : 0);
        }
}

WORK int weigh_some(const WeightOnly *shared, int64_t *next)
{
    const WeightOnly kept = *shared, *w = &kept;
    int64_t K = w->depth, Kp = padded(K, CHUNK), wide = padded(w->outputs, ROWS) / ROWS, held = -1;
    int64_t pieces = wide * (padded(w->rows, TOKENS) / TOKENS);
    float *x = malloc((size_t)(least(w->rows, TOKENS) * Kp) * sizeof(float));
    if (!x) return 1;
    for (int64_t piece; (piece = take(next, pieces)) < pieces;) {
        int64_t m0 = piece / wide * TOKENS, rows = least(TOKENS, w->rows - m0);
        if (m0 != held)
            for (int64_t m = 0; m < rows; m++) arrange(x + m * Kp, w->x + (m0 + m) * K, K, w->bits);
        held = m0;
        weigh_piece(w, x, m0, rows, piece % wide * ROWS);
    }
    free(x);
    return 0;
}

int EXPORT(weigh)(const WeightOnly *w) PARALLEL(weigh_some, w)
