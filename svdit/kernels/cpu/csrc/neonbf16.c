/* Arm with products of matrices of bytes, and bf16 dot products beside them. */
#if defined(__aarch64__) && (__clang_major__ >= 16 || (!defined(__clang__) && __GNUC__ >= 10))
#define ISA neonbf16
#define TARGET __attribute__((target("arch=armv8.2-a+i8mm+bf16")))
#define LANES 4
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define WIDE 0
#define PAIRS 1
#define WORDS 0
#define USE_NEON
#define USE_I8MM
#define USE_BFDOT
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
