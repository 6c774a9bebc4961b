/* One row of numbers and what happens to it first: its gated activation, its norm. */

typedef struct {
    int64_t columns, glu; /* glu: silu(a) · b of 2 · columns numbers a and b */
    const uint16_t *halves; /* instead of x */
    const float *x;
    float mean, inverse;
} Row;

FN Row row_at(const void *x, int64_t bf16, int64_t at, int64_t columns)
{
    if (bf16) return (Row){.columns = columns, .halves = (const uint16_t *)x + at};
    return (Row){.columns = columns, .x = (const float *)x + at};
}

FN VF stored(const Row *row, int64_t k, int64_t left)
{
    return row->halves ? load_halves(row->halves + k, left) : load_upto(row->x + k, left);
}

/* LANES columns from k on, of which `left` are there; more are zeros. */
FN VF element(const Row *row, int64_t k, int64_t left)
{
    VF v = stored(row, k, left);
    return row->glu ? silu(v) * stored(row, row->columns + k, left) : v;
}

FN VF squared(const Row *row, int64_t k, int64_t left)
{
    VF d = element(row, k, left) - row->mean;
    if (left < LANES) d = (VF)((VI)d & (NUMBERS < (int32_t)left));
    return d * d;
}

/* Mean, 0 for RMSNorm, and one over the deviation from it; four sums run side by side. */
FN void moments(Row *row, int64_t rms, float epsilon)
{
    int64_t n = row->columns, k;
    VF total[4] = {0}, squares[4] = {0};
    for (k = 0; !rms && k + 4 * LANES <= n; k += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j++) total[j] += element(row, k + j * LANES, LANES);
    for (; !rms && k < n; k += LANES) total[0] += element(row, k, n - k);
    row->mean = sum((total[0] + total[1]) + (total[2] + total[3])) / (float)n;
    for (k = 0; k + 4 * LANES <= n; k += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j++) squares[j] += squared(row, k + j * LANES, LANES);
    for (; k < n; k += LANES) squares[0] += squared(row, k, n - k);
    row->inverse = 1.f / sqrtf(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)n + epsilon);
}
