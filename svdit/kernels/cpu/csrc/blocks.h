/* Products by AMX: BLOCK_ROWS rows times one panel, two registers of rows times two of columns at a time. A register
   holds 16 rows of 64 bytes; those of a block of fewer rows are shorter. Columns behind the last 64, or ranks behind the
   last 32, are left to product_tile. Registers belong to a thread; Linux permits them on request (features.py). */

enum { BLOCK_ROWS = 32, HALF = 16, DOTS = 4 * HALF * HALF * HALF }; /* DOTS: of multiply_registers */

/* The operand of ldtilecfg. Registers 0 … 3 are sums, 4 and 5 both halves of the rows, 6 and 7 weights. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Registers;

/* Registers for blocks of `rows`; a second half that is not there has one row. */
FN void configure(int64_t rows)
{
    uint8_t first = (uint8_t)least(rows, HALF), second = rows > HALF ? (uint8_t)(rows - HALF) : 1;
    Registers shape = {.palette = 1, .rows = {first, first, second, second, first, second, HALF, HALF}};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* GCC's _tile_loadconfig names only a part of what it reads */
    _tile_loadconfig(&shape);
}

FN void begin(void) { configure(BLOCK_ROWS); }
FN void end(void) { _tile_release(); }

/* The sums += both halves of the rows times both of the columns. */
FN void multiply_registers(int halves)
{
    if (halves) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
}

/* to (rows, PANEL) = a b, for `chunks` of 64 bytes of each row of a, rows `stride` bytes apart: codes, or with `halves`
   bf16. b lies as `dot`, or multiply_add, reads it. */
FN void block_sums(void *to, const void *a, int64_t stride, const void *b, int64_t chunks, int64_t rows, int halves)
{
    enum { ROW = 4 * PANEL }; /* bytes of a row of b and of `to` */
    int64_t second = rows > HALF ? HALF * stride : 0;
    __asm__ volatile("" : : : "memory"); /* GCC's _tile_loadd names nothing of what it reads */
    for (int half = 0; half < 2; half++) {
        const char *left = a, *right = (const char *)b + half * ROW / 2;
        char *sums = (char *)to + half * ROW / 2;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < chunks; k++, left += 64, right += HALF * ROW) {
            _tile_loadd(4, left, stride);
            _tile_loadd(5, left + second, stride);
            _tile_loadd(6, right, ROW);
            _tile_loadd(7, right + 64, ROW);
            multiply_registers(halves);
        }
        _tile_stored(0, sums, ROW);
        _tile_stored(1, sums + 64, ROW);
        _tile_stored(2, sums + HALF * ROW, ROW);
        _tile_stored(3, sums + HALF * ROW + 64, ROW);
    }
}

/* Rows `first` … `last` of one panel. Sums of groups in fp32 are left to product_tile. */
FN void multiply_rows(const Product *p, Expanded b, int64_t panel, int64_t first, int64_t last)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), Rp = padded(p->rank, LOW_PANEL), pairs = (p->rank + 1) / 2;
    int64_t chunks = p->floats ? 0 : Kp / 64, low_chunks = pairs / 16;
    VI sums[BLOCK_ROWS][TILE_VECTORS] = {0}; /* also of rows that are not there */
    VF branch[BLOCK_ROWS][TILE_VECTORS] = {0};
    for (int64_t m = first, rows; m < last; m += rows) {
        rows = least(last - m, BLOCK_ROWS);
        if (rows < BLOCK_ROWS) configure(rows);
        if (chunks) block_sums(sums, (const uint8_t *)p->codes + m * Kp, Kp, b.codes, chunks, rows, 0);
        if (low_chunks)
            block_sums(branch, (const Low *)p->low + m * Rp, 2 * Rp, p->l1 + panel * pairs * PANEL * 2, low_chunks, rows, 1);
        if (rows < BLOCK_ROWS) configure(BLOCK_ROWS);
        for (int64_t i = 0; i < rows; i += TILE_ROWS)
            product_tile(p, b, panel, m + i, (Started){sums[i], branch[i], 16 * chunks, 16 * low_chunks});
    }
}
