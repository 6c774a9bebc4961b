/* AVX-512 with VNNI and BF16 as in avx512bf16.c, and the products of layers and of attention by AMX. */
#if defined(__x86_64__) && __has_include(<amxint8intrin.h>) /* GCC 11 or newer */
#define ISA amx
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,amx-tile,amx-int8,amx-bf16")))
#define LANES 16
#define TILE_ROWS 8
#define TILE_VECTORS 2
#define WIDE 0
#define PAIRS 1
#define WORDS 0
#define USE_VNNI
#define USE_BF16
#define USE_AMX
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
