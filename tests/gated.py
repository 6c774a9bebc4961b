"""`svdit generate` that starts no batch while DIR has as many images as the file LIMIT says, and is less patient.

Under torchrun, with the repository on PYTHONPATH: gated.py LIMIT DIR ARGUMENTS…
"""

import sys
import time
from pathlib import Path
from typing import Any

from svdit import peers
from svdit.cli import command
from svdit.images import Pixels
from svdit.sampling import batch

if __name__ == "__main__":
    peers.INTERVAL, peers.FROZEN = 0.5, 12
    limit, folder = map(Path, sys.argv[1:3])
    genuine = batch.generate_images

    def generate_images(*args: Any, **options: Any) -> Pixels:
        while len(list(folder.glob("*.png"))) >= int(limit.read_text()):
            time.sleep(0.05)
        return genuine(*args, **options)

    batch.generate_images = generate_images
    command("generate", [*sys.argv[3:], "--sample-dir", str(folder)])
