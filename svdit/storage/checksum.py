"""The checksum of tensors and of the header stored with them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the header without its `sha256`, then over the tensors (…) sorted by name."""
    return digest_of(content(header, tensors))


def content(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """What `digest` covers, with tensors (…) as views, so that another thread can hash it without torch."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    parts: list[bytes | memoryview] = [json.dumps(rest, sort_keys=True).encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return parts


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """Hex SHA-256 of bytes in turn."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
