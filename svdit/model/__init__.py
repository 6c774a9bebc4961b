"""The diffusion transformer (DiT), its named configurations and its autoencoder."""
