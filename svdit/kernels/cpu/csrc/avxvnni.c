/* AVX-VNNI: the dot product of bytes on 256 bits. */
#ifdef __x86_64__
#define ISA avxvnni
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define LANES 8
#define TILE_ROWS 6
#define TILE_VECTORS 2
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
