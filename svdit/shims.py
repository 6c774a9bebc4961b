"""What torch and torchvision import, and when.

torchvision on PyPI is built for CUDA. On a CPU build of torch its C++ library does not load, and registering the fake
kernel of `nms` then fails. Declaring the two operator schemas first is enough. The operators remain uncallable.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_library: torch.library.Library | None = None


def allow_cpu_torchvision() -> None:
    """Import torchvision if it is installed, with the schemas of `nms` and `qnms` declared where they are missing."""
    global _library
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        import torchvision  # noqa: F401


class WithoutNormal(TorchFunctionMode):
    """A context in which `normal_` changes nothing: on the meta device torch would import its compiler to compute it,
    which takes longer than importing all of torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns."""
        kwargs = kwargs or {}
        return [*args, *kwargs.values()][0] if func.__name__ == "normal_" else func(*args, **kwargs)
