/* A vector of LANES floats or 32-bit integers, and the few operations that differ between instruction sets.
   Everything else is written with GCC's vector extensions, which compile for any processor. An instruction set is
   a file that defines ISA, TARGET, LANES, TILE_ROWS, TILE_VECTORS, WIDE, PAIRS, WORDS and includes this one.
   Activation codes are bytes, unsigned by an offset of 128. WIDE, for want of a dot product of such bytes: beside 8-bit
   weights they are signed and of 16 bits, beside 4-bit weights bytes are summed in 16 bits. PAIRS: bf16 dot products.
   WORDS: the low-rank branch is computed on integers of 16 bits. USE_NEON: bytes are signed. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#include "kernels.h"

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(name, ISA)
#define FN TARGET static inline __attribute__((always_inline))
#define WORK TARGET static __attribute__((noinline))
#if WIDE
#define TIGHT WORK /* 16 registers hold the sums of a loop only if nothing surrounds it */
#else
#define TIGHT FN
#endif
#define UNROLL _Pragma("GCC unroll 32")
#if defined(USE_VNNI) && LANES == 8
#define VEX "%{vex%} "
#else
#define VEX
#endif

typedef float VF __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef int16_t VS __attribute__((vector_size(4 * LANES)));
typedef uint8_t VB __attribute__((vector_size(LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));
#if PAIRS
typedef uint16_t Low;
#else
typedef float Low;
#endif
/* x̂ and x̂ L2ᵀ in the low-rank branch: words, or floats; for AMX two bf16 a number, all high parts of a row first. */
#if WORDS
typedef int16_t Branch;
#elif defined(USE_AMX)
typedef uint16_t Branch;
#else
typedef float Branch;
#endif

/* Words of activations are at most WORD; times those of a factor, RUN pairs of them sum to less than 2³¹ (packing.py). */
enum { WORD = 16383, RUN = 32 };
enum { STAGES = LANES == 16 ? 4 : LANES == 8 ? 3 : 2 }; /* LANES = 2^STAGES */
/* CODES: in a lane of `dot`. W: numbers in a lane of `multiply_add`. ADJACENT: columns of one output that are adjacent. */
enum { PANEL = LANES * TILE_VECTORS, LOW_PANEL = LANES * 2, CODES = WIDE ? 2 : 4, W = PAIRS ? 2 : 1 };
#ifdef USE_AMX
enum { PARTS = 2 };
#else
enum { PARTS = 1 };
#endif
#ifdef USE_NEON
enum { SIGNED = 1 };
#else
enum { SIGNED = 0 };
#endif
#ifdef USE_I8MM
enum { ADJACENT = 8 };
#else
enum { ADJACENT = 4 };
#endif

FN VF load(const float *p) { VF v; memcpy(&v, p, sizeof v); return v; }
FN VI load_int(const void *p) { VI v; memcpy(&v, p, sizeof v); return v; }
FN void store(float *p, VF v) { memcpy(p, &v, sizeof v); }
FN VF splat(float x) { return x - (VF){0}; }
FN VI splat_int(int32_t x) { return x - (VI){0}; }
FN VI broadcast(const void *p) { int32_t x; memcpy(&x, p, 4); return splat_int(x); }
#if defined(USE_VNNI) && LANES == 16
FN VF load_some(const float *p, int64_t n) { return (VF)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p); }
FN void store_some(float *p, VF v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)v); }
#else
FN VF load_some(const float *p, int64_t n) { VF v = {0}; memcpy(&v, p, 4 * (size_t)n); return v; }
FN void store_some(float *p, VF v, int64_t n) { memcpy(p, &v, 4 * (size_t)n); }
#endif
FN VF load_upto(const float *p, int64_t n) { return n >= LANES ? load(p) : n > 0 ? load_some(p, n) : (VF){0}; }
FN void store_upto(float *p, VF v, int64_t n) { if (n >= LANES) store(p, v); else if (n > 0) store_some(p, v, n); }
/* at_least and at_most let an x that is no number through, as the processor's own do when the limit comes first. */
#if defined(__x86_64__) && LANES == 8
FN VF at_least(VF x, VF limit) { return (VF)_mm256_max_ps((__m256)limit, (__m256)x); }
FN VI larger(VI a, VI b) { return (VI)_mm256_max_epi32((__m256i)a, (__m256i)b); }
FN VF at_most(VF x, VF limit) { return (VF)_mm256_min_ps((__m256)limit, (__m256)x); }
#elif defined(USE_VNNI)
FN VF at_least(VF x, VF limit) { return (VF)_mm512_max_ps((__m512)limit, (__m512)x); }
FN VI larger(VI a, VI b) { return (VI)_mm512_max_epi32((__m512i)a, (__m512i)b); }
FN VF at_most(VF x, VF limit) { return (VF)_mm512_min_ps((__m512)limit, (__m512)x); }
#elif defined(USE_NEON)
FN VF at_least(VF x, VF limit) { return (VF)vmaxq_f32((float32x4_t)limit, (float32x4_t)x); }
FN VI larger(VI a, VI b) { return (VI)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
FN VF at_most(VF x, VF limit) { return (VF)vminq_f32((float32x4_t)limit, (float32x4_t)x); }
#else
FN VF choose(VI mask, VF yes, VF no) { return (VF)((mask & (VI)yes) | (~mask & (VI)no)); }
FN VF at_least(VF x, VF limit) { return choose(limit > x, limit, x); }
FN VI larger(VI a, VI b) { return (VI)choose(a > b, (VF)a, (VF)b); }
FN VF at_most(VF x, VF limit) { return choose(limit < x, limit, x); }
#endif
FN VF magnitude(VF a) { return (VF)((VI)a & 0x7fffffff); }
#if LANES == 16
#define NUMBERS ((VI){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#elif LANES == 8
#define NUMBERS ((VI){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define NUMBERS ((VI){0, 1, 2, 3})
#endif
/* The numbers of the lanes i ^ h; lanes in such an order, by instructions without an index where it is a constant. */
FN VI across(int h) { return NUMBERS ^ h; }
FN VF ordered(VF x, VI order)
{
#ifdef __clang__
    VF y;
    for (int i = 0; i < LANES; i++) y[i] = x[order[i]];
    return y;
#else
    return __builtin_shuffle(x, order);
#endif
}
/* Those of a and b, whose numbers follow a's. */
FN VF picked(VF a, VF b, VI order)
{
#ifdef __clang__
    VF y;
    for (int i = 0; i < LANES; i++) y[i] = order[i] < LANES ? a[order[i]] : b[order[i] - LANES];
    return y;
#else
    return __builtin_shuffle(a, b, order);
#endif
}
FN float sum(VF v) { UNROLL for (int s = 0; s < STAGES; s++) v += ordered(v, across(1 << s)); return v[0]; }
/* Sums of neighbors, in every four lanes two of a and two of b. */
FN VF neighbor_sums(VF a, VF b)
{
    const VI even = (NUMBERS & ~3) + ((NUMBERS & 1) << 1) + (NUMBERS >> 1 & 1) * LANES;
    return picked(a, b, even) + picked(a, b, even + 1);
}
/* What `sum` returns for each of four vectors. */
FN void four_sums(float to[4], VF a, VF b, VF c, VF d)
{
    VF v = neighbor_sums(neighbor_sums(a, b), neighbor_sums(c, d));
    UNROLL for (int s = 2; s < STAGES; s++) v += ordered(v, across(1 << s));
    memcpy(to, &v, 4 * sizeof *to);
}
FN float largest(VF v)
{
    UNROLL for (int s = 0; s < STAGES; s++) v = at_least(v, ordered(v, across(1 << s)));
    return v[0];
}
FN int32_t largest_of(VI v)
{
    UNROLL for (int s = 0; s < STAGES; s++) v = larger(v, (VI)ordered((VF)v, across(1 << s)));
    return v[0];
}
FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FN int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* The low byte of each lane. */
FN void store_bytes(uint8_t *to, VI v)
{
#if LANES == 8
    __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    int32_t halves[2] = {_mm256_extract_epi32(low, 0), _mm256_extract_epi32(low, 4)};
    memcpy(to, halves, sizeof halves);
#elif defined(USE_NEON)
    int16x4_t shorts = vmovn_s32((int32x4_t)v);
    int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(shorts, shorts))), 0);
    memcpy(to, &bytes, sizeof bytes);
#elif defined(USE_VNNI)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
    VB bytes = __builtin_convertvector(v, VB);
    memcpy(to, &bytes, sizeof bytes);
#endif
}

/* Signed bytes to lanes. */
FN VI load_bytes(const uint8_t *p)
{
#if LANES == 8
    return (VI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#elif defined(USE_VNNI)
    return (VI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(USE_NEON)
    uint32_t bytes;
    memcpy(&bytes, p, 4);
    return (VI)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)))));
#else
    VI v;
    for (int i = 0; i < LANES; i++) v[i] = (int8_t)p[i];
    return v;
#endif
}

/* The low 16 bits of each lane. */
FN void store_shorts(int16_t *to, VI v)
{
    VH shorts = __builtin_convertvector(v, VH);
    memcpy(to, &shorts, sizeof shorts);
}

/* Half to even, for |x| < 2^22: adding 1.5 · 2^23 leaves the integer in the low bits. */
#define ROUND 12582912.f
FN VI nearest(VF x) { return (VI)((VU)(x + ROUND) - 0x4b400000); }

FN float from_bits(int32_t u) { float x; memcpy(&x, &u, 4); return x; }
FN float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float x; memcpy(&x, &u, 4); return x; }
FN VF from_halves(VH x)
{
#if defined(USE_VNNI) && LANES == 16
    return (VF)((VU)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (VF)(__builtin_convertvector(x, VU) << 16);
#endif
}

FN VF load_halves(const uint16_t *p, int64_t n)
{
    VH x = {0};
    if (n >= LANES) memcpy(&x, p, sizeof x);
#if defined(USE_VNNI) && LANES == 16
    else if (n > 0) x = (VH)_mm256_maskz_loadu_epi16((__mmask16)((1 << n) - 1), p);
#else
    else if (n > 0) memcpy(&x, p, 2 * (size_t)n);
#endif
    return from_halves(x);
}

/* To bf16, half to even; the low bits of a NaN must not carry into its exponent. */
FN VH to_bf16(VF x)
{
    VU u = (VU)x, nan = (VU)(x != x);
    return __builtin_convertvector((((u + 0x7fff + (u >> 16 & 1)) & ~nan) | ((u | 0x400000) & nan)) >> 16, VH);
}

/* The same, but subnormal numbers may become zero. */
FN VH to_bf16_quickly(VF x)
{
#if defined(USE_BF16)
    return (VH)_mm512_cvtneps_pbh((__m512)x);
#elif defined(USE_BFDOT)
    VH h;
    __asm__("bfcvtn %0.4h, %1.4s" : "=w"(h) : "w"(x));
    return h;
#else
    return to_bf16(x);
#endif
}

FN void store_halves(uint16_t *p, VF x, int64_t n)
{
    VH h = to_bf16_quickly(x);
    if (n >= LANES) memcpy(p, &h, sizeof h);
    else if (n > 0) memcpy(p, &h, 2 * (size_t)n);
}

/* For 2ᵗ: t where it must not leave −126 … 128, the integer n nearest to t, and p · 2ⁿ. */
#if defined(USE_VNNI) && LANES == 16
FN VF limited(VF t) { return t; }
FN VF rounded(VF t) { return (VF)_mm512_roundscale_ps((__m512)t, _MM_FROUND_NO_EXC); }
FN VF scaled(VF p, VF n) { return (VF)_mm512_scalef_ps((__m512)p, (__m512)n); }
#else
FN VF limited(VF t) { return at_least(at_most(t, splat(128.f)), splat(-126.f)); }
FN VF rounded(VF t) { return t + ROUND - ROUND; }
FN VF scaled(VF p, VF n) { return p * (VF)((VU)(n + (ROUND + 127.f)) << 23); }
#endif

/* 2ᵗ: t = n + r, a polynomial of degree 5 in r of least relative error on ±1/2 (7.5e-8). */
FN VF power_of_two(VF t)
{
    t = limited(t);
    VF n = rounded(t), r = t - n;
    VF p = r * 1.3276472455e-3f + 9.6755409613e-3f;
    p = p * r + 5.5507130921e-2f;
    p = p * r + 2.4022120237e-1f;
    p = p * r + 6.9314694405e-1f;
    p = p * r + 1.0000001192f;
    return scaled(p, n);
}

/* x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) = x / (1 + e^−2…), the exponent times log₂ e */
FN VF gelu(VF x) { return x / (power_of_two((x * x * -0.102943240f - 2.30220820f) * x) + 1.f); }

/* x / (1 + e^−x) */
FN VF silu(VF x) { return x / (power_of_two(x * -1.44269504f) + 1.f); }

/* acc + the dot product of each lane's codes in a and b: four bytes, a's unsigned except for USE_NEON, or two of 16 bits
   where WIDE. USE_I8MM: a product of two rows of eight bytes and two of b. */
FN VI dot(VI acc, VI a, VI b)
{
#if defined(USE_VNNI)
    __asm__(VEX "vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#elif defined(USE_I8MM)
    __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
#elif defined(USE_NEON)
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
#elif WIDE
    return acc + (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int shift = 24; shift >= 0; shift -= 8) acc += (VI)((VU)a << shift >> 24) * (b << shift >> 24);
    return acc;
#endif
}

/* acc + a b, for two bf16 of each lane or for one float */
FN VF multiply_add(VF acc, VI a, VI b)
{
#if !PAIRS
    return acc + (VF)a * (VF)b;
#elif defined(USE_BF16)
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#elif defined(USE_BFDOT)
    __asm__("bfdot %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
#else
    VI high = splat_int((int32_t)0xffff0000);
    return acc + (VF)(a << 16) * (VF)(b << 16) + (VF)(a & high) * (VF)(b & high);
#endif
}

/* acc + a b, for two numbers of the low-rank branch in each lane */
#if WORDS
typedef VI Sum;
FN Sum multiply_pairs(Sum acc, VI a, VI b)
{
#if defined(USE_VNNI)
    __asm__(VEX "vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#elif LANES == 8
    return acc + (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
#elif defined(USE_AMX)
typedef VF Sum;
FN Sum multiply_pairs(Sum acc, VI a, VI b) { return multiply_add(acc, a, b); }
#endif

#ifdef USE_AMX
#include "blocks.h"
#else
enum { BLOCK_ROWS = TILE_ROWS * TILE_VECTORS / 2, DOTS = 0 };
FN void begin(void) {}
FN void end(void) {}
#endif
#ifdef USE_NEON
#include "neon.h"
#endif

/* The body of an exported function: run work(arguments, next) on torch's OpenMP threads, return 0, or 1 where a thread
   could not allocate its buffers. Pieces are claimed from the counter `next`, because cores differ in speed (SMT
   siblings, E-cores). */
#ifdef _OPENMP
#define PARALLEL(work, arguments) \
    { \
        int64_t next = 0; \
        int failed = 0; \
        _Pragma("omp parallel reduction(|:failed)") failed |= work(arguments, &next); \
        return failed; \
    }
FN int64_t team(void) { return omp_get_num_threads(); }
FN int64_t member(void) { return omp_get_thread_num(); }
#else
#define PARALLEL(work, arguments) { int64_t next = 0; return work(arguments, &next); }
FN int64_t team(void) { return 1; }
FN int64_t member(void) { return 0; }
#endif

/* The next of `pieces` pieces; returns `pieces` when none is left. Threads start far apart: adjacent pieces would cause
   false sharing through the prefetcher. */
FN int64_t take(int64_t *next, int64_t pieces)
{
    int64_t threads = team(), stretch = padded(pieces, threads) / threads, turn, piece;
    do {
        turn = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        piece = turn % threads * stretch + turn / threads;
    } while (turn < stretch * threads && piece >= pieces);
    return turn < stretch * threads ? piece : pieces;
}
