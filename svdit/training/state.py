"""The state of a training run, and the file it resumes from: `last.pt`.

Its checksums are compared before it is used. It needs no random state: every random draw is a function of the seed and
the number of the example.
"""

import copy
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdit.errors import UnreadableError, UserError
from svdit.files import atomic_path, check_zip, reading
from svdit.model.dit import DiT
from svdit.storage import pickles

CONTENT = {"model": dict, "ema": dict, "opt": dict, "step": int, "seconds": float, "binding": dict}


@dataclass
class State:
    """`step` counts finished training steps, `seconds` their time."""

    model: DiT
    ema: DiT
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def fresh(model: DiT, lr: float) -> State:
    """The state of a new run with `model`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    return State(model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)


def save(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Write the file whole or not at all; `binding`: the options a resumed run must share."""
    content = {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "opt": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "binding": binding,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def restore_(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Load the file into `state`, in place. Raises UserError for a damaged or foreign file, or other options."""
    content = _read(path)
    for key, value in binding.items():
        if (before := content["binding"].get(key, value)) != value:  # earlier versions recorded less
            raise UserError(f"{path} was trained with {key} {before}, not {value}; use the same, or another folder")
    try:
        state.model.load_state_dict(content["model"])
        state.ema.load_state_dict(content["ema"])
        state.optimizer.load_state_dict(_cloned(content["opt"]))  # it would keep tensors that map the file
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the model ({str(error).splitlines()[0]}); choose another folder"
        ) from None
    state.step, state.seconds = content["step"], content["seconds"]


def _cloned(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _cloned(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def _read(path: Path) -> dict[str, Any]:
    """The content, whose checksums match. Raises UserError for other files."""
    try:
        with reading(path):
            content = pickles.load(path)
            check_zip(path)  # torch does not compare them
    except UnreadableError:
        raise
    except (UserError, zipfile.BadZipFile) as error:
        reason = str(error).rpartition("; ")[0] or f"{path} is damaged: {error}"
        raise UserError(f"{reason}; move it away to start again, or choose another folder") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in CONTENT.items()):
        raise UserError(f"{path} was not written by `svdit train`; choose another folder")
    return content
