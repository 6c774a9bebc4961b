/* Stored layouts to panels, once for each layer. */

/* A panel's columns k … k + ADJACENT lie together, those of output n in place n. */
FN void pack_bytes(const Packing *p, int64_t first, int64_t outputs)
{
    const int8_t *rows = (const int8_t *)p->stored + first * p->depth;
    uint8_t *to = p->weight + first * padded(p->depth, DEPTH_STEP);
    for (int64_t k = 0; k < p->depth; k += ADJACENT, to += ADJACENT * PANEL)
        for (int64_t n = 0; n < outputs; n++) {
            if (p->depth - k >= ADJACENT) memcpy(to + ADJACENT * n, rows + n * p->depth + k, ADJACENT);
            else memcpy(to + ADJACENT * n, rows + n * p->depth + k, (size_t)(p->depth - k));
        }
    for (int64_t n = 0; n < outputs; n++) {
        int32_t total = 0;
        for (int64_t k = 0; k < p->depth; k++) total += rows[n * p->depth + k];
        p->sums[first + n] = total;
    }
}

/* Eight codes of a row from column k on, the first in the lowest bits; behind the last one zeros, which are stored as 8. */
FN uint32_t eight_codes(const Packing *p, const uint8_t *row, int64_t k)
{
    uint32_t codes = 0;
    int64_t left = p->depth - k;
    if (left >= 8) { memcpy(&codes, row + k / 2, 4); return codes; }
    memcpy(&codes, row + k / 2, (size_t)(left + 1) / 2);
    return (codes & ((1u << 4 * left) - 1)) | 0x88888888u << 4 * left;
}

/* The lower four of eight codes, each in its own byte. */
FN uint32_t apart(uint32_t codes)
{
    uint32_t pairs = (codes | codes << 8) & 0x00ff00ff;
    return (pairs | pairs << 4) & 0x0f0f0f0f;
}

/* Eight codes c₀ … c₇ become the bytes c₀c₄ c₁c₅ c₂c₆ c₃c₇: one `and` and one shift undo it. */
FN void pack_nibbles(const Packing *p, int64_t first, int64_t outputs)
{
    int64_t bytes = (p->depth + 1) / 2, groups = p->multiples ? p->depth / p->group : 1;
    uint8_t *to = p->weight + first * padded(p->depth, DEPTH_STEP) / 2;
    memset(p->sums + first, 0, (size_t)outputs * sizeof *p->sums);
    for (int64_t k = 0; k < p->depth; k += 8, to += 4 * PANEL)
        for (int64_t n = 0; n < outputs; n++) {
            uint32_t codes = eight_codes(p, p->stored + (first + n) * bytes, k), low = apart(codes & 0xffff);
            uint32_t high = apart(codes >> 16), packed = low | high << 4;
            int32_t total = (int32_t)((low + high) * 0x01010101u >> 24) - 64;
            p->sums[first + n] += p->multiples ? total * p->multiples[(first + n) * groups + k / p->group] : total;
            memcpy(to + 4 * n, &packed, 4);
        }
}

WORK int pack_some(const Packing *shared, int64_t *next)
{
    const Packing kept = *shared, *p = &kept;
    int64_t panels = padded(p->outputs, PANEL) / PANEL;
    for (int64_t panel; (panel = take(next, panels)) < panels;) {
        int64_t first = panel * PANEL, outputs = least(PANEL, p->outputs - first);
        if (p->bits == 8) pack_bytes(p, first, outputs);
        else pack_nibbles(p, first, outputs);
    }
    return 0;
}

int EXPORT(pack_weight)(const Packing *p) PARALLEL(pack_some, p)

/* bf16 or words (outputs, depth) to panels (…, padded depth / 2, width, 2). */
TARGET int EXPORT(pack_factor)(const uint16_t *factor, int64_t outputs, int64_t depth, int64_t padded_depth,
                                int64_t width, uint16_t *to)
{
    for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < depth; k++)
            to[n / width * width * padded_depth + (k / 2 * width + n % width) * 2 + k % 2] = factor[n * depth + k];
    return 0;
}

/* What ffi.py must know and agree with: shapes of tiles, WIDE, SIGNED, PAIRS, WORDS, PARTS, sizes of arguments. */
int EXPORT(geometry)(int64_t *to)
{
    int64_t numbers[] = {PANEL, LOW_PANEL, LANES, WIDE, SIGNED, PAIRS, WORDS, PARTS,
                         sizeof(Rows), sizeof(Product), sizeof(Attention), sizeof(WeightOnly), sizeof(Packing),
                         sizeof(Convolution), sizeof(GroupNorm), sizeof(Projection), sizeof(Step)};
    memcpy(to, numbers, sizeof numbers);
    return 0;
}
