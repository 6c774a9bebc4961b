"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) with the VGG16 backbone, where its two weight files are present.

They are looked for in torch hub's checkpoints folder, as torch-fidelity does, whose network this is; nothing is
downloaded. Quantization papers often quote the AlexNet variant, whose numbers are others.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from svdit.errors import UserError
from svdit.images import Pixels
from svdit.shims import allow_cpu_torchvision

URLS = (
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
)
Distance = Callable[[Pixels, Pixels], float]


def load_lpips(device: torch.device) -> Distance:
    """The distance of two uint8 (H, W, 3) pictures; UserError where a weight file is missing or holds code."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for url in URLS:
        _check(folder / url.rsplit("/", 1)[1], url)
    allow_cpu_torchvision()
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    network = SampleSimilarityLPIPS("lpips-vgg16").to(device)

    @torch.inference_mode()
    def distance(a: Pixels, b: Pixels) -> float:
        pair = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).to(device)
        return float(network(pair[:1], pair[1:]))

    return distance


def _check(path: Path, url: str) -> None:
    if not path.is_file():
        raise UserError(f"LPIPS needs {path}, which is not there; get it from {url} or leave lpips out of --metrics")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a weights file ({str(error).splitlines()[0]}); fetch {url} again") from None
