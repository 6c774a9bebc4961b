"""Where the 2015 Inception weights are, and what is in them; nothing is fetched unless asked for.

Looked for in this order: the given path, $SVDIT_INCEPTION_WEIGHTS, the cache folder, torch hub's checkpoints folder
(under torch-fidelity's and pytorch-fid's file names). Loaded with `weights_only`: a file with code is refused.
"""

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.files import atomic_path, sha256

NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAMES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DEFAULT_CACHE = Path("~/.cache/svdit").expanduser()
VARIABLE = "SVDIT_INCEPTION_WEIGHTS"

MISSING = """\
FID/sFID/KID/IS/precision/recall need the 2015 Inception weights (95.6 MB), which were not found.
  looked in: {places}
  get them once:  curl -LO {url}
  then pass --feature-extractor-weights PATH (or set {variable}).
  offline alternatives: --paired_dir DIR --metrics paired (PSNR/SSIM, no weights) or
  --feature-extractor random (smoke test, NOT comparable)."""


def find_weights(path: str | Path | None, cache: Path, download: bool = False) -> Path:
    """The weights file, downloaded into `cache` only if `download`; UserError says where it was looked for."""
    named = path or os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UserError(f"there is no Inception weights file {named}; mend the path or leave it out")
        return Path(named)
    folders = [cache, Path(torch.hub.get_dir()) / "checkpoints"]
    for candidate in (folder / name for folder in folders for name in NAMES):
        if candidate.is_file():
            return candidate
    if download:
        return _download(cache / NAMES[0])
    places = f"${VARIABLE}, " + ", ".join(str(folder) for folder in folders)
    raise UserError(MISSING.format(places=places, url=URL, variable=VARIABLE))


def _download(path: Path) -> Path:
    try:
        with atomic_path(path) as temporary:
            torch.hub.download_url_to_file(URL, str(temporary), hash_prefix=SHA256)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the Inception weights could not be fetched from {URL}: {error}") from None
    return path


def load_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict and the file's SHA-256."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a weights file ({first}); fetch it again from {URL}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a state dict of tensors; fetch the weights from {URL}")
    return state, sha256(path)
