"""Add a number format: it is data, a `Format`. Here, 5-bit weights in groups of 64, between INT4 and INT8.

    python examples/number_format.py

A line in RECIPES of svdit/quant/config.py makes a preset of it. It runs on the CPU's integer kernels.
"""

import svdit

INT5 = svdit.Format(bits=5, group=64, scale="bf16", span="full")  # codes −16 … 15
recipes = {
    "W4A8": svdit.recipe_for("w4a8", rank=8),
    "W5A8": svdit.recipe_for("w4a8", rank=8, weight=INT5),
    "W8A8": svdit.recipe_for("w8a8", rank=8),
}

original = svdit.sample(svdit.load("digits"), range(8), steps=50)
psnr = {}
for name, recipe in recipes.items():
    model = svdit.load("digits")
    report = svdit.quantize_(model, recipe)
    psnr[name] = svdit.psnr(svdit.sample(svdit.accelerate(model), range(8), steps=50), original)
    print(f"{name}: {report.bytes_after / 1e6:.2f} MB, PSNR {psnr[name]:.1f} dB")
