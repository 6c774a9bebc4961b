"""Class labels by number or name."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from svdit.errors import UserError, nearest
from svdit.model.dit import DiT

Labels = int | str | Iterable[int | str] | Tensor


def class_numbers(labels: Labels, model: DiT) -> list[int]:
    """The numbers of N classes, (N,), given by number or, where the model has names, by name; or of a single class.

    Raises UserError for no classes, and for one that the model does not have; its null class is none.
    """
    values = labels.tolist() if hasattr(labels, "tolist") else labels  # of tensors and arrays
    if isinstance(values, int | str):
        values = [values]
    if not isinstance(values, Iterable):
        raise UserError(f"labels is {labels!r}; pass a list of class numbers or names, [0, 1, 2] for example")
    plain = (label.item() if isinstance(label, np.generic | Tensor) and label.ndim == 0 else label for label in values)
    numbers = [_number(label, model) for label in plain]
    if not numbers:
        raise UserError("there are no labels; pass at least one class, [0, 1, 2] for example")
    return numbers


def _number(label: object, model: DiT) -> int:
    names, K = model.class_names, model.config.num_classes
    if isinstance(label, str):
        short = label and (label.lstrip("0") or "0")
        numbers = {name: i for i, name in enumerate(names)}
        number = numbers.get(label, numbers.get(short))  # a name comes before a number
        if number is None and short.isascii() and short.isdecimal() and len(short) < 10:
            number = int(short)
    else:
        number = label if type(label) is int else None
    if number is not None and 0 <= number < K:
        return number
    named = f", named {names[0]} … {names[-1]}" if names else ""
    shown = str(label) or "''"
    raise UserError(f"there is no class {shown}; this model has the classes 0 to {K - 1}{named}{nearest(label, names)}")
