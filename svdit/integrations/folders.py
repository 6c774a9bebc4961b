"""A pipeline's folder: what model_index.json names, which files belong to a component, and copies of the others.

As diffusers writes it, or as Hugging Face caches it, with weights of a variant ("fp16") and in shards.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdit.checkpoints.folders import snapshot
from svdit.errors import UserError
from svdit.files import reading

INDEX = "model_index.json"
DEFAULTS = ("transformer", "unet")
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?P<before>\.[\w-]+?)?(-\d+-of-\d+)?(?P<after>\.\w+)?"
    r"\.(?P<kind>safetensors|bin)(\.index(?P<index>\.\w+)?\.json)?"
)
FICLONE = 0x40049409  # Linux: share the blocks of another file
OTHERS = (".msgpack", ".h5", ".onnx", ".onnx_data", ".xml")  # weights for other frameworks


@dataclass(frozen=True)
class PipelineFolder:
    """A folder, the class of its pipeline, and for each component its library and class."""

    path: Path
    kind: str
    components: dict[str, tuple[str, str]]

    @classmethod
    def at(cls, path: str | Path) -> "PipelineFolder":
        """The pipeline in a folder. Raises UserError where there is none."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; pass that of a pipeline, which contains {INDEX}")
        if (path / "snapshots").is_dir():
            path = snapshot(path)
        if not (path / INDEX).is_file():
            raise UserError(f"{path} has no {INDEX}; pass the folder of a whole pipeline, not of a component or a file")
        content = json_object(path / INDEX)
        kind = content.get("_class_name")
        if not isinstance(kind, str):
            raise UserError(
                f"{path / INDEX} has the class {kind!r}; pipelines with code of their own are not supported"
            )
        pairs = {name: value for name, value in content.items() if isinstance(value, list) and len(value) == 2}
        parts = {
            name: (pair[0], pair[1]) for name, pair in pairs.items() if all(isinstance(each, str) for each in pair)
        }
        return cls(path, kind, parts)

    def component(self, name: str | None) -> str:
        """The component called `name`, or for None the transformer or U-Net.

        Raises UserError for one that the pipeline does not have, that is no model of diffusers, or quantized.
        """
        usable = [
            each for each, (library, _) in self.components.items() if library == "diffusers" and self._model(each)
        ]
        chosen = name or next((each for each in DEFAULTS if each in usable), None)
        if chosen not in usable:
            what = f"no component {name!r} that is a model of diffusers" if name else "neither a transformer nor a unet"
            listed = ", ".join(usable) or "none"
            raise UserError(f"{self.path} ({self.kind}) has {what}; choose --component from {listed}")
        if method := (json_object(self.path / chosen / "config.json").get("quantization_config") or {}):
            named = method.get("quant_method") if isinstance(method, dict) else method
            raise UserError(f"{self.path / chosen} is already quantized ({named}); pass the pipeline in full precision")
        return chosen

    def _model(self, name: str) -> bool:
        return any(WEIGHTS.fullmatch(file.name) for file in files_in(self.path / name))

    def variant(self, name: str, requested: str | None = None) -> str | None:
        """The variant of a component's weights; None where they have none.

        Raises UserError for several, none of them requested, and for one that does not exist.
        """
        variants = {variant_of(file.name) for file in files_in(self.path / name) if WEIGHTS.fullmatch(file.name)}
        if requested is not None and requested not in variants:
            listed = ", ".join(sorted(filter(None, variants))) or "no variants"
            raise UserError(f"{self.path / name} has no variant {requested!r} but {listed}; pass another --variant")
        if requested is not None or None in variants:
            return requested
        if len(variants) > 1:
            listed = ", ".join(sorted(filter(None, variants)))
            raise UserError(f"{self.path / name} has the variants {listed}; pass one of them as --variant")
        return next(iter(variants), None)

    def weights(self, name: str, variant: str | None) -> list[Path]:
        """The files with the weights of a component, safetensors if there are any; indices of shards too."""
        found = {file: match for file in files_in(self.path / name) if (match := WEIGHTS.fullmatch(file.name))}
        own = [file for file in found if variant_of(file.name) == variant]
        kinds = {found[file]["kind"] for file in own}
        return [file for file in own if found[file]["kind"] == max(kinds, default="")]

    def copy(self, to: Path, but: str, variant: str | None) -> None:
        """Copy everything but the component `but` into the folder `to`; variants become the plain weights.

        Raises UserError for files that cannot be read or written.
        """
        copy(self.path / INDEX, to / INDEX)
        for name in self.components:
            if name == but or not (self.path / name).is_dir():
                continue
            variants = {variant_of(file.name) for file in files_in(self.path / name) if WEIGHTS.fullmatch(file.name)}
            own = variant if variant in variants else self.variant(name)
            weights = set(self.weights(name, own))
            for file in files_in(self.path / name):
                if file in weights:
                    copy_weights(file, to / name / plain(file.name, own), own)
                elif not WEIGHTS.fullmatch(file.name) and file.suffix not in OTHERS:
                    copy(file, to / name / file.relative_to(self.path / name))


def files_in(folder: Path) -> list[Path]:
    """The visible files of a folder and of the folders in it."""
    with reading(folder):
        return [path for path in sorted(walk(folder)) if not path.name.startswith(".")]


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, which may not exist."""
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def variant_of(name: str) -> str | None:
    """The variant of a file of weights: "fp16" for model.fp16-00001-of-00002.safetensors; None for plain weights."""
    match = WEIGHTS.fullmatch(name)
    found = match and (match["before"] or match["after"] or match["index"])
    return found[1:] if found else None


def plain(name: str, variant: str | None) -> str:
    """The name of a file of weights without its variant."""
    return name.replace(f".{variant}", "", 1) if variant else name


def copy_weights(file: Path, to: Path, variant: str | None) -> None:
    """Copy a file of weights; in an index the shards are renamed. Raises UserError for an index without shards."""
    if variant is None or file.suffix != ".json":
        return copy(file, to)
    content = json_object(file)
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{file} has no weight_map; download it again")
    content["weight_map"] = {key: plain(str(shard), variant) for key, shard in shards.items()}
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return None


def copy(file: Path, to: Path) -> None:
    """Copy a file, without using space where the file system shares blocks. A hard link would share later changes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with reading(file), file.open("rb") as source, to.open("wb") as target:
        try:
            fcntl.ioctl(target, FICLONE, source.fileno())
        except OSError:
            shutil.copyfileobj(source, target, 1 << 22)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises UserError for other content."""
    if not path.is_file():
        return {}
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({str(error)[:200]}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains no JSON object; download it again")
    return content
