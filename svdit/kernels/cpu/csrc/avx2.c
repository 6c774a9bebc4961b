/* AVX2 and FMA. */
#ifdef __x86_64__
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define WIDE 1
#define PAIRS 0
#define WORDS 1
#include "lanes.h"
#include "norms.h"
#include "rows.h"
#include "panels.h"
#include "product.h"
#include "attention.h"
#include "winograd.h"
#include "pixels.h"
#include "weights.h"
#include "steps.h"
#include "packing.h"
#include "peak.h"
#endif
