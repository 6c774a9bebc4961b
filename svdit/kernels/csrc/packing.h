/* Stored layouts to panels, once for each layer. Destinations are zeroed and as large as cpu.py's sizes say. */

/* codes (outputs, depth) int8, 8 or 4 bits wide, to panels of `bits`; 4-bit destinations are filled with 0x88. */
TARGET void EXPORT(pack_weight)(const int8_t *codes, int64_t outputs, int64_t depth, int64_t bits, uint8_t *to)
{
    int64_t Kp = padded(depth, DEPTH_STEP);
    for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < depth; k++) {
            int8_t code = codes[n * depth + k];
            int64_t panel = n / PANEL * PANEL * Kp, lane = n % PANEL;
            if (bits == 8) {
                to[panel + (k / 4 * PANEL + lane) * 4 + k % 4] = (uint8_t)code;
                continue;
            }
            uint8_t *byte = to + panel / 2 + (k / 8 * PANEL + lane) * 4 + k % 4;
            *byte = (uint8_t)(k & 4 ? (*byte & 15) | (code + 8) << 4 : (*byte & 0xf0) | (code + 8));
        }
}

/* bf16 (outputs, depth) to panels (…, padded depth / 2, width, 2): width PANEL for L1, LOW_PANEL for L2. */
TARGET void EXPORT(pack_factor)(const uint16_t *factor, int64_t outputs, int64_t depth, int64_t padded_depth,
                                int64_t width, uint16_t *to)
{
    for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < depth; k++)
            to[n / width * width * padded_depth + (k / 2 * width + n % width) * 2 + k % 2] = factor[n * depth + k];
}

/* What cpu.py must know and agree with: shapes of tiles, the offsets, whether `low` holds bf16, sizes of arguments. */
void EXPORT(geometry)(int64_t *to)
{
    int64_t numbers[] = {PANEL, LOW_PANEL, OFFSET, SMALL_CODES ? 128 : OFFSET, PAIRS, sizeof(Rows), sizeof(Product), sizeof(Attention), sizeof(WeightOnly)};
    memcpy(to, numbers, sizeof numbers);
}
