/* AVX-512 with VNNI and BF16. */
#ifdef __x86_64__
#define ISA avx512bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")))
#define LANES 16
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define WIDE 0
#define PAIRS 1
#define WORDS 1
#define USE_VNNI
#define USE_BF16
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
