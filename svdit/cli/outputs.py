"""Outputs that harm neither inputs nor older outputs: checked before any work, under every name that a file has.

A file that --output names is replaced; one of the default name only with --overwrite.
"""

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.cli.arguments import output
from svdit.errors import UserError

if TYPE_CHECKING:
    import torch


def add_output(parser: argparse.ArgumentParser, default: str, help: str = "", **options: Any) -> None:
    """--output with a default name, and --overwrite"""
    unnamed = Path(default)
    add = parser.add_argument
    add("--output", type=output, default=unnamed, help=f"{help}default: %(default)s", **options)
    add("--overwrite", action="store_true", help=f"replace {default} if there is no --output")
    parser.set_defaults(unnamed=unnamed)


def output_file(args: argparse.Namespace, *suffixes: str, beside: Sequence[str] = ()) -> None:
    """Create the folder of --output, which is a file; `beside`: suffixes of what is written with it.

    Raises UserError if it cannot be written, has none of the suffixes, lies among images, or would replace a file or
    folder by the default name.
    """
    from svdit.files import writable_folder

    path: Path = args.output
    if path.suffix not in suffixes:
        raise UserError(f"--output is {path}; choose a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"--output is {path}, which is a folder; choose the name of a file")
    check_outside("--output", path)
    if path is vars(args).get("unnamed") and not args.overwrite:
        for place in (path, *map(path.with_suffix, beside)):
            if place.exists():
                raise UserError(f"{place} exists; pass --output with another name, or --overwrite to replace it")
    writable_folder(path.parent)


def check_distinct(option: str, path: Path, *inputs: str | Path) -> None:
    """Raises UserError where `option`'s file is one of the inputs, through links as well."""
    for each in map(Path, inputs):
        if path.resolve() == each.resolve() or (path.exists() and each.exists() and path.samefile(each)):
            raise UserError(f"{option} is {path}, which is also the input {each}; choose another name")


def with_links(folder: Path) -> list[Path]:
    """The folder and the links in it, as to folders of classes."""
    return [folder, *(path for path in folder.iterdir() if path.is_symlink())] if folder.is_dir() else [folder]


def check_outside(option: str, path: Path, *inputs: str | Path, itself: bool = True) -> None:
    """Raises UserError for an output in a folder of inputs or of generated images, which would become one of them.

    `itself`: also where the output is that folder.
    """
    from svdit.storage.manifest import read_manifest

    place, folders = path.resolve(), [folder.resolve() for each in inputs for folder in with_links(Path(each))]
    for folder in (place, *place.parents) if itself else place.parents:
        if folder.is_dir() and (folder in folders or read_manifest(folder / "manifest.json")):
            raise UserError(f"{option} is {path}, inside the images of {folder}; choose a folder outside of it")


def circumstances(command_line: str, device: "torch.device") -> dict[str, str]:
    """What a report records of its run: the command, the day, the versions, and the processor or the GPU."""
    import torch

    from svdit import __version__

    versions = f"svdit {__version__}, torch {torch.__version__}"
    day = date.today().isoformat()
    return {"command": command_line, "date": day, "versions": versions, "machine": machine(device)}


def machine(device: "torch.device") -> str:
    """The GPU, or the processor and the number of threads."""
    import torch

    from svdit.kernels.cpu.features import processor

    threads = torch.get_num_threads()
    on_cpu = f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
