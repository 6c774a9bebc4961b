"""Finds, downloads and loads the 2015 Inception weights; downloads only on request.

Searched in this order: the given path, $SVDIT_INCEPTION_WEIGHTS, the cache folder, torch hub's checkpoints folder
(under torch-fidelity's and pytorch-fid's file names). Loaded with `weights_only`, so files with code are refused.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from svdit.download import download as download_file
from svdit.errors import UnreadableError, UserError
from svdit.files import sha256, user_cache
from svdit.storage import pickles

NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAMES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "SVDIT_INCEPTION_WEIGHTS"

MISSING = (
    "FID, sFID, KID, IS, precision and recall need the 2015 Inception weights (95.6 MB), which are in none of "
    "{places}; pass --download, or run curl -LO {url} and pass --feature-extractor-weights FILE (or set {variable}), "
    "or use --paired_dir DIR --metrics paired, or --feature-extractor random (a smoke test, NOT comparable)"
)


def find_weights(path: str | Path | None, cache: Path | None = None, download: bool = False) -> Path:
    """The weights file, downloaded into `cache` if `download`. Raises UserError with the searched places."""
    cache = cache or user_cache()
    named = path or os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UserError(f"there is no Inception weights file {named}; fix the path or omit it")
        return Path(named)
    folders = [cache, Path(torch.hub.get_dir()) / "checkpoints"]
    for candidate in (folder / name for folder in folders for name in NAMES):
        if candidate.is_file():
            return candidate
    if download:
        alternative = "pass --feature-extractor-weights"
        return download_file(URL, cache / NAMES[0], problem, alternative)
    places = f"${VARIABLE}, " + ", ".join(str(folder) for folder in folders)
    raise UserError(MISSING.format(places=places, url=URL, variable=VARIABLE))


def problem(file: Path) -> str:
    """What is wrong with a download; "" if nothing."""
    digest = sha256(file)
    return "" if digest == SHA256 else f"sha256 {digest}, not {SHA256}"


def load_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict, tensors (O, I, …), and the file's SHA-256. Raises UserError for other files and for code."""
    try:
        state = pickles.load(path)
    except UnreadableError:
        raise
    except UserError as error:
        reason = str(error).rpartition("; ")[0]
        raise UserError(f"{reason}; it cannot be read as a weights file, download it again from {URL}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not contain a state dict of tensors; download the weights from {URL}")
    pickles.check_memory(path, state, path.stat().st_size)
    return state, sha256(path)
