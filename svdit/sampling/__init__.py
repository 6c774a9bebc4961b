"""Pictures from a model: one batch, or many over several processes; has never heard of quantization."""
