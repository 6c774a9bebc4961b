"""Reads files of torch.save as data: they run no code and use no more memory than the file has bytes.

The names in a pickle are listed before anything is built. Torch's weights-only unpickler rebuilds the tensors; objects
that only describe a run (paths, NumPy scalars) become placeholders, and an argparse.Namespace keeps numbers and texts.
Other names are refused.
"""

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.files import check_zip, reading
from svdit.storage import filetype

# Harmless by what they are, but never imported: a placeholder stands for each.
DESCRIPTIVE = re.compile(
    r"(pathlib|numpy|argparse|datetime|typing|uuid|decimal|omegaconf|ml_collections|easydict|yacs|addict)\..+"
    r"|types\.SimpleNamespace|collections\.(defaultdict|deque)"
    r"|builtins\.(list|dict|tuple|int|float|str|bool|frozenset|slice|range|object)|torch\.torch_version\.TorchVersion"
)
# Allowed by torch, but they allocate any amount of memory, or build tensors without storage.
REFUSED = re.compile(r"builtins\.bytearray|torch\._utils\._rebuild_(?!tensor$|tensor_v[23]$|parameter).*")
TORCH = re.compile(
    r"torch\.((cuda|sparse|storage|serialization|_utils|_tensor|nn\.parameter)\.)?\w+"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|complex)"
)
PICKLES = 4  # that a legacy file begins with: magic number, version, system, content
DEPTH, ENTRIES = 50, 2 * 10**6  # of nested lists, dicts and tuples; an entry may be stored once and be in many of them
SLACK, REPEATS = 2**24, 4  # bytes of tensors per file: a few tensors may share their bytes


class Placeholder:
    """In place of an object that is not a tensor: accepts its state and keeps nothing."""

    def __new__(cls, *_: object) -> "Placeholder":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class Namespace(Placeholder):
    """In place of an argparse.Namespace: keeps the numbers and texts in it."""

    values: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: object) -> None:
        """Keep numbers and texts."""
        self.values = plain(state)


def plain(entries: object) -> dict[str, Any]:
    """The entries of a dict that are numbers, texts or tuples."""
    pairs = entries.items() if isinstance(entries, dict) else ()
    return {key: value for key, value in pairs if type(key) is str and type(value) in (bool, int, float, str, tuple)}


def new_dict(*_: object) -> dict[Any, Any]:
    """In place of a defaultdict."""
    return {}


def new_list(*_: object) -> list[Any]:
    """In place of a deque."""
    return []


def placeholder(name: str) -> type[Placeholder]:
    """A placeholder called like the class, for messages about what a file holds."""
    return type(name.rpartition(".")[2].replace("_reconstruct", "ndarray"), (Placeholder,), {})


STAND_INS = {"argparse.Namespace": Namespace, "collections.defaultdict": new_dict, "collections.deque": new_list}


def load(path: Path) -> Any:
    """The content of a file of torch.save, zip or legacy, on the CPU; a zip is not read, but mapped into memory.

    Raises UserError for other files, damaged ones, and those with objects that are neither tensors nor descriptive.
    """
    names = check(path)
    stand_ins = [(STAND_INS.get(name) or placeholder(name), name) for name in names if DESCRIPTIVE.fullmatch(name)]
    try:
        with reading(path), path.open("rb") as file, torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            misnamed = path.suffix == ".safetensors"  # which torch believes
            mapped = zipfile.is_zipfile(path) and not misnamed
            content = torch.load(file if misnamed else path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise refusal(path, {name for name in names if not TORCH.fullmatch(name)} or names) from None
    except Exception as error:  # foreign bytes raise anything, including KeyError and IndexError
        raise unreadable(path, error) from None
    check_nesting(path, content)
    return content


def check(path: Path) -> set[str]:
    """Names in the pickles of a file of torch.save, before anything is loaded. Raises UserError as `load`."""
    filetype.check_regular(path)
    try:
        with reading(path):
            names = set(zip_names(path) if zipfile.is_zipfile(path) else legacy_names(path))
    except UserError:
        raise
    except Exception as error:  # foreign bytes raise anything
        if isinstance(error, zipfile.BadZipFile) and "CRC" in str(error):
            raise UserError(f"{path} is damaged: its content does not match its checksum; {filetype.AGAIN}") from None
        raise unreadable(path, error) from None
    if "torch.storage._load_from_bytes" in names:
        raise not_a_checkpoint(path, "a pickle of Python's own", "save the state dict with torch.save")
    known = {name for name in names if TORCH.fullmatch(name) or DESCRIPTIVE.fullmatch(name)}
    if foreign := {name for name in names if name not in known or REFUSED.fullmatch(name)}:
        raise refusal(path, foreign)
    return names


def zip_names(path: Path) -> Iterator[str]:
    """Names in the pickle of a zip archive. Raises UserError for archives that torch.save does not write."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickled = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickled) != 1 or any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise not_a_checkpoint(path, *filetype.archive(path))
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            unpacked = sum(entry.file_size for entry in entries)
            raise UserError(
                f"{path} ({path.stat().st_size} bytes) has compressed tensors ({unpacked} bytes), which torch.save "
                "does not write, so it was not loaded; ask its author for a .safetensors file"
            )
        with archive.open(pickled[0]) as file:
            yield from global_names(file)


def legacy_names(path: Path) -> Iterator[str]:
    """Names in the pickles of a file without a zip archive. Raises UserError for a file that is known not to be one."""
    with path.open("rb") as file:
        start = file.read(1)
        file.seek(0)
        if start != b"\x80":  # torch.save writes protocol 2 or later
            raise not_a_checkpoint(path, *filetype.describe(path))
        for _ in range(PICKLES):
            if not file.read(1):
                return
            file.seek(-1, 1)
            yield from global_names(file)


def global_names(file: IO[bytes]) -> Iterator[str]:
    """Names of everything that the next pickle imports; reads it without building an object.

    Raises ValueError for tuples of tuples that are stored once: hashing them would not end.
    """
    strings, stack, memo = ["", ""], list[int | None](), dict[Any, int | None]()
    for code, argument, _ in pickletools.genops(file):
        if track(code, argument, stack, memo) > ENTRIES:
            raise ValueError("tuples nested without end")
        if code.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
            yield f"{module}.{name}"
        elif code.name == "STACK_GLOBAL":
            yield ".".join(strings)
        elif isinstance(argument, str):
            strings = [strings[1], argument]


def track(code: pickletools.OpcodeInfo, argument: Any, stack: list[int | None], memo: dict[Any, int | None]) -> int:
    """Follow one operation: `stack` and `memo` hold the numbers of entries of tuples, 1 for others, None for a mark.

    Returns the number of entries on top.
    """
    before, items = code.stack_before, list[int]()
    if pickletools.markobject in before:
        while (item := stack.pop()) is not None:
            items.append(item)
    for _ in before[: before.index(pickletools.markobject)] if pickletools.markobject in before else before:
        items.append(stack.pop() or 0)
    if "PUT" in code.name:
        memo[argument] = stack[-1]
    elif "GET" in code.name:
        stack.append(memo[argument])
    elif code.name == "MARK":
        stack.append(None)
    elif "TUPLE" in code.name or code.name == "DUP":
        stack.extend([sum(items) + (code.name != "DUP")] * len(code.stack_after))
    else:
        stack.extend([1] * len(code.stack_after))
    return (stack[-1] or 0) if stack else 0


def check_nesting(path: Path, content: Any) -> None:
    """Raises UserError for lists and dicts of lists and dicts … that no program can walk through."""
    stack: list[tuple[Any, int]] = [([content], 0)]
    entries = 0
    while stack:
        node, depth = stack.pop()
        children = [*node, *node.values()] if isinstance(node, dict) else list(node)
        entries += 20 + len(children)  # visiting one takes as long as 20 entries
        if depth > DEPTH or entries > ENTRIES:
            raise UserError(f"{path} nests its entries without end, so it was not loaded; save a plain state dict")
        stack.extend((child, depth + 1) for child in children if isinstance(child, dict | list | tuple | set))


def check_sums(paths: Iterable[Path]) -> None:
    """Raises UserError for an archive whose checksums do not match its content; torch compares them with nothing."""
    for path in paths:
        try:
            if zipfile.is_zipfile(path):
                check_zip(path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{path} is damaged: its content does not match its checksum; {filetype.AGAIN}") from error


def check_memory(path: Path, tensors: Mapping[str, Tensor], nbytes: int) -> None:
    """Raises UserError for tensors (…) that are not plain ones, or that a file of `nbytes` cannot contain.

    A view of one number can have any shape, and copying it would fill the memory.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
            raise UserError(f"{name} of {path} is {kind}; save it dense")
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > SLACK + REPEATS * nbytes:
        raise UserError(
            f"{path} has {nbytes} bytes, but its tensors claim {total}: they repeat the same bytes, so it was not "
            "loaded; save contiguous copies of them"
        )


def refusal(path: Path, names: set[str]) -> UserError:
    """The error for names that are not loaded."""
    listed = ", ".join(name[:60] for name in sorted(names)[:3]) + (", …" if len(names) > 3 else "")
    return UserError(
        f"{path} contains pickled objects other than tensors ({listed!r}), which could run code, so it was not loaded; "
        "ask its author for a plain state dict or a .safetensors file"
    )


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that cannot be parsed."""
    kind, advice = filetype.describe(path)
    reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
    return not_a_checkpoint(path, kind, advice, reason)


def not_a_checkpoint(path: Path, kind: str, advice: str, reason: str = "its content is unknown") -> UserError:
    """The error for a file that is something else."""
    problem = f"it is {kind}" if kind else reason
    size = f"{path.stat().st_size} bytes"
    return UserError(f"{path} ({size}) is not a checkpoint, or an incomplete one: {problem}; {advice}")
