"""The state of a training run, and the file it resumes from: `last.pt`.

Its checksums are compared before it is used. It needs no random state: every random draw is a function of the seed and
the number of the example.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdit.errors import UserError
from svdit.model.dit import DiT
from svdit.storage.states import cloned, read_state, write_state

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
    write_state(path, content)


def restore_(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Load the file into `state`, in place. Raises UserError for a damaged or foreign file, or other options."""
    content = read_state(path, CONTENT, "train", "choose another folder")
    for key, value in binding.items():
        if (before := content["binding"].get(key, value)) != value:  # earlier versions recorded less
            raise UserError(f"{path} was trained with {key} {before}, not {value}; use the same, or another folder")
    try:
        state.model.load_state_dict(content["model"])
        state.ema.load_state_dict(content["ema"])
        state.optimizer.load_state_dict(cloned(content["opt"]))  # it would keep tensors that map the file
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the model ({str(error).splitlines()[0]}); choose another folder"
        ) from None
    state.step, state.seconds = content["step"], content["seconds"]
