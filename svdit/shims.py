"""Lets torchvision's Python modules import on a CPU build of torch.

torchvision on PyPI is built for CUDA. On a CPU build of torch its C++ library does not load, and registering the fake
kernel of `nms` then fails. Declaring the two operator schemas first is enough. The operators remain uncallable.
"""

import sys
from importlib.util import find_spec

import torch

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
