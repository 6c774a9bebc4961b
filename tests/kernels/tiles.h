/* AMX in plain C, for processors without it: included before csrc/amx.c, in place of the compiler's intrinsics. After
   the pseudocode in Intel's manual (volume 2, "TDPBUSD" and the like), which faults where this aborts: registers that
   are not configured, whose shapes do not fit, or that are the same. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t bytes[16][64];
} Contents;

static __thread struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;
static __thread Contents registers[8];
__attribute__((weak, visibility("default"))) int configured_threads;

/* Bytes that nothing may be loaded from, and how often something was. */
__attribute__((weak, visibility("default"))) struct {
    const char *first, *last;
    int64_t loads;
} forbidden;

static inline void fault(const char *what)
{
    fprintf(stderr, "AMX: %s\n", what);
    abort();
}

static inline void need(int correct, const char *what)
{
    if (!correct) fault(what);
}

static inline void emulated_release(void)
{
    if (shapes.palette) __atomic_fetch_sub(&configured_threads, 1, __ATOMIC_RELAXED);
    memset(&shapes, 0, sizeof shapes);
    memset(registers, 0, sizeof registers);
}

static inline void emulated_configure(const void *from)
{
    emulated_release();
    memcpy(&shapes, from, sizeof shapes);
    need(shapes.palette == 1 && !shapes.start, "no such palette");
    for (int i = 0; i < 16; i++) {
        need(shapes.rows[i] <= 16 && shapes.bytes[i] <= 64, "a register is too large");
        need(!shapes.rows[i] == !shapes.bytes[i] && !(i > 7 && shapes.rows[i]), "a register is empty, or is none");
    }
    __atomic_fetch_add(&configured_threads, 1, __ATOMIC_RELAXED);
}

static inline Contents *get(int i)
{
    need(shapes.palette && shapes.rows[i], "this thread has not configured its registers");
    return &registers[i];
}

static inline void emulated_zero(int i) { memset(get(i), 0, sizeof(Contents)); }

static inline void emulated_load(int i, const void *from, int64_t stride)
{
    emulated_zero(i);
    for (int row = 0; row < shapes.rows[i]; row++) {
        const char *bytes = (const char *)from + row * stride;
        forbidden.loads += bytes < forbidden.last && bytes + shapes.bytes[i] > forbidden.first;
        memcpy(registers[i].bytes[row], bytes, shapes.bytes[i]);
    }
}

static inline void emulated_store(int i, void *to, int64_t stride)
{
    for (int row = 0; row < shapes.rows[i]; row++)
        memcpy((char *)to + row * stride, get(i)->bytes[row], shapes.bytes[i]);
}

static inline void check_shapes(int c, int a, int b)
{
    get(a), get(b), get(c);
    need(a != b && b != c && a != c, "operands are the same register");
    need(shapes.rows[c] == shapes.rows[a] && shapes.bytes[a] == 4 * shapes.rows[b] && shapes.bytes[b] == shapes.bytes[c],
         "shapes of operands do not fit");
}

static inline void emulated_bytes(int c, int a, int b)
{
    check_shapes(c, a, b);
    for (int m = 0; m < shapes.rows[c]; m++)
        for (int k = 0; k < shapes.bytes[a]; k++)
            for (int n = 0; n < shapes.bytes[c] / 4; n++) {
                uint32_t sum, product = (uint32_t)(registers[a].bytes[m][k] * (int8_t)registers[b].bytes[k / 4][4 * n + k % 4]);
                memcpy(&sum, registers[c].bytes[m] + 4 * n, 4);
                sum += product;
                memcpy(registers[c].bytes[m] + 4 * n, &sum, 4);
            }
}

/* A bf16 number; subnormal ones are zero. */
static inline float half(const Contents *x, int row, int place)
{
    uint16_t bits;
    memcpy(&bits, x->bytes[row] + 2 * place, 2);
    uint32_t wide = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &wide, 4);
    return bits & 0x7f80 ? number : copysignf(0, number);
}

static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static inline void emulated_halves(int c, int a, int b)
{
    check_shapes(c, a, b);
    for (int m = 0; m < shapes.rows[c]; m++)
        for (int n = 0; n < shapes.bytes[c] / 4; n++) {
            float sum, parts[2] = {0}; /* of even and odd columns */
            for (int k = 0; k < shapes.bytes[a] / 2; k++) {
                float x = half(&registers[a], m, k), y = half(&registers[b], k / 2, 2 * n + k % 2);
                parts[k % 2] = flushed(fmaf(x, y, parts[k % 2]));
            }
            memcpy(&sum, registers[c].bytes[m] + 4 * n, 4);
            sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
            memcpy(registers[c].bytes[m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_configure
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stream_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbusd emulated_bytes
#define _tile_dpbf16ps emulated_halves
