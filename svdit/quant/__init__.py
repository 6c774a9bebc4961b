"""SVDQuant for any nn.Module: a high-precision low-rank branch and a low-bit residual."""
