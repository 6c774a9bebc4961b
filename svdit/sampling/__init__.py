"""Images from a model: one batch, or a data set over several processes; independent of quantization."""
