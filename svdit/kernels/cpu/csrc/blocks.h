/* Sums of products by AMX: BLOCK_ROWS rows, two registers of rows times two of columns at a time. A register holds 16
   rows of 64 bytes; those of a block of fewer rows are shorter. What does not fill 64 bytes of a row is left to the
   caller. Registers belong to a thread; Linux permits them on request (features.py). */

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

/* to (rows, columns) = a b, for `chunks` of 64 bytes of each row of a, rows `stride` bytes apart: codes, or with
   `halves` bf16. b lies as `dot`, or multiply_add, reads it. */
FN void block_sums(void *to, const void *a, int64_t stride, const void *b, int64_t columns, int64_t chunks, int64_t rows,
                   int halves)
{
    const int64_t row = 4 * columns; /* bytes of b and of `to` */
    int64_t second = rows > HALF ? HALF * stride : 0;
    __asm__ volatile("" : : : "memory"); /* GCC's _tile_loadd names nothing of what it reads */
    for (int64_t at = 0; at < row; at += 128) {
        const char *left = a, *right = (const char *)b + at;
        char *sums = (char *)to + at;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < chunks; k++, left += 64, right += HALF * row) {
            _tile_loadd(4, left, stride);
            _tile_loadd(5, left + second, stride);
            _tile_loadd(6, right, row);
            _tile_loadd(7, right + 64, row);
            multiply_registers(halves);
        }
        _tile_stored(0, sums, row);
        _tile_stored(1, sums + 64, row);
        _tile_stored(2, sums + HALF * row, row);
        _tile_stored(3, sums + HALF * row + 64, row);
    }
}
