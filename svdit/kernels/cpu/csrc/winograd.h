/* 3×3 convolutions of an image (height, width, channels) by F(6×6, 3×3) of Winograd's minimal filtering (Lavin and Gray,
   arXiv 1509.09308): Y = Aᵀ [(G g Gᵀ) ∘ (Bᵀ d B)] A, summed over channels between Bᵀ and A, with 64 products in place of
   324. In one dimension the rows of G are (1, a, a²) / N(a) of the points a = 0, ±1, ±2, ±½, ∞, the columns of Aᵀ are
   (1, a, …, a⁵), and the rows of Bᵀ have the coefficients of Π (x − b) over the other finite points b; N(a) is its
   value at a. ∞ stands for (0, 0, 1), (0, …, 0, 1) and the product over all of them.

   Of an image enlarged to twice its size by repetition, the two pixels of each pair have opposite signs in the row of −1:
   its 15 of 64 products are zero and left out.

   A piece of the work is a block of tiles and some slices of the outputs. Its inputs are transformed once, the weights of
   a slice a row of points at a time, directly before they are used: kept, they would be seven times as large as the
   weights themselves. Sums run over all inputs in order, so neither the size of blocks nor the number of threads changes
   a bit. */

enum { SIDE = 6, POINTS = 8, MINUS_ONE = 2, STRIP = 8, STRIP_WIDTH = STRIP * SIDE + 2 };
enum { SLICE = PANEL > 64 ? PANEL : 64 }; /* outputs, whole panels: of each transformed input read from memory */

/* Where a thread keeps its block, in groups of TILE_ROWS tiles. Rows are padded by a line of cache, or all points of a
   tile would lie in the same few sets. */
typedef struct {
    int64_t row, group, sums; /* floats of a row of inputs; of a point of a group of inputs, of products */
    float *strip;             /* (POINTS, STRIP_WIDTH, LANES) */
    float *inputs;            /* (groups, POINTS, POINTS, TILE_ROWS, row) */
    float *taps;              /* (padded inputs · 9, SLICE) */
    float *weights;           /* (POINTS, SLICE / PANEL, inputs, PANEL), of one row of points */
    float *products;          /* (groups, POINTS, POINTS, sums) */
} Block;

/* Bᵀ d */
FN void to_points(VF to[POINTS], const VF d[POINTS])
{
    VF even = d[2] + d[6] - d[4] * 4.25f, odd = d[1] + d[5] - d[3] * 4.25f;
    to[0] = (d[0] - d[6]) + (d[4] - d[2]) * 5.25f;
    to[1] = even + odd, to[2] = even - odd;
    even = d[6] + (d[2] * 0.25f - d[4] * 1.25f), odd = d[1] * 0.5f + (d[5] * 2.f - d[3] * 2.5f);
    to[3] = even + odd, to[4] = even - odd;
    even = d[6] + (d[2] * 4.f - d[4] * 5.f), odd = d[5] * 0.5f + (d[1] * 2.f - d[3] * 2.5f);
    to[5] = even + odd, to[6] = even - odd;
    to[7] = (d[7] - d[1]) + (d[3] - d[5]) * 5.25f;
}

/* G g */
FN void weights_to_points(VF to[POINTS], VF a, VF b, VF c)
{
    VF even = (a + c) * (-2.f / 9), odd = b * (-2.f / 9);
    to[0] = a, to[1] = even + odd, to[2] = even - odd;
    even = a * (1.f / 90) + c * (4.f / 90), odd = b * (2.f / 90);
    to[3] = even + odd, to[4] = even - odd;
    even = a * (32.f / 45) + c * (8.f / 45), odd = b * (16.f / 45);
    to[5] = even + odd, to[6] = even - odd, to[7] = c;
}

/* Aᵀ m */
FN void from_points(VF to[SIDE], const VF m[POINTS])
{
    VF sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    VF sum3 = m[5] + m[6], difference3 = m[5] - m[6];
    to[0] = m[0] + sum1 + (sum2 + sum3);
    to[1] = difference1 + (difference2 * 2.f + difference3 * 0.5f);
    to[2] = sum1 + (sum2 * 4.f + sum3 * 0.25f);
    to[3] = difference1 + (difference2 * 8.f + difference3 * 0.125f);
    to[4] = sum1 + (sum2 * 16.f + sum3 * 0.0625f);
    to[5] = difference1 + (difference2 * 32.f + difference3 * 0.03125f) + m[7];
}

/* The pixels of `count` tiles from (top, left) on, LANES channels from k on, normalized; zeros outside of the image. */
FN void fill_strip(const Convolution *c, float *strip, int64_t top, int64_t left, int64_t count, int64_t k)
{
    int64_t here = least(LANES, c->inputs - k), width = c->width >> c->enlarge;
    VF scale = {0}, shift = {0};
    if (c->scale) scale = load_upto(c->scale + k, here), shift = load_upto(c->shift + k, here);
    for (int64_t y = 0; y < POINTS; y++)
        for (int64_t x = 0; x < count * SIDE + 2; x++) {
            VF v = {0};
            int64_t row = top + y - 1, column = left + x - 1;
            if (row >= 0 && row < c->height && column >= 0 && column < c->width) {
                const float *p = c->x + ((row >> c->enlarge) * width + (column >> c->enlarge)) * c->inputs + k;
                __builtin_prefetch(p + LANES);
                v = load_upto(p, here);
                if (c->scale) v = silu(v * scale + shift);
            }
            store(strip + (y * STRIP_WIDTH + x) * LANES, v);
        }
}

/* A tile of the strip to its points, which lie `stride` floats apart. */
FN void transform_tile(float *to, int64_t stride, const float *strip)
{
    VF half[POINTS][POINTS];
    for (int x = 0; x < POINTS; x++) {
        VF d[POINTS], t[POINTS];
        UNROLL for (int y = 0; y < POINTS; y++) d[y] = load(strip + (y * STRIP_WIDTH + x) * LANES);
        to_points(t, d);
        UNROLL for (int y = 0; y < POINTS; y++) half[y][x] = t[y];
    }
    for (int y = 0; y < POINTS; y++) {
        VF t[POINTS];
        to_points(t, half[y]);
        UNROLL for (int x = 0; x < POINTS; x++) store(to + (y * POINTS + x) * stride, t[x]);
    }
}

WORK void transform_inputs(const Convolution *c, const Block *b, int64_t first, int64_t tiles)
{
    int64_t across = padded(c->width, SIDE) / SIDE;
    for (int64_t t = 0, count; t < tiles; t += count) {
        int64_t top = (first + t) / across, left = (first + t) % across;
        count = least(least(STRIP, across - left), tiles - t);
        for (int64_t k = 0; k < c->inputs; k += LANES) {
            fill_strip(c, b->strip, top * SIDE, left * SIDE, count, k);
            for (int64_t i = 0, tile = t; i < count; i++, tile++)
                transform_tile(b->inputs + tile / TILE_ROWS * POINTS * POINTS * b->group + tile % TILE_ROWS * b->row + k,
                               b->group, b->strip + i * SIDE * LANES);
        }
    }
}

/* Rows n … of a matrix (rows, depth) to the columns of (padded depth, width), in vectors, zeros behind the last one. */
WORK void transpose_rows(float *to, int64_t width, const float *from, int64_t rows, int64_t depth, int64_t n)
{
    for (int64_t k = 0; k < depth; k += LANES)
        for (int64_t j = 0; j < width && n + j < rows; j += LANES) {
            VF block[LANES];
            for (int64_t i = 0; i < LANES; i++)
                block[i] = n + j + i < rows ? load_upto(from + (n + j + i) * depth + k, depth - k) : (VF){0};
            transpose(block);
            UNROLL for (int64_t i = 0; i < LANES; i++) store(to + (k + i) * width + j, block[i]);
        }
}

/* Row y of the points G g Gᵀ of a slice */
WORK void transform_weights(const Convolution *c, const Block *b, int y, int64_t outputs)
{
    const float G[POINTS][3] = {{1, 0, 0}, {-2.f / 9, -2.f / 9, -2.f / 9}, {-2.f / 9, 2.f / 9, -2.f / 9},
                                {1.f / 90, 2.f / 90, 4.f / 90}, {1.f / 90, -2.f / 90, 4.f / 90},
                                {32.f / 45, 16.f / 45, 8.f / 45}, {32.f / 45, -16.f / 45, 8.f / 45}, {0, 0, 1}};
    for (int64_t k = 0; k < c->inputs; k++)
        for (int64_t j = 0; j < outputs; j += LANES) {
            const float *g = b->taps + k * 9 * SLICE + j;
            float *to = b->weights + (j / PANEL * c->inputs + k) * PANEL + j % PANEL;
            VF taps[3], t[POINTS];
            UNROLL for (int x = 0; x < 3; x++)
                taps[x] = load(g + x * SLICE) * G[y][0] + load(g + (3 + x) * SLICE) * G[y][1]
                          + load(g + (6 + x) * SLICE) * G[y][2];
            weights_to_points(t, taps[0], taps[1], taps[2]);
            UNROLL for (int x = 0; x < POINTS; x++) store(to + x * c->inputs * SLICE, t[x]);
        }
}

/* to[i][j] = Σ_k a[i][k] b[k][j], of TILE_ROWS rows `stride` apart and so many vectors of a panel; the rows from `ahead`
   on, which come next, are fetched meanwhile. */
FN void float_sums(float *to, const float *a, const float *ahead, int64_t stride, const float *b, int64_t depth, int vectors)
{
    VF acc[TILE_ROWS][TILE_VECTORS] = {0};
    UNROLL for (int i = 0; i < TILE_ROWS; i++)
        UNROLL for (int j = 0; j < vectors; j++) __builtin_prefetch(to + i * SLICE + j * LANES, 1);
    for (int64_t k = 0; k < depth; k++) {
        VF w[TILE_VECTORS];
        __builtin_prefetch(ahead + k * TILE_ROWS);
        UNROLL for (int j = 0; j < vectors; j++) w[j] = load(b + k * PANEL + j * LANES);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            VF x = splat(a[i * stride + k]);
            UNROLL for (int j = 0; j < vectors; j++) acc[i][j] += x * w[j];
        }
    }
    UNROLL for (int i = 0; i < TILE_ROWS; i++)
        UNROLL for (int j = 0; j < vectors; j++) store(to + i * SLICE + j * LANES, acc[i][j]);
}
WORK void wide_sums(float *to, const float *a, const float *ahead, int64_t stride, const float *b, int64_t depth)
{
    float_sums(to, a, ahead, stride, b, depth, TILE_VECTORS);
}
WORK void narrow_sums(float *to, const float *a, const float *ahead, int64_t stride, const float *b, int64_t depth)
{
    float_sums(to, a, ahead, stride, b, depth, 1);
}

/* A tile's products to outputs n … of its pixels. */
FN void finish_tile(const Convolution *c, const float *from, int64_t stride, int64_t top, int64_t left, int64_t n, int enlarge)
{
    VF half[SIDE][POINTS], bias = {0};
    if (c->bias) bias = load_upto(c->bias + n, c->outputs - n);
    for (int x = 0; x < POINTS; x++) {
        VF m[POINTS], t[SIDE];
        if (enlarge && x == MINUS_ONE) continue;
        UNROLL for (int y = 0; y < POINTS; y++)
            m[y] = enlarge && y == MINUS_ONE ? (VF){0} : load(from + (y * POINTS + x) * stride);
        from_points(t, m);
        UNROLL for (int y = 0; y < SIDE; y++) half[y][x] = t[y];
    }
    for (int y = 0; y < SIDE && top + y < c->height; y++) {
        VF t[SIDE];
        if (enlarge) half[y][MINUS_ONE] = (VF){0};
        from_points(t, half[y]);
        for (int x = 0; x < SIDE && left + x < c->width; x++) {
            int64_t at = ((top + y) * c->width + left + x) * c->outputs + n;
            VF v = t[x] + bias;
            if (c->residual) v += load_upto(c->residual + at, c->outputs - n);
            store_upto(c->out + at, v, c->outputs - n);
        }
    }
}

WORK void finish_tiles(const Convolution *c, const Block *b, int64_t first, int64_t tiles, int64_t n)
{
    int64_t across = padded(c->width, SIDE) / SIDE;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t top = (first + t) / across * SIDE, left = (first + t) % across * SIDE;
        const float *from = b->products + t / TILE_ROWS * POINTS * POINTS * b->sums + t % TILE_ROWS * SLICE;
        for (int64_t j = 0; j < SLICE && n + j < c->outputs; j += LANES) {
            if (c->enlarge) finish_tile(c, from + j, b->sums, top, left, n + j, 1);
            else finish_tile(c, from + j, b->sums, top, left, n + j, 0);
        }
    }
}

/* A group's products at one point with the panels of a slice */
FN void multiply_group(const Convolution *c, const Block *b, int64_t group, int point, int64_t outputs)
{
    const float *from = b->inputs + (group * POINTS * POINTS + point) * b->group, *ahead = from + POINTS * POINTS * b->group;
    const float *weights = b->weights + point % POINTS * c->inputs * SLICE;
    float *to = b->products + (group * POINTS * POINTS + point) * b->sums;
    for (int64_t j = 0; j < outputs; j += PANEL, to += PANEL, weights += c->inputs * PANEL) {
        if (outputs - j <= LANES) narrow_sums(to, from, ahead, b->row, weights, c->inputs);
        else wide_sums(to, from, ahead, b->row, weights, c->inputs);
    }
}

/* Outputs n … of a block, at most SLICE */
FN void convolve_slice(const Convolution *c, const Block *b, int64_t first, int64_t tiles, int64_t n)
{
    int64_t outputs = least(SLICE, c->outputs - n);
    transpose_rows(b->taps, SLICE, c->weight, c->outputs, 9 * c->inputs, n);
    for (int y = 0; y < POINTS; y++) {
        if (c->enlarge && y == MINUS_ONE) continue;
        transform_weights(c, b, y, outputs);
        for (int x = 0; x < POINTS; x++)
            for (int64_t g = 0; g < padded(tiles, TILE_ROWS) / TILE_ROWS && !(c->enlarge && x == MINUS_ONE); g++)
                multiply_group(c, b, g, y * POINTS + x, outputs);
    }
    finish_tiles(c, b, first, tiles, n);
}

/* The memory of a thread, and for how many tiles it suffices. */
FN Block block_in(const Convolution *c, float *memory, int64_t *tiles)
{
    Block b = {.row = padded(c->inputs, LANES) + 16, .sums = TILE_ROWS * SLICE + 16, .strip = memory};
    b.group = TILE_ROWS * b.row;
    b.taps = b.strip + POINTS * STRIP_WIDTH * LANES;
    b.weights = b.taps + padded(9 * c->inputs, LANES) * SLICE;
    b.inputs = b.weights + POINTS * c->inputs * SLICE;
    int64_t left = c->floats - (b.inputs - memory), groups = left / (POINTS * POINTS * (b.group + b.sums));
    b.products = b.inputs + groups * POINTS * POINTS * b.group;
    *tiles = groups * TILE_ROWS;
    return b;
}

WORK int convolve_some(const Convolution *shared, int64_t *next)
{
    const Convolution kept = *shared, *c = &kept; /* which no store can change */
    int64_t threads = least(team(), c->threads), most;
    if (member() >= threads) return 0;
    Block b = block_in(c, c->memory + member() * c->floats, &most);
    if (most <= 0) return 1;
    int64_t tiles = padded(c->height, SIDE) / SIDE * (padded(c->width, SIDE) / SIDE);
    int64_t slices = padded(c->outputs, SLICE) / SLICE, blocks = (tiles + most - 1) / most, parts = 1;
    if (blocks < threads) parts = least(slices, (threads + blocks - 1) / blocks);
    blocks = least(tiles, padded(blocks * parts, threads) / parts); /* so that all threads have as many pieces */
    for (int64_t piece; (piece = take(next, blocks * parts)) < blocks * parts;) {
        int64_t block = piece / parts, part = piece % parts;
        int64_t first = tiles * block / blocks, end = tiles * (block + 1) / blocks;
        transform_inputs(c, &b, first, end - first);
        for (int64_t slice = slices * part / parts; slice < slices * (part + 1) / parts; slice++)
            convolve_slice(c, &b, first, end - first, slice * SLICE);
    }
    return 0;
}

int EXPORT(convolve)(const Convolution *c) PARALLEL(convolve_some, c)
