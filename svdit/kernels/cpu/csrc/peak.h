/* The most this processor can do out of registers, for benchmarks: TILE_ROWS · TILE_VECTORS sums side by side, or by
   AMX those of a block. */

typedef struct {
    int64_t repeats, kind; /* of PEAKS */
} Peak;

enum PEAKS { FP32, INT8, LOW, INT16 }; /* a multiply-add; `dot`; `multiply_add`, of bf16 where PAIRS; `multiply_pairs` */

#if defined(USE_VNNI) || WIDE
#define KEEP(x) __asm__ volatile("" : "+v"(x))
#elif defined(USE_NEON)
#define KEEP(x) __asm__ volatile("" : "+w"(x))
#else
#define KEEP(x) __asm__ volatile("" : : "m"(x) : "memory")
#endif

WORK int peak_some(const Peak *p, int64_t *next)
{
    VI sums[TILE_ROWS * TILE_VECTORS] = {0}, a = splat_int((int32_t)take(next, team()) + 0x01020304), b[TILE_VECTORS];
    VF totals[TILE_ROWS * TILE_VECTORS] = {0}, x = splat(1e-3f), y = splat(1e-3f);
    VI low = splat_int(0x3a833a83); /* two bf16 of about 1e-3, or one float */
    for (int j = 0; j < TILE_VECTORS; j++) b[j] = splat_int(j + 1);
#ifdef USE_AMX
    begin();
    for (int64_t r = 0; p->kind == INT8 && r < p->repeats; r++) multiply_half(0, 0, 2), multiply_half(1, 0, 2);
    for (int64_t r = 0; p->kind == LOW && r < p->repeats; r++) multiply_half(0, 1, 2), multiply_half(1, 1, 2);
    end();
#endif
    for (int64_t r = 0; p->kind == INT8 && !DOTS && r < p->repeats; r++)
        UNROLL for (int i = 0; i < TILE_ROWS * TILE_VECTORS; i++) {
            if (i % TILE_VECTORS == 0) KEEP(a);
            sums[i] = dot(sums[i], a, b[i % TILE_VECTORS]);
        }
#if WORDS
    for (int64_t r = 0; p->kind == INT16 && r < p->repeats; r++)
        UNROLL for (int i = 0; i < TILE_ROWS * TILE_VECTORS; i++) {
            if (i % TILE_VECTORS == 0) KEEP(a);
            sums[i] = multiply_pairs(sums[i], a, b[i % TILE_VECTORS]);
        }
#endif
    for (int64_t r = 0; p->kind == FP32 && r < p->repeats; r++)
        UNROLL for (int i = 0; i < TILE_ROWS * TILE_VECTORS; i++) {
            KEEP(x); /* or one product would do for all */
            totals[i] += x * y;
        }
    for (int64_t r = 0; p->kind == LOW && !DOTS && r < p->repeats; r++)
        UNROLL for (int i = 0; i < TILE_ROWS * TILE_VECTORS; i++) {
            KEEP(low);
            totals[i] = multiply_add(totals[i], low, low);
        }
    UNROLL for (int i = 0; i < TILE_ROWS * TILE_VECTORS; i++) { KEEP(sums[i]); KEEP(totals[i]); }
    return 0;
}

/* The results of `dot`, or of a multiply-add, in every repeat are returned in `lanes`. */
int EXPORT(peak)(const Peak *p, int64_t *lanes)
{
    *lanes = TILE_ROWS * TILE_VECTORS * LANES;
    if (p->kind == LOW && DOTS) *lanes = DOTS;
    if (p->kind == INT8) *lanes = DOTS ? DOTS : *lanes * ADJACENT / 4; /* smmla is eight products a lane */
    PARALLEL(peak_some, p)
}
