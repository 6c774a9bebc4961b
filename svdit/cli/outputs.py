"""Outputs that do not harm inputs: checked before any work, under every name that a file has."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.errors import UserError

if TYPE_CHECKING:
    import torch


def output_file(path: Path, *suffixes: str) -> None:
    """Create the folder of an output file.

    Raises UserError if it cannot be written, has none of the suffixes, or lies among images.
    """
    from svdit.files import writable_folder

    if path.suffix not in suffixes:
        raise UserError(f"--output is {path}; choose a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"--output is {path}, which is a folder; choose the name of a file")
    check_outside("--output", path)
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
