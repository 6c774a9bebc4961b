/* Sums of products by AMX: BLOCK_ROWS rows, two registers of rows times two of columns at a time. A register holds 16
   rows of 64 bytes; those of a block of fewer rows are shorter. What does not fill 64 bytes of a row is left to the
   caller. Registers belong to a thread; Linux permits them on request (features.py). */

enum { BLOCK_ROWS = 32, HALF = 16, DOTS = 4 * HALF * HALF * HALF }; /* DOTS: of both halves */

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

/* GCC's intrinsics name nothing of what they read and write. */
#define FENCE __asm__ volatile("" : : : "memory")

FN void begin(void) { configure(BLOCK_ROWS); }
FN void end(void) { _tile_release(); }

/* Sums 2 · half and the one behind it += half of the rows times the columns: 16 of them, or with two `vectors` 32. */
FN void multiply_half(int half, int halves, int vectors)
{
    if (half && halves) _tile_dpbf16ps(2, 5, 6);
    else if (half) _tile_dpbusd(2, 5, 6);
    else if (halves) _tile_dpbf16ps(0, 4, 6);
    else _tile_dpbusd(0, 4, 6);
    if (vectors < 2) return;
    if (half && halves) _tile_dpbf16ps(3, 5, 7);
    else if (half) _tile_dpbusd(3, 5, 7);
    else if (halves) _tile_dpbf16ps(1, 4, 7);
    else _tile_dpbusd(1, 4, 7);
}

FN void clear_block(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* The rows of a block, `stride` bytes apart, the second half of them `second` bytes behind the first, or none if 0. */
typedef struct {
    const char *start;
    int64_t stride, second;
} Left;

FN Left left_of(const void *start, int64_t stride, int64_t rows)
{
    return (Left){start, stride, rows > HALF ? HALF * stride : 0};
}

enum { BOTH, LEFT, RIGHT }; /* which operand stays in the L1 cache: the other one need not */

/* The sums += a b over bytes at … at + 63 of each row of a: codes, or with `halves` bf16. b lies as `dot`, or multiply_add,
   reads it, `vectors` a row. */
FN void multiply_block(Left a, int64_t at, const void *b, int halves, int vectors, int keep)
{
    const char *left = a.start + at, *right = (const char *)b + at * HALF * vectors;
    if (keep == RIGHT) _tile_stream_loadd(4, left, a.stride);
    else _tile_loadd(4, left, a.stride);
    if (keep == LEFT) _tile_stream_loadd(6, right, 64 * vectors);
    else _tile_loadd(6, right, 64 * vectors);
    if (vectors == 2 && keep == LEFT) _tile_stream_loadd(7, right + 64, 128);
    else if (vectors == 2) _tile_loadd(7, right + 64, 128);
    multiply_half(0, halves, vectors);
    if (!a.second) return;
    if (keep == RIGHT) _tile_stream_loadd(5, left + a.second, a.stride);
    else _tile_loadd(5, left + a.second, a.stride);
    multiply_half(1, halves, vectors);
}

/* The sums to rows of `row` bytes, those of the second half HALF rows behind the first. */
FN void store_block(char *to, int64_t row, int vectors)
{
    _tile_stored(0, to, row);
    _tile_stored(2, to + HALF * row, row);
    if (vectors == 2) {
        _tile_stored(1, to + 64, row);
        _tile_stored(3, to + HALF * row + 64, row);
    }
    FENCE;
}
