/* Stored layouts to panels, once for each layer. */

FN int32_t pack_bytes(const Packing *p, const int8_t *row, uint8_t *to)
{
    int32_t total = 0;
    for (int64_t k = 0; k < p->depth; k++) total += row[k];
    for (int64_t k = 0; k < p->depth; k += 4) memcpy(to + k * PANEL, row + k, (size_t)least(4, p->depth - k));
    return total;
}

/* Eight codes c₀ … c₇ of four bytes become the bytes c₀c₄ c₁c₅ c₂c₆ c₃c₇: one `and` and one shift undo it. */
FN int32_t pack_nibbles(const Packing *p, const uint8_t *row, const int8_t *multiples, uint8_t *to)
{
    int32_t total = 0;
    for (int64_t k = 0; k < p->depth; k += 8) {
        uint8_t codes[8];
        for (int64_t i = 0; i < 8; i++) codes[i] = k + i < p->depth ? row[(k + i) / 2] >> (4 * (i & 1)) & 15 : 8;
        int32_t part = -64;
        for (int64_t i = 0; i < 8; i++) part += codes[i];
        total += multiples ? part * multiples[k / p->group] : part;
        for (int64_t t = 0; t < 4; t++) to[k / 2 * PANEL + t] = (uint8_t)(codes[t] | codes[t + 4] << 4);
    }
    return total;
}

WORK void pack_some(const Packing *p, int64_t *next)
{
    int64_t Kp = padded(p->depth, DEPTH_STEP), bytes = (p->depth * p->bits + 7) / 8;
    int64_t panels = padded(p->outputs, PANEL) / PANEL;
    for (int64_t first; (first = take(next, panels) * PANEL) < panels * PANEL;)
        for (int64_t n = first; n < least(first + PANEL, p->outputs); n++) {
            const uint8_t *row = p->stored + n * bytes;
            uint8_t *to = p->weight + first * Kp * p->bits / 8 + (n - first) * 4;
            const int8_t *multiples = p->multiples ? p->multiples + n * (p->depth / p->group) : 0;
            p->sums[n] = p->bits == 8 ? pack_bytes(p, (const int8_t *)row, to) : pack_nibbles(p, row, multiples, to);
        }
}

void EXPORT(pack_weight)(const Packing *p) { PARALLEL(pack_some, p); }

/* bf16 (outputs, depth) to panels (…, padded depth / 2, width, 2): width PANEL for L1, LOW_PANEL for L2. */
TARGET void EXPORT(pack_factor)(const uint16_t *factor, int64_t outputs, int64_t depth, int64_t padded_depth,
                                int64_t width, uint16_t *to)
{
    for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < depth; k++)
            to[n / width * width * padded_depth + (k / 2 * width + n % width) * 2 + k % 2] = factor[n * depth + k];
}

/* What cpu.py must know and agree with: shapes of tiles, WIDE, whether `low` holds bf16, sizes of arguments. */
void EXPORT(geometry)(int64_t *to)
{
    int64_t numbers[] = {PANEL, LOW_PANEL, WIDE, PAIRS,
                         sizeof(Rows), sizeof(Product), sizeof(Attention), sizeof(WeightOnly), sizeof(Packing)};
    memcpy(to, numbers, sizeof numbers);
}
