/* AVX-512 with VNNI. */
#ifdef __x86_64__
#define ISA avx512vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define LANES 16
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define WIDE 0
#define PAIRS 0
#define WORDS 1
#define USE_VNNI
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
