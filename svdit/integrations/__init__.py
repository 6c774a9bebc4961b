"""Other libraries' models: quantized, saved and loaded in their own ways."""
