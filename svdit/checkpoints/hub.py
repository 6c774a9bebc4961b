"""Downloads the published DiT-XL/2 checkpoints into a folder, once.

The environment variable SVDIT_CHECKPOINT_URL sets another base URL, for example a mirror.
"""

import os
import zipfile
from pathlib import Path

from svdit.checkpoints import io
from svdit.download import download
from svdit.errors import UserError

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
PUBLISHED = {256: "DiT-XL-2-256x256.pt", 512: "DiT-XL-2-512x512.pt"}


def published_checkpoint(image_size: int, folder: str | Path = "pretrained_models") -> Path:
    """Path of the published DiT-XL/2 for that image size, downloaded into `folder` if missing.

    Raises UserError for sizes other than 256 and 512, and if the download fails.
    """
    if image_size not in PUBLISHED:
        raise UserError(f"no DiT-XL/2 was published for {image_size}-pixel images; choose 256 or 512, or pass --ckpt")
    path = Path(folder) / PUBLISHED[image_size]
    url = os.environ.get("SVDIT_CHECKPOINT_URL", BASE_URL).rstrip("/") + "/" + path.name
    return download(url, path, is_sound, "pass another checkpoint with --ckpt")


def is_sound(path: Path) -> bool:
    """Whether a file is a readable state dict whose bytes match the checksums of its archive."""
    try:
        io.read_header(path)
        return not (zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip())
    except (UserError, zipfile.BadZipFile):
        return False
