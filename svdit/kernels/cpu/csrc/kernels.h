/* What Python hands over, once for each call. Pointers come from torch tensors that ffi.py has checked:
   contiguous, of the type named here, and of the shape in the comment. Sizes are counts of elements.
   `depth` K is padded with zeros to a multiple of 16 in codes, weights and the vectors of an input's transform. */
/* Key to the layouts. K: depth, padded with zeros to a multiple of 16; R: rank.

   panel    PANEL = LANES · TILE_VECTORS outputs that are computed together. Outputs are padded to whole panels.
   tile     TILE_ROWS rows of activations times one panel: as many sums as the vector registers hold.
   8 bits   (panels, K / 4, PANEL, 4) bytes: four columns of one output are adjacent, because one lane of `dot`
            (vpdpbusd) multiplies and adds four bytes. With USE_I8MM (panels, K / 8, PANEL, 8): smmla takes eight.
   4 bits   (panels, K / 8, PANEL, 4) bytes: of eight columns, byte t holds code t in its low half and code t + 4 in
            its high half, each + 8. One `and` and one shift give the four bytes of columns 0 … 3 and of 4 … 7.
   factors  L1 (panels, R / 2, PANEL, 2), L2 (…, K / 2, LOW_PANEL, 2), of its last panel perhaps half: two columns are
            adjacent, because one lane of vpdpwssd or vdpbf16ps multiplies and adds two numbers. For AMX L1, its R padded
            to 16, lies there twice, once for each part of x̂ L2ᵀ.
   words    16-bit integers with one step a row of x̂, x̂ L2ᵀ, L1 and L2: a low-rank branch at twice the rate of fp32, off
            by 2⁻¹² where one of bf16 is by 2⁻⁹. Sums of RUN pairs are int32, then fp32.
   offset   `dot` takes unsigned activations: 128 is added to 8-bit codes, −lo to codes of lo … hi. It adds offset ·
            (sum of a weight row) to each output, which `offsets` subtracts. 0 where WIDE, signed 16-bit activations, and SIGNED, signed bytes.
   sums     int32 over the whole row where weights are integers with one step per row (two-level multiples are
            multiplied out to 8 bits first); with `floats` int32 within a group, then fp32. */
#ifndef SVDIT_KERNELS_H
#define SVDIT_KERNELS_H
#include <stdint.h>

enum { DEPTH_STEP = 16 };

/* x to codes and steps, x̂ = ((x − in_shift) / in_scale) H; with `glu` first silu(a) · b of the halves a and b of a row,
   with `shift` LayerNorm, or with `rms` RMSNorm, and modulation.
   Codes have 8 bits and a step a row; with a `group` of columns they are lo … hi with a bf16 step a group: lo is 0 for
   what is never negative, −hi, or the code of the element of largest magnitude. */
typedef struct {
    int64_t rows, depth, tokens, stride, hadamard, rank, group, lo, hi, offset, wide; /* stride: of shift and scale */
    int64_t bf16, rms, glu;                              /* bf16: x is of this type, else float */
    const void *x;                                       /* (rows, depth), or with glu (rows, 2, depth) */
    const float *shift, *scale;                          /* (images, depth) with `stride`, or null */
    const float *in_shift, *in_inverse;                  /* (padded depth), or null; in_inverse is 1 / in_scale */
    const uint16_t *l2;                                  /* as packed by pack_factor */
    const float *l2_steps;                               /* (padded rank) of words, or null */
    void *codes;                                         /* (rows, padded depth): bytes code + offset; wide: int16 */
    float *steps;                                        /* (rows), or (rows, depth / group) */
    void *low;                                           /* (rows, padded rank) x̂ L2ᵀ, float or words; AMX: two bf16 each */
    float *low_steps;                                    /* (rows) of words */
} Rows;

/* out = residual + gate · gelu(steps · codes · weightᵀ · channel + low · l1ᵀ + bias); every part after · optional.
   A `group` of columns has a multiple: an integer, for the weight's; or with `floats` a number, for sums in fp32. */
typedef struct {
    int64_t rows, depth, outputs, tokens, stride, rank, bits, gelu; /* stride: between images of gate */
    int64_t group, floats, offset; /* offset: what Rows added to codes */
    int64_t row_steps;         /* 1, or the activations' groups per row, a divisor of depth / group */
    int64_t bf16;              /* out is of this type, else float; then there is no residual */
    const void *codes, *low;   /* from Rows */
    const float *low_steps;
    const float *steps;        /* (rows, row_steps) */
    const uint8_t *weight;     /* as packed by pack_weight */
    const void *multiples;     /* (panels, depth / group, panel) int8, or bf16, or null */
    const int32_t *offsets;    /* (padded outputs): offset · the sum of each row of integers */
    const float *channel;      /* (padded outputs) fp32 step of each row */
    const float *bias;         /* (padded outputs) */
    const uint16_t *l1;        /* as packed by pack_factor */
    const float *l1_steps;     /* (padded outputs) of words, or null */
    const float *gate;         /* (images, outputs) with `stride`, or null */
    const float *residual;     /* (rows, outputs), or null */
    void *out;                 /* (rows, outputs), may be the residual itself */
} Product;

/* softmax(q kᵀ / √head) v of qkv (images, tokens, 3, heads, head) to out (images, tokens, heads, head); qkv is bf16
   where PAIRS, else float. q and k first take the norm of `weight`, LayerNorm with a bias, RMSNorm without one, and
   then turn by the angles of their token. */
typedef struct {
    int64_t images, tokens, heads, head;
    const void *qkv;
    const float *weight, *bias; /* (2, head) for q and k, or null */
    const float *cos, *sin;     /* (tokens, head), or null */
    float *out;
} Attention;

/* y = x wᵀ + bias; w stays as stored: floats, codes of 8 bits, or two 4-bit codes + 8 a byte, low one first. */
typedef struct {
    int64_t rows, depth, outputs, bits, groups;
    const float *x;        /* (rows, depth) */
    const uint8_t *weight; /* (outputs, depth · bits / 8) */
    const float *scales;   /* (outputs, groups) */
    const float *bias;     /* (outputs), or null */
    float *out;            /* (rows, outputs) */
} WeightOnly;

/* A stored weight to panels and the sums of its integers. */
typedef struct {
    int64_t outputs, depth, bits, group;
    const uint8_t *stored;   /* (outputs, bytes): 8-bit codes, or two 4-bit codes + 8 a byte, low one first */
    const int8_t *multiples; /* (outputs, depth / group), or null */
    uint8_t *weight;         /* zeroed, or 0x88 for 4 bits: panels · PANEL · padded depth · bits / 8 bytes */
    int32_t *sums;           /* (outputs) */
} Packing;

/* out = residual + 3×3 convolution of x, with `scale` of silu(x · scale + shift), stride 1, one zero around it; with
   `enlarge` (1) x is first enlarged to twice its size by repetition. */
typedef struct {
    int64_t height, width, inputs, outputs, enlarge; /* height and width of out */
    int64_t threads, floats;                         /* at most so many threads, and the memory of each */
    const float *x;                                  /* (height, width, inputs), of half the size with enlarge */
    const float *scale, *shift;                      /* (inputs), or null */
    const float *weight;                             /* (outputs, inputs, 3, 3) */
    const float *bias;                               /* (outputs), or null */
    const float *residual;                           /* (height, width, outputs), or null */
    float *out;                                      /* (height, width, outputs), may be the residual itself */
    float *memory;                                   /* (threads, floats), aligned to 64 bytes */
} Convolution;

/* weight · (x − mean) / √(variance + 1e-6) + bias over groups of channels, as scale and shift of each channel of x. */
typedef struct {
    int64_t pixels, channels, groups, piece; /* piece: pixels whose moments are computed at a time */
    const float *x;                          /* (pixels, channels) */
    const float *weight, *bias;              /* (channels) */
    float *moments;                          /* (pieces, 2, channels), scratch */
    float *scale, *shift;                    /* (channels) */
} GroupNorm;

/* out = x weightᵀ + bias in fp32. */
typedef struct {
    int64_t rows, inputs, outputs;
    const float *x;      /* (rows, inputs) */
    const float *weight; /* (outputs, inputs) */
    const float *bias;   /* (outputs), or null */
    float *out;          /* (rows, outputs) */
} Projection;

/* One of several calls that `run` makes in order. */
enum { LINEAR, ATTEND };
typedef struct {
    int64_t kind;
    const void *first, *second; /* Rows and Product, or Attention */
} Step;

#endif
