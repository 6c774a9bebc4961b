"""Lets torchvision's Python parts import on a CPU-only torch.

The torchvision on the package index is built for CUDA: on a CPU build of torch its C++ library does not load, and
registering fakes for `nms` then fails. Declaring the two schemas first is enough; the operators stay uncallable.
"""

import sys

import torch

_library: torch.library.Library | None = None


def allow_cpu_torchvision() -> None:
    """Import torchvision; where its operators are missing, declare `nms` and `qnms` first. Safe to call twice."""
    global _library
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        import torchvision  # noqa: F401
