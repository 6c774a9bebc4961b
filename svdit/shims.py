"""Lets torchvision's Python parts import on a CPU-only torch.

The torchvision on the package index is built for CUDA: on a CPU build of torch its C++ library does not load, and
registering fakes for `nms` then fails. Declaring the two schemas first is enough; the operators stay uncallable.
"""

import importlib.util

import torch

_library: torch.library.Library | None = None


def allow_cpu_torchvision() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` where torch is a CPU build; elsewhere do nothing."""
    global _library
    if _library or torch.version.cuda or torch.version.hip or not importlib.util.find_spec("torchvision"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
