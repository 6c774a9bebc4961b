"""Training class-conditional DiTs: data, the loop, its moving average, its state on disk and its progress."""
