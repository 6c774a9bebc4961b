"""Choose the bits and the rank of every layer, for a file of at most 1.5 MB; `target_sqnr=` for a quality in dB.

    python examples/budget.py

`svdit quantize --target-psnr` chooses by the PSNR of generated images.
"""

from collections import Counter

import svdit

model = svdit.load("digits")
report = svdit.quantize_(model, "w4a8", target_size=1.5)
formats = Counter(line.weight for line in report.layers)

print(f"{report.bytes_after / 1e6:.2f} MB:", ", ".join(f"{n} layers {name}" for name, n in sorted(formats.items())))
