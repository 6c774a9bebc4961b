"""Files that an interrupted run resumes from, written by torch.save; checksums are compared before one is used."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdit.errors import UnreadableError, UserError
from svdit.files import atomic_path, check_zip, reading
from svdit.storage import pickles


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def read_state(path: Path, kinds: Mapping[str, type], writer: str, advice: str) -> dict[str, Any]:
    """The entries of these types that `writer` wrote; tensors map the file.

    Raises UserError, with the advice, for damaged and for other files.
    """
    try:
        with reading(path):
            content = pickles.load(path)
            check_zip(path)  # torch does not compare them
    except UnreadableError:
        raise
    except (UserError, zipfile.BadZipFile) as error:
        reason = str(error).rpartition("; ")[0] or f"{path} is damaged: {error}"
        raise UserError(f"{reason}; move it away to start again, or {advice}") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} was not written by `svdit {writer}`; {advice}")
    return content


def cloned(tree: Any) -> Any:
    """Nested dicts whose tensors do not map a file."""
    if isinstance(tree, dict):
        return {key: cloned(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree
