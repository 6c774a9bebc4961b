"""The checksum of tensors and of the header stored with them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the header without its `sha256`, then over the tensors (…) sorted by name."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
