"""Downloads the published DiT-XL/2 checkpoints into a folder, once.

The environment variable SVDIT_CHECKPOINT_URL sets another base URL, for example a mirror. The publisher lists no
checksums: SVDIT_CHECKPOINT_SHA256 pins one. Otherwise the first download is trusted; its SHA-256 is printed, and kept
beside the file for later downloads.
"""

import os
import zipfile
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from svdit.download import download
from svdit.errors import UserError
from svdit.files import atomic_path, sha256
from svdit.printing import note
from svdit.storage import pickles

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
PUBLISHED = {256: "DiT-XL-2-256x256.pt", 512: "DiT-XL-2-512x512.pt"}
PIN = "SVDIT_CHECKPOINT_SHA256"


def published_checkpoint(image_size: int, folder: str | Path = "pretrained_models") -> Path:
    """Path of the published DiT-XL/2 for that image size, downloaded into `folder` if missing.

    Raises UserError for sizes other than 256 and 512, if the download fails, and for another SHA-256 than the pinned
    one, also of a file that exists.
    """
    if image_size not in PUBLISHED:
        raise UserError(f"no DiT-XL/2 was published for {image_size}-pixel images; choose 256 or 512, or pass --ckpt")
    path = Path(folder) / PUBLISHED[image_size]
    base = urlsplit(os.environ.get("SVDIT_CHECKPOINT_URL", BASE_URL))
    url = urlunsplit(base._replace(path=f"{base.path.rstrip('/')}/{path.name}"))
    if path.is_file():
        if wrong := mismatch(path, os.environ.get(PIN, ""), PIN):
            raise UserError(f"{path} has {wrong}; remove it, or unset {PIN}")
        return path
    record = path.with_name(f"{path.name}.sha256")
    download(url, path, lambda part: problem(part, record), "pass another checkpoint with --ckpt")
    if not record.exists():
        digest = sha256(path)
        with atomic_path(record) as temporary:  # in the format of `sha256sum`
            temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
        note(f"{path} has the sha256 {digest}; set {PIN} to pin it")
    return path


def is_published(path: Path) -> bool:
    """Whether a file has the name of a published DiT-XL/2, or the SHA-256 that the environment variable pins."""
    pin = os.environ.get(PIN, "")
    return path.name in PUBLISHED.values() or (pin != "" and not mismatch(path, pin, PIN))


def problem(part: Path, record: Path) -> str:
    """What is wrong with a complete download, "" if nothing: its SHA-256, its content, or the archive's checksums."""
    pin, source = os.environ.get(PIN, ""), PIN
    if not pin and record.is_file():
        pin, source = record.read_text(encoding="utf-8", errors="replace")[:64], record.name
    if wrong := mismatch(part, pin, source):
        return wrong
    try:
        pickles.load(part)
        bad = zipfile.ZipFile(part).testzip() if zipfile.is_zipfile(part) else None
    except (UserError, zipfile.BadZipFile):
        return "it is no file of torch.save"
    return f"the checksum of {bad} does not match" if bad else ""


def mismatch(path: Path, pin: str, source: str) -> str:
    """How the file's SHA-256 differs from `pin`, which `source` contains; "" if it does not, or without a pin."""
    digest = sha256(path) if pin else ""
    return f"the sha256 {digest}, not {pin} as in {source}" if digest != pin.lower() else ""
