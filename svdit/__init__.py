"""svdit: quantize diffusion transformers with SVDQuant, sample from them, and measure what it cost."""

__version__ = "0.1.0"
