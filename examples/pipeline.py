"""Quantize the transformer of a diffusers pipeline, save the pipeline, and load it again.

python examples/pipeline.py

For a pipeline in a folder, one command does the same: svdit quantize --pipeline FOLDER --output FOLDER2
"""

import numpy as np
import torch

import svdit
from svdit.integrations.diffusers import attach_

from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel  # isort: skip

torch.manual_seed(0)
# A small pipeline with random weights. Yours: pipeline = DiffusionPipeline.from_pretrained("FOLDER")
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=64, num_layers=2, sample_size=8, out_channels=8
)
vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,))
pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)


def images(pipeline: DiffusionPipeline, labels: list[int], seed: int = 0) -> np.ndarray:
    """(N, H, W, 3) from 0 to 1"""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(labels, num_inference_steps=4, generator=generator, output_type="np").images


before = images(pipeline, [3, 207], seed=1)
# Attention and feed-forward of the blocks are quantized, embedders are not.
report = svdit.quantize_(transformer, "w8a8", lambda _: [images(pipeline, [i, i + 500]) for i in range(8)])
attach_(transformer)  # now it can be saved
pipeline.save_pretrained("dit-w8a8")

loaded = DiffusionPipeline.from_pretrained("dit-w8a8")  # in another process: import svdit.integrations.diffusers first
loaded.set_progress_bar_config(disable=True)
svdit.accelerate(loaded.transformer)
after = images(loaded, [3, 207], seed=1)
error = float(np.linalg.norm(after - before) / np.linalg.norm(before))

print(
    f"{len(report.layers)} layers, {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after"
)
print(f"relative error of the images: {error:.4f}")
