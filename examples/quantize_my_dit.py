"""Quantize a DiT, save it, and compare its images with those of full precision, from the same noise.

    python examples/quantize_my_dit.py [CHECKPOINT]

CHECKPOINT: a file of DiT, SiT, REPA, LightningDiT or JiT; without it the digits model, which is part of the package.
"""

import sys

import torch

import svdit

path = sys.argv[1] if len(sys.argv) > 1 else "digits"
labels = [0, 1, 2, 3]

model = svdit.load(path)
original = svdit.sample(model, labels, steps=50)
report = svdit.quantize_(model, "w8a8")  # calibrated on the model's own sampling steps
svdit.save(model, "quantized.safetensors")

fast = svdit.accelerate(svdit.load("quantized.safetensors"))  # packed for this processor
images = svdit.sample(fast, labels, steps=50)
psnr = svdit.psnr(images, original)
svdit.save_image(torch.cat([original, images]), "before_and_after.png", columns=len(labels))

print(f"{report.bytes_before / 1e6:.2f} MB before, {report.bytes_after / 1e6:.2f} MB after quantization")
print(f"PSNR {psnr:.1f} dB; see before_and_after.png")
