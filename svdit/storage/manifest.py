"""`manifest.json` of a folder of generated images: the settings that produced them, with a checksum."""

import json
from pathlib import Path
from typing import Any

from svdit.errors import UserError
from svdit.files import atomic_path, reading
from svdit.storage.checksum import digest

CHECKSUM = "manifest_sha256"
MARKS = (b'"tool": "svdit"', CHECKSUM.encode())  # a damaged file has one of them
TYPES: dict[str, type | list[type]] = {
    "storage": str,
    "num_images": int,
    "seed": int,
    "image_size": int,
    "num_classes": int,
    "labels": [int],
    "files": [str],
}
EARLIER: dict[str, Any] = {  # fields that earlier versions did not record, with the only values they had
    "storage": "png",
    "family": "dit",
    "prediction": "epsilon",
    "time": "timesteps",
    "path": "ddpm",
    "noise_scale": 1.0,
    "uint8": "half_up",
    "latents": None,
    "time_shift": 1.0,
    "sde_form": "sigma",
    "sde_norm": 1.0,
    "last_step": "mean",
    "last_step_size": 0.04,
    "caching": None,
    "protocol": None,
    "overrides": None,
    "reference": None,
}


def write_manifest(path: Path, fields: dict[str, Any]) -> None:
    """Write one field per line, and the checksum."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in {**fields, CHECKSUM: digest(fields, {})}.items()
    )
    with atomic_path(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The fields; None for files that svdit did not write. Raises UserError for a manifest that was changed.

    Those of earlier versions have no checksum, and lack the fields `EARLIER`.
    """
    if not path.is_file():
        return None
    try:
        with reading(path):
            content = path.read_bytes()
        if not any(mark in content for mark in MARKS):
            return None
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.pop(CHECKSUM, None) not in (None, digest(fields, {})):
        raise UserError(f"{path} does not match its checksum; restore it, or generate the images again")
    for key, kind in TYPES.items():
        if fields.get(key) is not None and not _has_type(fields[key], kind):
            raise UserError(f"{key} in {path} is not {_name(kind)}; restore it, or generate the images again")
    return {**EARLIER, **fields}


def _has_type(value: object, kind: type | list[type]) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(item) is kind[0] for item in value)
    return type(value) is kind


def _name(kind: type | list[type]) -> str:
    return f"a list of {kind[0].__name__}" if isinstance(kind, list) else f"one {kind.__name__}"
