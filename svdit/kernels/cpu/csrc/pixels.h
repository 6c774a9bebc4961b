/* What needs no neighbors of a pixel: a product with a matrix, and group norm of an image (pixels, channels), as the scale and shift that it means for each channel; convolve applies
   them. A piece is so many pixels whatever the number of threads. Its sums are of differences from its first pixel, so
   that a mean much larger than the deviation from it costs no digits. */

enum { SPAN = 8 * LANES, PIXELS = 16 * TILE_ROWS };

FN void piece_moments(const GroupNorm *g, int64_t piece, int64_t k)
{
    int64_t C = g->channels, first = piece * g->piece, rows = least(g->piece, g->pixels - first), left = C - k;
    const float *x = g->x + first * C + k;
    float *mean = g->moments + 2 * piece * C + k;
    VF start[8], total[8] = {0}, squares[8] = {0};
    UNROLL for (int j = 0; j < 8; j++) start[j] = load_upto(x + j * LANES, left - j * LANES);
    for (int64_t i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < 8; j++) {
            VF d = load_upto(x + i * C + j * LANES, left - j * LANES) - start[j];
            total[j] += d, squares[j] += d * d;
        }
    UNROLL for (int j = 0; j < 8; j++) {
        VF average = total[j] / (float)rows;
        store_upto(mean + j * LANES, start[j] + average, left - j * LANES);
        store_upto(mean + C + j * LANES, squares[j] - total[j] * average, left - j * LANES);
    }
}

WORK int moments_some(const GroupNorm *shared, int64_t *next)
{
    const GroupNorm kept = *shared, *g = &kept;
    int64_t pieces = (g->pixels + g->piece - 1) / g->piece;
    for (int64_t piece; (piece = take(next, pieces)) < pieces;)
        for (int64_t k = 0; k < g->channels; k += SPAN) piece_moments(g, piece, k);
    return 0;
}

static int JOIN(moments, ISA)(const GroupNorm *g) PARALLEL(moments_some, g)

/* The variance of a group is that within pieces and channels plus that of their means. */
TARGET int EXPORT(group_norm)(const GroupNorm *g)
{
    int64_t C = g->channels, size = C / g->groups, pieces = (g->pixels + g->piece - 1) / g->piece;
    double count = (double)(g->pixels * size);
    if (JOIN(moments, ISA)(g)) return 1;
    for (int64_t k = 0; k < C; k += size) {
        double mean = 0, squares = 0;
        for (int pass = 0; pass < 2; pass++) /* the mean, then what deviates from it */
            for (int64_t p = 0; p < pieces; p++)
                for (int64_t i = k; i < k + size; i++) {
                    double rows = (double)least(g->piece, g->pixels - p * g->piece), local = g->moments[2 * p * C + i];
                    if (!pass) mean += rows * local / count;
                    else squares += (double)g->moments[(2 * p + 1) * C + i] + rows * (local - mean) * (local - mean);
                }
        double inverse = 1 / sqrt(squares / count + 1e-6);
        for (int64_t i = k; i < k + size; i++) {
            g->scale[i] = (float)(g->weight[i] * inverse);
            g->shift[i] = (float)(g->bias[i] - mean * g->weight[i] * inverse);
        }
    }
    return 0;
}

/* TILE_ROWS rows of x, of which `rows` are written. */
FN void project_group(const Projection *p, const float *weight, const float *x, int64_t m, int64_t rows)
{
    for (int64_t n = 0; n < p->outputs; n += PANEL, weight += p->inputs * PANEL) {
        float sums[TILE_ROWS * SLICE];
        int64_t left = least(PANEL, p->outputs - n);
        if (left <= LANES) narrow_sums(sums, x, x + TILE_ROWS * p->inputs, p->inputs, weight, p->inputs);
        else wide_sums(sums, x, x + TILE_ROWS * p->inputs, p->inputs, weight, p->inputs);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < left; j += LANES) {
                VF v = load(sums + i * SLICE + j);
                if (p->bias) v += load_upto(p->bias + n + j, left - j);
                store_upto(p->out + (m + i) * p->outputs + n + j, v, left - j);
            }
    }
}

WORK int project_some(const Projection *shared, int64_t *next)
{
    const Projection kept = *shared, *p = &kept;
    int64_t I = p->inputs, pieces = padded(p->rows, PIXELS) / PIXELS, panel = I * PANEL, size = padded(I, LANES) * PANEL;
    int64_t rows = padded(TILE_ROWS * I, 16), floats = rows + padded(p->outputs, PANEL) / PANEL * panel + size;
    float *buffer = aligned_alloc(64, (size_t)padded(floats, 16) * 4), *weight = buffer + rows;
    if (!buffer) return 1;
    for (int64_t n = 0; n < p->outputs; n += PANEL)
        transpose_rows(weight + n / PANEL * panel, PANEL, p->weight, p->outputs, I, n);
    for (int64_t piece; (piece = take(next, pieces)) < pieces;)
        for (int64_t m = piece * PIXELS; m < least((piece + 1) * PIXELS, p->rows); m += TILE_ROWS) {
            int64_t left = least(TILE_ROWS, p->rows - m);
            const float *x = p->x + m * I;
            if (left < TILE_ROWS) x = memcpy(buffer, x, (size_t)(left * I) * 4);
            project_group(p, weight, x, m, left);
        }
    free(buffer);
    return 0;
}

int EXPORT(project)(const Projection *p) PARALLEL(project_some, p)
