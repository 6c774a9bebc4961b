"""The embedded DiT from Python: quantize it on its own sampling steps, sample both models from the same noise, compare.

python examples/digits.py
"""

import svdit
from svdit.quant.config import dit_config
from svdit.sampling.batch import SamplingConfig
from svdit.sampling.calibration import calibration_loop

model = svdit.load_model("digits")
sampling = SamplingConfig("ddim", "25", cfg_scale=1.5)
full = svdit.generate(model, range(10), sampling, seed=0)  # (10, 1, 8, 8) in [-1, 1]

report = svdit.quantize_(model, dit_config(svdit.recipe_for("w4a8", rank=8)), calibration_loop(images=16, steps=10))
svdit.save_model(model, "digits-w4a8.safetensors", name="DiT-digits")

fast = svdit.accelerate(svdit.load_model("digits-w4a8.safetensors"))
images = svdit.generate(fast, range(10), sampling, seed=0)
error = float((images - full).norm() / full.norm())
print(f"{report.bytes_before / 1e6:.2f} MB before, {report.bytes_after / 1e6:.2f} MB after quantization")
print(f"relative error of the images: {error:.4f}")
