/* Any processor; computes what avx512bf16 computes, with its shapes, in plain C. */
#define ISA portable
#define TARGET
#define LANES 16
#define TILE_ROWS 2
#define TILE_VECTORS 2
#define WIDE 0
#define PAIRS 1
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
