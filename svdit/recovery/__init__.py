"""Training the low-rank branch, the bias and the output scales of quantized layers against full precision."""
