"""Reads and writes checkpoint files, .safetensors or .pt: named tensors and, in svdit's own files, a JSON header.

The format is detected from the content. The header's `sha256` covers the rest of the header and every tensor's name,
dtype, shape and bytes, because neither format verifies them. Files of other tools may also be an index of shards, and
`foreign.py` finds the weights in them. No code in a file is ever executed. `store.py` interprets the header.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdit import __version__
from svdit.checkpoints import foreign
from svdit.errors import UserError
from svdit.files import atomic_path, reading, sha256
from svdit.storage import ahead, pickles
from svdit.storage.ahead import KEY
from svdit.storage.checksum import content, digest, digest_of
from svdit.storage.filetype import check_regular

FORMAT_VERSION = 1
Header = dict[str, Any]
FIELDS: dict[str, type] = {  # of a header; all but the first may be absent
    "format_version": int, "tool_version": str, "name": str, "config": dict, "layers": dict, "provenance": dict,
    "shared": dict, "classes": list, "caching": dict, "sha256": str,
}  # fmt: skip
DEPTH = 20  # of nested values in a header


class Contents(NamedTuple):
    """A file: tensors (…) by name; svdit's own header, or None; what another training script recorded."""

    tensors: dict[str, Tensor]
    header: Header | None
    recorded: dict[str, Any]


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write tensors (…) with a JSON-able header, atomically, in the format of the suffix: .safetensors or .pt.

    Raises UserError for other suffixes.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"the format of {path} is not supported; use a name that ends in .safetensors or .pt")
    tensors = {name: compact(tensor) for name, tensor in tensors.items()}
    header = json.loads(json.dumps({"format_version": FORMAT_VERSION, "tool_version": __version__, **header}))
    header["sha256"] = digest(header, tensors)
    with atomic_path(path) as temporary:
        if path.suffix == ".pt":
            with temporary.open("wb") as file:
                torch.save({KEY: header, "model": tensors}, file)
        else:
            save_file(tensors, temporary, metadata={KEY: json.dumps(header)})


@contextmanager
def verified(path: Path, mapped: bool = False) -> Iterator[Contents]:
    """A file whose tensors are copied into CPU memory and whose checksums match at the end of the context.

    The header's checksum is computed meanwhile, or has been (`storage.ahead`), and a wrong one is reported in place of
    any other error. `mapped`: tensors of layers with quantized activations stay in the file, for a model that is packed
    at once.
    Raises UserError for files that are damaged, incomplete, foreign or newer than this version.
    """
    begun = ahead.started(path)
    tensors, header, recorded = contents(path)
    if header is None:
        pickles.check_sums(parts(path))
    inside = layers_to_pack(header or {}) if mapped else ()
    copied = {name: x.detach() if name.startswith(inside) else x.detach().clone() for name, x in tensors.items()}
    if header is None:
        yield Contents(copied, header, recorded)
        return
    with ThreadPoolExecutor(1) as pool:
        checksum = begun or pool.submit(digest_of, content(header, copied))
        try:
            yield Contents(copied, header, recorded)
        finally:
            if header.get("sha256") != (checksum.result() or digest_of(content(header, copied))):
                message = f"{path} is damaged: its content does not match its checksum; copy or download it again"
                raise UserError(message) from None


def layers_to_pack(header: Header) -> tuple[str, ...]:
    """How the names of tensors of layers with quantized activations start: whose packed form shares no memory."""
    layers = header.get("layers", {}).items()
    return tuple(f"{name}." for name, spec in layers if isinstance(spec, dict) and spec.get("act"))


def read_header(path: Path) -> Header | None:
    """The header of one of svdit's own files, None for others. Reads no tensors and does not verify the checksum."""
    return contents(path).header


def contents(path: Path) -> Contents:
    """A file with memory-mapped tensors and unverified checksums. Raises UserError as `read` does."""
    if foreign.is_index(path):
        content, header = foreign.joined(path, lambda shard: one_file(shard)[0]), None
    else:
        content, header = one_file(path)
    tensors = foreign.state_dict(content, path) if header is None else content
    pickles.check_memory(path, tensors, sum(part.stat().st_size for part in parts(path)))
    if header is not None and header["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {header['format_version']} of svdit {header.get('tool_version')}, "
            f"and svdit {__version__} reads up to format {FORMAT_VERSION}; upgrade svdit"
        )
    return Contents(tensors, header, foreign.recorded(content) if header is None else {})


def parts(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or an index and its shards."""
    return [path, *foreign.shards(path)] if foreign.is_index(path) else [path]


def fingerprint(path: Path) -> str:
    """Hex SHA-256 of a checkpoint's file; of an index, that of the digests of all its files."""
    digests = [sha256(part) for part in parts(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def one_file(path: Path) -> tuple[Any, Header | None]:
    """The content of one file, memory-mapped, and the header."""
    check_regular(path)
    with reading(path), path.open("rb") as file:
        start = file.read(9)
    is_safetensors = len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size
    return from_safetensors(path) if is_safetensors else from_torch(path)


def from_safetensors(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """Tensors (…) and header of a .safetensors file. Raises UserError where it is damaged."""
    try:
        with reading(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, checked(path, json.loads(metadata[KEY])) if KEY in metadata else None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise pickles.unreadable(path, error) from None


def from_torch(path: Path) -> tuple[Any, Header | None]:
    """Content and header of a file of torch.save, zip or legacy: svdit's own, or what another tool saved.

    Raises UserError where it is damaged or contains objects that could run code.
    """
    loaded = pickles.load(path)
    if not (isinstance(loaded, dict) and KEY in loaded):
        return loaded, None
    header, tensors = checked(path, loaded[KEY]), loaded.get("model")
    entries = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries):
        raise UserError(f"{path} contains no state dict of tensors; copy or download it again")
    return tensors, header


def checked(path: Path, header: object) -> Header:
    """The header, if it is JSON with fields of the expected types. Raises UserError otherwise."""
    if isinstance(header, dict) and is_json(header):
        wrong = [key for key, kind in FIELDS.items() if type(header.get(key, kind())) is not kind]
        if not wrong and header.get("format_version", 0) > 0:
            return header
    raise UserError(f"{path} has a damaged header; copy or download it again")


def is_json(value: object, depth: int = 0) -> bool:
    """Whether a value consists of JSON's types only, with names that are strings, and is not nested without end."""
    if isinstance(value, dict | list) and depth < DEPTH:
        names = value if isinstance(value, dict) else ()
        values = value.values() if isinstance(value, dict) else value
        return all(type(name) is str for name in names) and all(is_json(each, depth + 1) for each in values)
    return type(value) in (str, int, float, bool, type(None))


def compact(tensor: Tensor) -> Tensor:
    """The tensor (…) on the CPU, contiguous, and alone in its storage, so that views are not saved with their base."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
