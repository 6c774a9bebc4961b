"""A quantized DiT in the formats of other tools."""
