/* A vector of LANES floats or 32-bit integers, and the few operations that differ between instruction sets.
   Everything else is written with GCC's vector extensions, which compile for any processor. An instruction set is
   a file that defines ISA, TARGET, LANES, TILE_ROWS, TILE_VECTORS, WIDE, PAIRS and includes this one.
   Activation codes are bytes, unsigned by an offset of 128. WIDE, for want of a dot product of such bytes: beside 8-bit
   weights they are signed and of 16 bits, beside 4-bit weights bytes are summed in 16 bits. PAIRS: bf16 dot products. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
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
#define UNROLL _Pragma("GCC unroll 16")

typedef float VF __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef int16_t VS __attribute__((vector_size(4 * LANES)));
typedef uint8_t VB __attribute__((vector_size(LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));

enum { PANEL = LANES * TILE_VECTORS, LOW_PANEL = LANES * 2, CODES = WIDE ? 2 : 4 }; /* CODES: in a lane of `dot` */

FN VF load(const float *p) { VF v; memcpy(&v, p, sizeof v); return v; }
FN VI load_int(const void *p) { VI v; memcpy(&v, p, sizeof v); return v; }
FN void store(float *p, VF v) { memcpy(p, &v, sizeof v); }
FN VF splat(float x) { return x - (VF){0}; }
FN VI splat_int(int32_t x) { return x - (VI){0}; }
FN VI broadcast(const void *p) { int32_t x; memcpy(&x, p, 4); return splat_int(x); }
FN VF load_some(const float *p, int64_t n) { VF v = {0}; memcpy(&v, p, 4 * (size_t)n); return v; }
FN void store_some(float *p, VF v, int64_t n) { memcpy(p, &v, 4 * (size_t)n); }
FN VF load_upto(const float *p, int64_t n) { return n >= LANES ? load(p) : load_some(p, n); }
FN void store_upto(float *p, VF v, int64_t n) { if (n >= LANES) store(p, v); else store_some(p, v, n); }
/* These two let an x that is no number through, as the processor's own do when the limit comes first. */
#if defined(__x86_64__) && LANES == 8
FN VF at_least(VF x, VF limit) { return (VF)_mm256_max_ps((__m256)limit, (__m256)x); }
FN VF at_most(VF x, VF limit) { return (VF)_mm256_min_ps((__m256)limit, (__m256)x); }
#elif defined(USE_VNNI)
FN VF at_least(VF x, VF limit) { return (VF)_mm512_max_ps((__m512)limit, (__m512)x); }
FN VF at_most(VF x, VF limit) { return (VF)_mm512_min_ps((__m512)limit, (__m512)x); }
#else
FN VF choose(VI mask, VF yes, VF no) { return (VF)((mask & (VI)yes) | (~mask & (VI)no)); }
FN VF at_least(VF x, VF limit) { return choose(limit > x, limit, x); }
FN VF at_most(VF x, VF limit) { return choose(limit < x, limit, x); }
#endif
FN VF magnitude(VF a) { return (VF)((VI)a & 0x7fffffff); }
FN float sum(VF v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }
FN float largest(VF v) { float m = v[0]; for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m; return m; }
FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FN int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

FN int any(VI mask) { int32_t bits = 0; for (int i = 0; i < LANES; i++) bits |= mask[i]; return bits != 0; }

/* The low byte of each lane. */
FN void store_bytes(uint8_t *to, VI v)
{
#if LANES == 8
    __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    int32_t halves[2] = {_mm256_extract_epi32(low, 0), _mm256_extract_epi32(low, 4)};
    memcpy(to, halves, sizeof halves);
#else
    VB bytes = __builtin_convertvector(v, VB);
    memcpy(to, &bytes, sizeof bytes);
#endif
}

/* The low 16 bits of each lane. */
FN void store_shorts(int16_t *to, VI v)
{
    VH shorts = __builtin_convertvector(v, VH);
    memcpy(to, &shorts, sizeof shorts);
}

/* Half to even, for |x| < 2^22: adding 1.5 · 2^23 leaves the integer in the low bits. */
FN VI nearest(VF x) { return (VI)((VU)(x + 12582912.f) - 0x4b400000); }

FN float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float x; memcpy(&x, &u, 4); return x; }
FN VU bf16_bits(VF x) { VU u = (VU)x; return (u + 0x7fff + (u >> 16 & 1)) >> 16; }

/* eˣ, within 2 ulp, x clamped to ±87: x = n ln 2 + r, degree-6 polynomial in r (Cephes). */
FN VF exponential(VF x)
{
    x = at_least(at_most(x, splat(87.f)), splat(-87.f));
    VI n = nearest(x * 1.44269504f);
    VF whole = __builtin_convertvector(n, VF), r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    VF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.f;
    return p * (VF)((VU)(n + 127) << 23);
}

/* x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) = x / (1 + e^−2…) */
FN VF gelu(VF x) { return x / (exponential((x * x * -0.0713548163f - 1.59576912f) * x) + 1.f); }

/* acc + the dot product of each lane's codes in a and b: four bytes, a's unsigned, or two of 16 bits where WIDE */
FN VI dot(VI acc, VI a, VI b)
{
#if defined(USE_VNNI)
    __asm__(USE_VNNI " %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#elif WIDE
    return acc + (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int shift = 24; shift >= 0; shift -= 8) acc += (VI)((VU)a << shift >> 24) * (b << shift >> 24);
    return acc;
#endif
}

/* acc + a₀ b₀ + a₁ b₁ for the two bf16 of each lane */
FN VF dot2(VF acc, VI a, VI b)
{
#if defined(USE_BF16)
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#else
    VI high = splat_int((int32_t)0xffff0000);
    return acc + (VF)(a << 16) * (VF)(b << 16) + (VF)(a & high) * (VF)(b & high);
#endif
}

/* Run work(arguments, next) on torch's OpenMP threads. Pieces are taken from the counter `next` until none is left, for
   cores are not equally fast: some are shared with others, some are small ones. */
#ifdef _OPENMP
#define PARALLEL(work, arguments) int64_t next = 0; _Pragma("omp parallel") work(arguments, &next)
FN int64_t team(void) { return omp_get_num_threads(); }
#else
#define PARALLEL(work, arguments) int64_t next = 0; work(arguments, &next)
FN int64_t team(void) { return 1; }
#endif

FN int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
