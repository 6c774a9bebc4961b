/* Quantized weights, float activations: FOUR output rows at a time are decoded into cache and multiplied with all
   rows of x. Made for adaLN, whose few rows of x leave nothing to gain from packing. */

enum { FOUR = 4 };

FN void decode_row(const WeightOnly *w, int64_t n, float *to)
{
    int64_t size = w->depth / w->groups;
    const uint8_t *row = w->weight + n * w->depth * w->bits / 8;
    for (int64_t g = 0; g < w->groups; g++, to += size) {
        float scale = w->scales[n * w->groups + g];
        if (w->bits == 8) {
            const int8_t *codes = (const int8_t *)row + g * size;
            for (int64_t k = 0; k < size; k++) to[k] = codes[k] * scale;
        } else {
            const uint8_t *both = row + g * size / 2;
            for (int64_t k = 0; k < size / 2; k++) {
                to[2 * k] = ((both[k] & 15) - 8) * scale;
                to[2 * k + 1] = ((both[k] >> 4) - 8) * scale;
            }
        }
    }
}

WORK void weigh_some(const WeightOnly *w, int64_t *next)
{
    int64_t K = w->depth, Kp = padded(K, LANES), blocks = padded(w->outputs, FOUR) / FOUR;
    float *decoded = calloc(FOUR * (size_t)Kp, sizeof(float));
    for (int64_t block; (block = take(next, blocks)) < blocks;) {
        int64_t n0 = block * FOUR, outputs = least(FOUR, w->outputs - n0);
        for (int64_t j = 0; j < outputs; j++) decode_row(w, n0 + j, decoded + j * Kp);
        for (int64_t m = 0; m < w->rows; m += 2) {
            const float *x[2] = {w->x + m * K, w->x + least(m + 1, w->rows - 1) * K};
            VF acc[2][FOUR] = {0};
            for (int64_t k = 0; k < K; k += LANES) {
                VF left = load_upto(x[0] + k, K - k), right = load_upto(x[1] + k, K - k);
                UNROLL for (int j = 0; j < FOUR; j++) {
                    VF row = load(decoded + j * Kp + k);
                    acc[0][j] += left * row, acc[1][j] += right * row;
                }
            }
            for (int64_t i = 0; i < least(2, w->rows - m); i++)
                for (int64_t j = 0; j < outputs; j++)
                    w->out[(m + i) * w->outputs + n0 + j] = sum(acc[i][j]) + (w->bias ? w->bias[n0 + j] : 0);
        }
    }
    free(decoded);
}

void EXPORT(weigh)(const WeightOnly *w) { PARALLEL(weigh_some, w); }
