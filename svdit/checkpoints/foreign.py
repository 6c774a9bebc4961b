"""Finds the weights of a DiT in what other tools save.

Training scripts nest the state dict ("ema", "state_dict", …) and wrappers lengthen every name ("module.",
"_orig_mod.", "model.", …), in any order. EMA weights are preferred, as the published scripts sample from them; of
several the first by name (JiT's `model_ema1`). An index of Hugging Face names the shard of each tensor.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from svdit.errors import UserError
from svdit.storage.pickles import Namespace, plain

# One name of each layout that every model of it has: the published one, JiT's, and diffusers'.
PUBLISHED = ("x_embedder.proj.weight", "x_embedder.proj1.weight")
ANCHORS = (*PUBLISHED, "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # anywhere in a name
MAX_JSON = 2**26  # bytes


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The DiT's tensors (…) in the content of a file, under names without prefixes.

    A flat dict of tensors without a DiT is returned unchanged. Raises UserError, listing the content, for others.
    """
    for nested in dicts(content, set()):
        if tensors := weights(nested):
            check_floats(tensors, path)
            return tensors
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    raise UserError(
        f"{path} contains no state dict of tensors of a DiT: it is {summary(content)}; pass a checkpoint of a DiT"
    )


def dicts(content: Any, seen: set[int]) -> Iterator[dict[Any, Any]]:
    """Every dict in nested dicts, from the outside in, each once; below keys with "ema" first."""
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    yield content
    for key in sorted(content, key=ema_first):
        yield from dicts(content[key], seen)


def ema_first(key: Any) -> tuple[bool, str]:
    """Sorts keys with "ema" to the front, by name; the others keep their order."""
    is_ema = "ema" in str(key).lower()
    return not is_ema, str(key) if is_ema else ""


def recorded(content: Any) -> dict[str, Any]:
    """What a training script saved beside the weights, numbers and texts by name.

    SiT, REPA and JiT save `args`, LightningDiT a nested `config`, and `svdit train` the `binding` of its run.
    """
    entries = content if isinstance(content, dict) else {}
    binding = plain(entries.get("binding"))
    settings = {"family": "dit", **binding} if binding else {}  # which earlier versions, with DiT only, do not record
    for nested in dicts(entries.get("config"), set()):
        settings |= plain(nested)
    args = entries.get("args")
    return {**settings, **(args.values if isinstance(args, Namespace) else {})}


def weights(content: dict[Any, Any]) -> dict[str, Tensor]:
    """The DiT's tensors (…) among the entries of one dict, without the prefix of their names; empty without a DiT."""
    named = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    tensors = {".".join(part for part in key.split(".") if part not in WRAPPERS): value for key, value in named.items()}
    prefixes = {name.removesuffix(anchor) for name in tensors for anchor in ANCHORS if name.endswith(anchor)}
    prefixes = {prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")}
    if not prefixes:
        return {}
    prefix = min(prefixes, key=lambda prefix: ("ema" not in prefix.lower(), len(prefix), prefix))
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def quantization(path: Path) -> Any:
    """The quantization_config in the config.json of diffusers beside a file of weights; None without one."""
    description = path.with_name("config.json")
    try:
        return json_object(description).get("quantization_config") if description.is_file() else None
    except (OSError, RecursionError, ValueError):
        return None


def check_floats(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises UserError for tensors (…) of integers: codes of another quantization. A batch norm counts in one."""
    method = quantization(path)
    if isinstance(method, dict) and method.get("quant_method") == "svdit":
        return
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise UserError(
                f"{path} has {name} as {tensor.dtype}, as other tools quantize; pass the full-precision checkpoint"
            )


def summary(content: Any) -> str:
    """What was found instead: the type, and for a dict its first keys with their types."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = [f"{str(key)[:40]!r} ({type(value).__name__})" for key, value in list(content.items())[:5]]
    return f"a dict of {len(content)} entries: {', '.join(keys)}{', …' if len(content) > 5 else ''}"


def is_index(path: Path) -> bool:
    """Whether the file is named like an index: NAME.safetensors.index.json, also with a variant before .json."""
    return ".index." in path.name and path.suffix == ".json"


def weight_map(path: Path) -> dict[str, str]:
    """The shard's file name for each tensor. Raises UserError for other JSON, and for files outside the folder."""
    try:
        files = {str(key): str(value) for key, value in json_object(path)["weight_map"].items()}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not an index of shards ({error}); download it again") from None
    for file in files.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{path} names the shard {file!r}, which is outside of its folder; download it again")
    return files


def shards(path: Path) -> list[Path]:
    """The files that an index names. Raises UserError for a missing one."""
    files = [path.with_name(name) for name in sorted(set(weight_map(path).values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} names the shard {file.name}, which is not there; download it into {path.parent}")
    return files


def joined(path: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """The tensors (…) of all shards of an index; `read` returns the content of one. Raises UserError for a gap."""
    contents = {shard.name: read(shard) for shard in shards(path)}
    tensors: dict[str, Tensor] = {}
    for name, shard in weight_map(path).items():
        content = contents[shard]
        if not (isinstance(content, dict) and isinstance(content.get(name), Tensor)):
            raise UserError(f"the shard {path.with_name(shard)} lacks {name!r}; download it again")
        tensors[name] = content[name]
    return tensors


def json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ValueError for other files and for those that are too large."""
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it is a JSON {type(content).__name__}")
    return content
