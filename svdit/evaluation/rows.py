"""Rows of features in one .npy per layer, which all processes write, on any number of hosts.

They are written as bytes and mapped only when they are complete: a host that maps a file on NFS writes whole pages
back, with what it knows of the rows of other hosts in them.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svdit.distributed import barrier, rank
from svdit.errors import UserError

Rows = npt.NDArray[np.float32]


class RowFiles:
    """The files FOLDER/LAYER.npy, float32 (N, D) each. Every process makes one object, writes, and reads."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
        """The first process creates the files, of `shapes` (N, D) by layer. Raises UserError where others lack them."""
        self.paths = {layer: folder / f"{layer}.npy" for layer in shapes}
        if rank() == 0:
            for layer, shape in shapes.items():
                np.lib.format.open_memmap(self.paths[layer], "w+", np.float32, shape).flush()
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    with self.paths[layer].open("r+b") as file:  # fails now where the disk is full
                        os.posix_fallocate(file.fileno(), 0, self.paths[layer].stat().st_size)
        barrier()
        try:
            self.files = {layer: path.open("r+b") for layer, path in self.paths.items()}
        except FileNotFoundError:
            message = f"{folder} is not the same folder on all hosts; pass as --cache-dir one that they share"
            raise UserError(message) from None
        self.starts = {layer: self.paths[layer].stat().st_size - 4 * N * D for layer, (N, D) in shapes.items()}

    def write(self, layer: str, places: npt.NDArray[np.int64], rows: Rows) -> None:
        """Store rows (n, D) of a layer at their places (n,)."""
        ends = np.flatnonzero(np.diff(places) != 1) + 1
        for part, values in zip(np.split(places, ends), np.split(rows, ends), strict=True):
            self.files[layer].seek(self.starts[layer] + int(part[0]) * rows.shape[1] * 4)
            self.files[layer].write(np.ascontiguousarray(values, np.float32).data)

    def read(self) -> dict[str, Rows]:
        """All rows by layer, mapped, when every process has written its own."""
        for file in self.files.values():
            file.close()
        barrier()
        return {layer: np.load(path, mmap_mode="c") for layer, path in self.paths.items()}
