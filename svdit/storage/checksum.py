"""The checksum of tensors and of the header stored with them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from svdit.storage import ahead


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the header without its `sha256`, then over the tensors (…) sorted by name."""
    return digest_of(content(header, tensors))


def content(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """What `digest` covers, with tensors (…) as views, so that another thread can hash it without torch."""
    parts: list[bytes | memoryview] = [ahead.rest(header)]
    for name, tensor in sorted(tensors.items()):
        parts.append(ahead.entry(name, str(tensor.dtype), list(tensor.shape)))
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return parts


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """Hex SHA-256 of bytes in turn."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
