/* The product by AMX. A block of rows stays in the L1 cache while a group of panels, which stays in L2, meets it; outputs
   of a row lie together then. While registers multiply a block, vectors finish the one before it. */

enum { GROUP = 8, GROUP_BYTES = 320 << 10, BLOCK_BYTES = 40 << 10, PART_BYTES = 5 << 18 };

/* Sums of a block of rows and a panel, those of groups in fp32 of its first `scaled` rows, and how many are finished. */
typedef struct {
    VI sums[BLOCK_ROWS][TILE_VECTORS];
    VF groups[BLOCK_ROWS][TILE_VECTORS], branch[BLOCK_ROWS][TILE_VECTORS];
    Expanded b;
    int64_t panel, first, rows, lanes, scaled, finished;
} BlockSums;

/* The outputs of a block up to its row `rows`. */
WORK void finish_block(const Product *p, BlockSums *block, int64_t rows)
{
    for (int64_t i; (i = block->finished) < rows; block->finished += TILE_ROWS) {
        Started tile = {block->sums[i], i < block->scaled ? block->groups[i] : 0, block->branch[i], block->lanes};
        product_tile(p, block->b, block->panel, block->first + i, tile);
    }
}

/* Sums of groups of whole registers, times their steps: rows m … m + HALF − 1 and vector j of a panel. Tiles multiply a
   group while vectors add the one before it. */
WORK void multiply_groups(const Product *p, Expanded b, int64_t m, int j, VF (*to)[TILE_VECTORS])
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), groups = p->depth / p->group, stride = p->row_steps, share = groups / stride;
    const char *rows = (const char *)p->codes + m * Kp;
    const float *steps = p->steps + m * stride;
    const VI *columns = (const VI *)b.codes + j;
    VI sums[HALF];
    VF y[HALF] = {0};
    for (int64_t g = 0, left = share; g <= groups; g++) {
        _tile_zero(0);
        for (int64_t k = 0; k < p->group && g < groups; k += 64, rows += 64, columns += HALF * TILE_VECTORS) {
            _tile_loadd(4, rows, Kp);
            _tile_loadd(6, columns, sizeof *columns * TILE_VECTORS);
            _tile_dpbusd(0, 4, 6);
        }
        FENCE;
        if (g) {
            int64_t at = (g - 1) * TILE_VECTORS + j;
            VI start = b.starts[at];
            VF scale = b.scales[at];
            UNROLL for (int i = 0; i < HALF; i++) {
                float step = steps[i / 4 * 4 * stride + i % 4 * stride]; /* few pointers */
                y[i] += __builtin_convertvector(sums[i] + start, VF) * (scale * step);
            }
            if (!--left) left = share, steps++;
        }
        FENCE;
        _tile_stored(0, sums, sizeof *sums);
        FENCE;
    }
    UNROLL for (int i = 0; i < HALF; i++) to[i][j] = y[i];
}

/* Weights that are fetched meanwhile: `lines` for each 64 columns of a block. */
typedef struct {
    const char *next;
    int64_t lines;
} Ahead;

/* The sums of `rows` rows from m on and a panel b; `block` has those before. Groups in fp32 of other sizes, and of rows
   that fill no register, are left to product_tile. */
FN void multiply_panel(const Product *p, Expanded b, int64_t panel, int64_t m, int64_t rows, int keep, Ahead *ahead,
                       BlockSums *block)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), chunks = p->floats ? 0 : Kp / 64;
    int64_t low_row = PARTS * padded(p->rank, LANES) * (int64_t)sizeof(Branch);
    Left codes = left_of((const char *)p->codes + m * Kp, Kp, rows);
    Left low = left_of((const char *)p->low + m * low_row, low_row, rows);
    clear_block();
    for (int64_t k = 0; k < chunks; k++) {
        for (int64_t i = 0; i < ahead->lines; i++, ahead->next += 64) __builtin_prefetch(ahead->next, 0, 2);
        multiply_block(codes, 64 * k, b.codes, 0, 2, keep);
        int64_t due = block->rows * (k + 1) / chunks;
        if (block->finished < due) finish_block(p, block, due);
    }
    finish_block(p, block, block->rows);
    if (!p->floats) store_block((char *)block->sums, sizeof *block->sums, 2);
    block->scaled = p->floats && p->group % 64 == 0 ? rows / HALF * HALF : 0;
    for (int64_t i = 0; i < block->scaled; i += HALF)
        for (int j = 0; j < TILE_VECTORS; j++) multiply_groups(p, b, m + i, j, block->groups + i);
    if (low_row) {
        clear_block();
        for (int64_t at = 0; at < low_row; at += 64)
            multiply_block(low, at, (const char *)p->l1 + panel * PANEL * low_row, 1, 2, BOTH);
        store_block((char *)block->branch, sizeof *block->branch, 2);
    }
    block->b = b, block->panel = panel, block->lanes = 16 * chunks;
    block->first = m, block->rows = rows, block->finished = 0;
}

/* Rows `first` … `last` of `count` panels. */
FN void multiply_panels(const Product *p, const Expanded *b, int64_t panel, int64_t count, int64_t first, int64_t last)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP);
    int keep = BLOCK_ROWS * Kp > BLOCK_BYTES ? BOTH : count > 1 ? LEFT : RIGHT;
    Ahead ahead = {(const char *)p->weight + (panel + count) * PANEL * Kp, 0};
    BlockSums block = {0}; /* also rows that are not there */
    if (p->bits == 8 && last > first) ahead.lines = 32 * BLOCK_ROWS / (last - first) + 1;
    FENCE;
    for (int64_t m = first, rows; m < last; m += rows) {
        rows = least(last - m, BLOCK_ROWS);
        if (rows < BLOCK_ROWS) configure(rows);
        for (int64_t i = 0; i < count; i++) multiply_panel(p, b[i], panel + i, m, rows, keep, &ahead, &block);
        if (rows < BLOCK_ROWS) configure(BLOCK_ROWS);
    }
    finish_block(p, &block, block.rows);
}

WORK int multiply_some(const Product *shared, int64_t *next)
{
    const Product kept = *shared, *p = &kept; /* which no store can change */
    int64_t Kp = padded(p->depth, DEPTH_STEP), panels = padded(p->outputs, PANEL) / PANEL;
    int64_t size = p->group ? p->group : p->depth, units = padded(p->rows, BLOCK_ROWS) / BLOCK_ROWS;
    int64_t most = least(GROUP, GROUP_BYTES / (PANEL * Kp) + 1), groups = padded(padded(panels, most) / most, 2 * team());
    int64_t parts = padded(p->rows * Kp, PART_BYTES) / PART_BYTES, last = -1; /* of the rows, which stay in L2 too */
    groups = least(groups, panels);
    if (parts < padded(2 * team(), groups) / groups) parts = padded(2 * team(), groups) / groups;
    parts = least(parts, units);
    Expanded own = new_panels(most, PANEL * Kp * (p->bits == 4), p->depth / size), b[GROUP];
    if (!own.multiples) return 1;
    begin();
    for (int64_t piece; (piece = take(next, groups * parts)) < groups * parts;) {
        int64_t part = piece / groups, group = piece % groups;
        int64_t panel = panels * group / groups, count = panels * (group + 1) / groups - panel;
        int64_t first = units * part / parts * BLOCK_ROWS, behind = units * (part + 1) / parts * BLOCK_ROWS;
        for (int64_t i = 0; i < count && group != last; i++) b[i] = expand(p, panel + i, size, panel_of(own, i));
        multiply_panels(p, b, panel, count, first, least(behind, p->rows));
        last = group;
    }
    end();
    free(own.multiples); /* the start of the buffer */
    return 0;
}
