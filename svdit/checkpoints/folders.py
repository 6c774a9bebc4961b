"""Finds the checkpoint in a folder.

Of diffusers (a model, or a pipeline with its `transformer/`), of Hugging Face's cache, the results of `svdit train`,
or any folder with one checkpoint.
"""

import json
import re
from pathlib import Path

from svdit.checkpoints import foreign, statistics
from svdit.errors import UserError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DIFFUSERS = "diffusion_pytorch_model"
DIT = "DiTTransformer2DModel"
PREFERRED = (
    *(f"{DIFFUSERS}{kind}" for kind in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")),
    "ema.safetensors",  # beside last.pt of `svdit train`
)
NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "random_states", "rng_state")  # of accelerate and transformers


def in_folder(folder: Path) -> Path:
    """The checkpoint in a folder. Raises UserError for none, several, and pipelines of other models."""
    if (folder / "snapshots").is_dir():
        return in_folder(snapshot(folder))
    check_pipeline(folder)
    files = candidates(folder)
    if not files and (folder / "transformer").is_dir():
        return in_folder(folder / "transformer")
    for name in PREFERRED:
        if folder / name in files:
            return folder / name
    if len(files) == 1:
        return files[0]
    listed = ", ".join(repr(file.name) for file in files[:5]) + (", …" if len(files) > 5 else "")
    if files and all(re.search(r"-\d+-of-\d+\.", file.name) for file in files):
        raise UserError(f"the folder {folder} has shards without their index ({listed}); download the .index.json too")
    if files:
        raise UserError(f"the folder {folder} has {len(files)} checkpoints ({listed}); pass one of them")
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    listed = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
    content = f"the folder {folder} has no {DIFFUSERS}.safetensors or other checkpoint, only {listed}"
    raise UserError(f"{content if names else f'the folder {folder} is empty'}; pass a file")


def check_pipeline(folder: Path) -> None:
    """Raises UserError for a folder with another pipeline than a DiT's."""
    index = folder / "model_index.json"
    name = class_of(index)
    if name not in ("", "DiTPipeline") and DIT not in json.dumps(foreign.json_object(index).get("transformer")):
        raise UserError(f"{folder} is a {name} of diffusers, which has no {DIT}; pass a DiT")


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder: neither shards of an index, nor .bin files that also exist as .safetensors."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if (file.suffix in SUFFIXES or foreign.is_index(file))
        and not file.is_dir()
        and not file.name.startswith((".", *NO_WEIGHTS))
        and not statistics.FILE.fullmatch(file.name)
    ]
    parts = {shard for file in files if foreign.is_index(file) for shard in foreign.weight_map(file).values()}
    whole = [file for file in files if file.name not in parts]
    return [file for file in whole if file.suffix != ".bin" or file.with_suffix(".safetensors") not in whole]


def snapshot(folder: Path) -> Path:
    """The snapshot of a repository in Hugging Face's cache: that of refs/main, or the only one.

    Raises UserError where there are several.
    """
    main, snapshots = folder / "refs" / "main", sorted((folder / "snapshots").iterdir())
    name = main.read_text(encoding="utf-8").strip() if main.is_file() and main.stat().st_size < 200 else ""
    chosen = [path for path in snapshots if path.name == name] or snapshots
    if len(chosen) != 1:
        raise UserError(f"{folder / 'snapshots'} has {len(chosen)} snapshots; pass the folder of one of them")
    return chosen[0]


def vae_beside(path: Path) -> Path | None:
    """The folder of the autoencoder in the pipeline that a checkpoint belongs to; None without one."""
    vae = path.parent.parent / "vae"
    return vae if path.parent.name == "transformer" and (vae / "config.json").is_file() else None


def class_of(config: Path) -> str:
    """The class that a file config.json or model_index.json names; empty if there is none."""
    try:
        content = foreign.json_object(config) if config.is_file() else {}
    except (OSError, RecursionError, ValueError):
        return ""
    named = content.get("_class_name") or content.get("architectures") or ""  # a list, of transformers
    return str(named[0] if isinstance(named, list) else named)[:60]
