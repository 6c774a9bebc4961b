/* The integer product of Arm, of signed bytes. */

#ifdef USE_I8MM
/* Both rows' halves: {x₀, x₁, y₀, y₁} and {x₂, x₃, y₂, y₃}. */
FN VI first_halves(VI x, VI y) { return (VI)picked((VF)x, (VF)y, (VI){0, 1, 4, 5}); }
FN VI second_halves(VI x, VI y) { return (VI)picked((VF)x, (VF)y, (VI){2, 3, 6, 7}); }

/* acc[i][j] += Σ_k a[i][k] b[k][j] for the lanes of four columns from `first` to `last`. A sum is that of two rows and two
   outputs; b is (depth / 8, PANEL, 8). */
TIGHT void integer_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], const VI *b, int64_t first,
                        int64_t last)
{
    enum { BOTH = TILE_ROWS / 2, BLOCKS = 2 * TILE_VECTORS };
    VI sums[BOTH][BLOCKS] = {0};
    for (int64_t k = first; k < last; k += 2) {
        VI codes[BOTH];
        UNROLL for (int i = 0; i < BOTH; i++)
            codes[i] = (VI)vcombine_s32(vld1_s32(a[2 * i] + k), vld1_s32(a[2 * i + 1] + k));
        UNROLL for (int j = 0; j < BLOCKS; j++) {
            VI weights = load_int(b + k * TILE_VECTORS + j);
            UNROLL for (int i = 0; i < BOTH; i++) sums[i][j] = dot(sums[i][j], codes[i], weights);
        }
    }
    UNROLL for (int i = 0; i < BOTH; i++)
        UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
            acc[2 * i][j] += first_halves(sums[i][2 * j], sums[i][2 * j + 1]);
            acc[2 * i + 1][j] += second_halves(sums[i][2 * j], sums[i][2 * j + 1]);
        }
}
#else
/* acc + the dot products of b's four bytes with those of one lane of a */
FN VI dot_lane(VI acc, VI a, VI b, int lane)
{
#define SDOT(lane) __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(acc) : "w"(b), "w"(a))
    if (lane == 0) SDOT(0);
    else if (lane == 1) SDOT(1);
    else if (lane == 2) SDOT(2);
    else SDOT(3);
#undef SDOT
    return acc;
}

/* acc[i][j] += Σ_k a[i][k] b[k][j] for the lanes of `dot` from `first` to `last` */
TIGHT void integer_sums(VI acc[TILE_ROWS][TILE_VECTORS], const int32_t *const a[TILE_ROWS], const VI *b, int64_t first,
                        int64_t last)
{
    VI sums[TILE_ROWS][TILE_VECTORS];
    memcpy(sums, acc, sizeof sums);
    for (int64_t k = first; k < last; k += LANES) {
        VI codes[TILE_ROWS];
        UNROLL for (int i = 0; i < TILE_ROWS; i++) codes[i] = load_int(a[i] + k);
        UNROLL for (int lane = 0; lane < LANES; lane++)
            UNROLL for (int j = 0; j < TILE_VECTORS; j++) {
                VI weights = load_int(b + (k + lane) * TILE_VECTORS + j);
                UNROLL for (int i = 0; i < TILE_ROWS; i++) sums[i][j] = dot_lane(sums[i][j], codes[i], weights, lane);
            }
    }
    memcpy(acc, sums, sizeof sums);
}
#endif
