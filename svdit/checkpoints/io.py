"""A checkpoint as bytes: named tensors and, in our own files, a JSON header; .safetensors or .pt, known by content.

The header's `sha256` covers the rest of the header and every tensor's name, type, shape and bytes, since neither
format checks what it reads. Pickles are read with `weights_only=True` and no global beyond `argparse.Namespace`
(the published training script stores one), so nothing in a file is ever executed.
What the header says about the model is `store.py`'s business.
"""

import argparse
import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdit import __version__
from svdit.errors import UserError
from svdit.files import atomic_path

FORMAT_VERSION = 1
KEY = "svdit"
Header = dict[str, Any]


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write `tensors` under a JSON-able `header`, whole or not at all; the suffix, .safetensors or .pt, decides how."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"cannot tell how to write {path}; end its name in .safetensors or .pt")
    tensors = {name: compact(tensor) for name, tensor in tensors.items()}
    header = json.loads(json.dumps({"format_version": FORMAT_VERSION, "tool_version": __version__, **header}))
    header["sha256"] = digest(header, tensors)
    with atomic_path(path) as temporary:
        if path.suffix == ".pt":
            torch.save({KEY: header, "model": tensors}, temporary)
            return
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={KEY: json.dumps(header)})
        temporary.chmod(mode)  # safetensors makes files that only their owner can read


def read(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """The tensors, in memory of their own on the CPU, and the verified header of one of our own files."""
    tensors, header = contents(path)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if header is not None and header.get("sha256") != digest(header, tensors):
        raise UserError(f"{path} is damaged: its content does not match its own checksum; copy or download it again")
    return tensors, header


def read_header(path: Path) -> Header | None:
    """The header of one of our own files, None for others; reads no tensor and verifies no checksum."""
    return contents(path)[1]


def contents(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """Tensors still on the disk (memory-mapped), and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size
    tensors, header = from_safetensors(path) if is_safetensors else from_torch(path, start)
    if header is not None and header["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by svdit {header.get('tool_version')} in format {header['format_version']}, "
            f"and this is svdit {__version__}, which reads format {FORMAT_VERSION}; upgrade svdit"
        )
    return tensors, header


def from_safetensors(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, checked(path, json.loads(metadata[KEY])) if KEY in metadata else None
    except (SafetensorError, ValueError) as error:
        raise incomplete(path, error) from None


def from_torch(path: Path, start: bytes) -> tuple[dict[str, Tensor], Header | None]:
    """A zip of torch's or an old plain pickle: ours, the published training script's, or a bare state dict."""
    is_zip = start.startswith(b"PK\x03\x04")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # foreign bytes raise anything, KeyError and IndexError too
        if isinstance(error, pickle.UnpicklingError) and (is_zip or start.startswith(b"\x80")):
            raise UserError(
                f"{path} holds pickled objects other than tensors, which could run code, so nothing of it was loaded; "
                "ask its author for a plain state dict or a .safetensors file"
            ) from None
        raise incomplete(path, error) from None
    header = checked(path, loaded[KEY]) if isinstance(loaded, dict) and KEY in loaded else None
    tensors = loaded
    for key in ("ema", "model"):  # the training script's moving average is what it samples from
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            tensors = loaded[key]
            break
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds no state dict of tensors; give a checkpoint of a DiT")
    return tensors, header


def checked(path: Path, header: object) -> Header:
    if isinstance(header, dict) and isinstance(header.get("format_version"), int):
        return header
    raise UserError(f"{path} has a damaged header; copy or download it again")


def incomplete(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
    size = f"{path.stat().st_size} bytes"
    return UserError(f"{path} ({size}) is no checkpoint, or only a part of one: {reason}; copy or download it again")


def compact(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage, so that a file holds what the shapes imply and no more."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def digest(header: Header, tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the header without its own `sha256`, then over the tensors in the order of their names."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
