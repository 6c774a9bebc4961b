/* The integer product and what follows it. */

#ifndef USE_NEON /* neon.h has its own */
/* acc[i][j] += Σ_k a[i][k] b[k][j] for the lanes of `dot` from `first` to `last`; in registers, for `acc` could alias */
TIGHT void integer_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], const VI *b, int64_t first,
                        int64_t last)
{
    VI sums[TILE_ROWS][TILE_VECTORS];
    memcpy(sums, acc, sizeof sums);
    for (int64_t k = first; k < last; k++) {
        VI weights[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) weights[j] = load_int(b + k * TILE_VECTORS + j);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            VI codes = broadcast(a[i] + k);
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) sums[i][j] = dot(sums[i][j], codes, weights[j]);
        }
    }
    memcpy(acc, sums, sizeof sums);
}
#endif

#if WIDE
/* acc[i][j] += multiples[j] · Σ_k a[i][k] b[k][j] for bytes whose sums fit 16 bits: half the instructions */
FN void short_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], const VI *b, int64_t first,
                   int64_t last, const VI *multiples)
{
    VS part[TILE_ROWS][TILE_VECTORS] = {0};
    for (int64_t k = first; k < last; k++) {
        VI weights[TILE_VECTORS];
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) weights[j] = load_int(b + k * TILE_VECTORS + j);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            __m256i row = (__m256i)broadcast(a[i] + k);
            UNROLL for (int j = 0; j < TILE_VECTORS; j++)
                part[i][j] += (VS)_mm256_maddubs_epi16(row, (__m256i)weights[j]);
        }
    }
    UNROLL for (int j = 0; j < TILE_VECTORS; j++)
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            acc[i][j] += (VI)_mm256_madd_epi16((__m256i)part[i][j], (__m256i)multiples[j]);
}

/* 4-bit codes beside bytes: 16 products of at most 255 · 8 fit 16 bits, 32 columns. */
FN void small_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], Expanded b, const Product *p)
{
    int64_t lanes = padded(p->depth, DEPTH_STEP) / 4, groups = p->group ? p->depth / p->group : 1;
    int64_t run = !p->group || p->group % 32 == 0 ? 8 : 2;
    for (int64_t k = 0; k < lanes; k += run) {
        int64_t group = p->group ? least(4 * k / p->group, groups - 1) : 0;
        short_sums(acc, a, b.codes, k, least(k + run, lanes), b.multiples + group * TILE_VECTORS);
    }
}
#endif

/* y[i][j] += the groups' integer sums, each times the steps of activations and weights */
FN void grouped_sums(VF y[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], const float *const steps[TILE_ROWS],
                     Expanded b, const Product *p)
{
    int64_t lanes = p->group / (p->bits == 4 ? 4 : CODES), groups = p->depth / p->group;
    int64_t share = groups / p->row_steps, left = share, at = 0; /* `share` groups have the same step of activations */
    for (int64_t g = 0; g < groups; g++) {
        VI acc[TILE_ROWS][TILE_VECTORS];
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = b.starts[g * TILE_VECTORS + j];
#if WIDE
        const VI ones[TILE_VECTORS] = {splat_int(0x10001), splat_int(0x10001)};
        int64_t run = p->offset == 128 ? (lanes % 8 ? 4 : 8) : lanes; /* as in small_sums; small codes fit for longer */
        for (int64_t k = g * lanes; p->bits == 4 && k < (g + 1) * lanes; k += run)
            short_sums(acc, a, b.codes, k, k + run, ones);
        if (p->bits == 8)
#endif
            integer_sums(acc, a, b.codes, g * lanes, (g + 1) * lanes);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            float step = steps[i][at];
            UNROLL for (int j = 0; j < TILE_VECTORS; j++)
                y[i][j] += __builtin_convertvector(acc[i][j], VF) * (b.scales[g * TILE_VECTORS + j] * step);
        }
        if (!--left) left = share, at++;
    }
}

/* Outputs n … of row m: `left` of them, of y what lies behind is dropped; `gate` is that of the row's image. */
FN void finish(const Product *p, const float *gate, int64_t m, int64_t n, int64_t left, VF y[TILE_VECTORS])
{
    int64_t at = m * p->outputs + n;
    if (p->gelu) UNROLL for (int j = 0; j < TILE_VECTORS; j++) y[j] = gelu(y[j]);
    if (gate) UNROLL for (int j = 0; j < TILE_VECTORS; j++) y[j] *= load_upto(gate + n + j * LANES, left - j * LANES);
    if (p->residual)
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) y[j] += load_upto(p->residual + at + j * LANES, left - j * LANES);
    UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
        if (p->bf16) store_halves((uint16_t *)p->out + at + j * LANES, y[j], left - j * LANES);
        else store_upto((float *)p->out + at + j * LANES, y[j], left - j * LANES);
    }
}

/* What others computed of a tile's sums: those over the first `lanes` of the codes, or all of groups in fp32, and the
   branch. */
typedef struct {
    const VI *sums;
    const VF *groups, *branch;
    int64_t lanes;
} Started;

/* What a tile will write, and its residual, to cache while its sums are computed: rows lie too far apart for the
   processor's own prefetcher, and every later store waits for one whose line is missing. */
FN void fetch_outputs(const Product *p, int64_t panel, int64_t m0, int64_t rows)
{
    int64_t size = p->bf16 ? 2 : 4, stride = p->outputs * size, at = m0 * stride + panel * PANEL * size;
    for (int64_t i = 0; i < rows; i++, at += stride)
        for (int64_t k = 0; k < PANEL * size; k += 64) {
            __builtin_prefetch((const char *)p->out + at + k, 1);
            if (p->residual && p->residual != p->out) __builtin_prefetch((const char *)p->residual + at + k);
        }
}

#if WORDS
/* y += the low-rank branch of RUN pairs from `first` on */
FN void add_run(VF y[TILE_ROWS][TILE_VECTORS], const Product *p, int64_t panel, const int64_t m[TILE_ROWS], int64_t first)
{
    int64_t Rp = padded(p->rank, LANES), pairs = (p->rank + 1) / 2;
    const Branch *low[TILE_ROWS];
    VI sums[TILE_ROWS][TILE_VECTORS] = {0};
    UNROLL for (int i = 0; i < TILE_ROWS; i++) low[i] = (const Branch *)p->low + m[i] * Rp;
    pair_sums(*sums, low, p->l1 + panel * pairs * PANEL * 2, first, least(first + RUN, pairs), TILE_ROWS, TILE_VECTORS);
    UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
        VF channel = load(p->l1_steps + panel * PANEL + j * LANES);
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            y[i][j] += __builtin_convertvector(sums[i][j], VF) * (channel * p->low_steps[m[i]]);
    }
}
#endif

/* y += the low-rank branch */
FN void branch_tile(VF y[TILE_ROWS][TILE_VECTORS], const Product *p, int64_t panel, const int64_t m[TILE_ROWS], Started from)
{
    int64_t pairs = (p->rank + 1) / 2;
    if (!pairs) return;
#ifdef USE_AMX
    UNROLL for (int i = 0; i < TILE_ROWS; i++)
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) y[i][j] += from.branch[i * TILE_VECTORS + j];
#elif WORDS
    add_run(y, p, panel, m, 0); /* not in the loop, which would keep its scales in memory */
    for (int64_t first = RUN; first < pairs; first += RUN) add_run(y, p, panel, m, first);
#else
    const Branch *low[TILE_ROWS];
    UNROLL for (int i = 0; i < TILE_ROWS; i++) low[i] = (const Branch *)p->low + m[i] * padded(p->rank, LANES);
    low_rank_tile(*y, low, p->l1 + panel * pairs * PANEL * 2, pairs, TILE_ROWS, TILE_VECTORS);
#endif
}

FN void product_tile(const Product *p, Expanded b, int64_t panel, int64_t m0, Started from)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), rows = least(TILE_ROWS, p->rows - m0), m[TILE_ROWS];
    int64_t lanes = Kp / (p->bits == 4 ? 4 : CODES);
    const int32_t *a[TILE_ROWS];
    const float *steps[TILE_ROWS];
    VF y[TILE_ROWS][TILE_VECTORS] = {0};
    fetch_outputs(p, panel, m0, rows);
    UNROLL for (int i = 0; i < TILE_ROWS; i++) {
        m[i] = m0 + least(i, rows - 1);
        a[i] = (const int32_t *)p->codes + m[i] * lanes, steps[i] = p->steps + m[i] * p->row_steps;
    }
    if (from.groups) memcpy(y, from.groups, sizeof y);
    else if (p->floats) grouped_sums(y, a, steps, b, p);
    else {
        VI acc[TILE_ROWS][TILE_VECTORS] = {0};
        if (from.sums) memcpy(acc, from.sums, sizeof acc);
#if WIDE
        if (p->bits == 4) small_sums(acc, a, b, p);
        else
#endif
            integer_sums(acc, a, b.codes, from.lanes, lanes);
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
            VI offset = load_int(p->offsets + panel * PANEL + j * LANES);
            VF channel = load(p->channel + panel * PANEL + j * LANES);
            UNROLL for (int i = 0; i < TILE_ROWS; i++)
                y[i][j] = __builtin_convertvector(acc[i][j] - offset, VF) * (channel * *steps[i]);
        }
    }
    UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
        VF bias = load(p->bias + panel * PANEL + j * LANES);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) y[i][j] += bias;
    }
    branch_tile(y, p, panel, m, from);
    int64_t n = panel * PANEL, left = p->outputs - n;
    UNROLL for (int i = 0; i < TILE_ROWS; i++) {
        if (i >= rows) break;
        const float *gate = p->gate ? p->gate + (m0 + i) / p->tokens * p->stride : 0;
        if (left >= PANEL) finish(p, gate, m0 + i, n, PANEL, y[i]);
        else finish(p, gate, m0 + i, n, left, y[i]);
    }
}

#ifdef USE_AMX
#include "tiled.h"
#else
/* Rows `first` … `last` of one panel. */
FN void multiply_rows(const Product *p, Expanded b, int64_t panel, int64_t first, int64_t last)
{
    for (int64_t m = first; m < last; m += TILE_ROWS) product_tile(p, b, panel, m, (Started){0});
}

WORK int multiply_some(const Product *shared, int64_t *next)
{
    const Product kept = *shared, *p = &kept; /* which no store can change */
    int64_t Kp = padded(p->depth, DEPTH_STEP), panels = padded(p->outputs, PANEL) / PANEL;
    int64_t size = p->group ? p->group : p->depth;
    int64_t tiles = padded(p->rows, TILE_ROWS) / TILE_ROWS, parts = padded(4 * team(), panels) / panels;
    Expanded own = new_panels(1, PANEL * Kp * (p->bits == 4 ? 1 : 4 / CODES), p->depth / size), b = own;
    if (!own.multiples) return 1;
    parts = least(parts, padded(tiles, 8) / 8); /* of the rows, where panels are few for so many threads */
    for (int64_t piece, last = -1, panel; (piece = take(next, panels * parts)) < panels * parts; last = panel) {
        int64_t part = piece % parts;
        panel = piece / parts;
        if (panel != last) b = expand(p, panel, size, own);
        int64_t first = tiles * part / parts * TILE_ROWS, behind = tiles * (part + 1) / parts * TILE_ROWS;
        multiply_rows(p, b, panel, first, least(behind, p->rows));
    }
    free(own.multiples); /* the start of the buffer */
    return 0;
}

#endif

int EXPORT(multiply)(const Product *p) PARALLEL(multiply_some, p)
