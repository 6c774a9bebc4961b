"""What a file is, from its first bytes: for messages about files that are not what was expected."""

import zipfile
from pathlib import Path

from svdit.errors import UserError

DECOMPRESS = "decompress it first"
OTHER_FORMAT = "pass a file of PyTorch or a .safetensors file"
AGAIN = "copy or download it again"
KINDS = {  # the first bytes: what the file is, and what to do
    b"version https://git-lfs": (
        "a Git LFS pointer",
        "run `git lfs pull` in its repository, or download the file itself",
    ),
    b"\x1f\x8b": ("a gzip archive", DECOMPRESS),
    b"BZh": ("a bzip2 archive", DECOMPRESS),
    b"\xfd7zXZ": ("an xz archive", DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", DECOMPRESS),
    b"7z\xbc\xaf": ("a 7-Zip archive", DECOMPRESS),
    b"Rar!": ("a RAR archive", DECOMPRESS),
    b"\x93NUMPY": ("a NumPy array", OTHER_FORMAT),
    b"\x89HDF": ("an HDF5 file", OTHER_FORMAT),
    b"GGUF": ("a GGUF file", OTHER_FORMAT),
    b"\x89PNG": ("a PNG image", OTHER_FORMAT),
    b"\xff\xd8\xff": ("a JPEG image", OTHER_FORMAT),
}
WEB_PAGE = ("a web page", "download the file itself (the page may ask you to log in)")
MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")


def check_regular(path: Path) -> None:
    """Raises UserError unless `path` is a regular file; reading a pipe or a device could wait forever."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise UserError(f"{path} is {kind}, not a regular file; pass a file")


def describe(path: Path) -> tuple[str, str]:
    """What the file is and what to do: ("a web page", "download …"); two empty strings if unknown."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file", AGAIN
    if not start.strip(b"\0"):
        return "a file of zero bytes, as after an interrupted copy", AGAIN
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive", DECOMPRESS
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(MARKUP):
        return WEB_PAGE
    return archive(path) if start.startswith(b"PK") else text(start)


def archive(path: Path) -> tuple[str, str]:
    """`describe` for zip archives other than those of torch.save."""
    try:
        names = zipfile.ZipFile(path).namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return "an incomplete archive", AGAIN
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript archive", "save the model's state_dict() with torch.save"
    if any(name.endswith("/data.pkl") for name in names):  # of torch.save, but damaged
        return "", AGAIN
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz of NumPy arrays", OTHER_FORMAT
    return f"a zip archive ({names[0]!r}, …)" if names else "an empty zip archive", DECOMPRESS


def text(start: bytes) -> tuple[str, str]:
    """`describe` for files that begin with UTF-8 text."""
    line = start.decode(errors="ignore").strip().partition("\n")[0][:40]
    is_text = len(start.decode(errors="ignore").encode()) > len(start) - 4 and line.isprintable()
    return (f"a text file ({line!r}, …)", OTHER_FORMAT) if is_text else ("", AGAIN)
