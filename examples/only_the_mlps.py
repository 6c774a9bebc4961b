"""Quantize some layers only, and give others another preset: patterns of layer names, the first that matches applies.

python examples/only_the_mlps.py
"""

import svdit

model = svdit.load("digits")
original = svdit.sample(model, [0, 1, 2, 3], steps=50)
report = svdit.quantize_(
    model,
    {
        "blocks.0.*": None,  # the first block stays in full precision
        "*.mlp.fc1": svdit.recipe_for("w4a8", rank=8),
        "*.mlp.fc2": "w8a8",
    },  # layers that no pattern matches stay too
)
psnr = svdit.psnr(svdit.sample(model, [0, 1, 2, 3], steps=50), original)

for line in report.layers:
    print(f"{line.name}: {line.weight} weights, rank {line.rank}, {line.sqnr:.1f} dB")
print(f"PSNR {psnr:.1f} dB")
