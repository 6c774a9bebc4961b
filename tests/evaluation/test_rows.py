"""Rows of several processes in one file: whatever order they come in, and none of another's."""

from pathlib import Path

import numpy as np
import pytest
from worlds import in_world

from svdit.distributed import rank, world_size
from svdit.errors import UserError
from svdit.evaluation.rows import RowFiles


@pytest.mark.parametrize("world", [1, 3])
def test_every_process_writes_its_own(tmp_path: Path, world: int):
    expected = {"a": np.random.rand(40, 7).astype(np.float32), "b": np.random.rand(40, 1).astype(np.float32)}
    tmp_path.joinpath("f").mkdir()

    def run() -> dict[str, np.ndarray]:
        files = RowFiles(tmp_path / "f", {layer: rows.shape for layer, rows in expected.items()})
        mine = np.random.RandomState(rank()).permutation(np.arange(rank(), 40, world_size()))
        for places in (mine[:5], np.sort(mine[5:])):
            for layer, rows in expected.items():
                files.write(layer, places, rows[places])
        return files.read()

    for read in in_world(world, run):
        for layer, rows in expected.items():
            np.testing.assert_array_equal(read[layer], rows)
            np.testing.assert_array_equal(np.load(tmp_path / "f" / f"{layer}.npy"), rows)


def test_writing_touches_no_byte_of_other_rows(tmp_path: Path):
    """As on NFS, where a page that a host maps comes back whole: what another process writes meanwhile stays."""
    files = RowFiles(tmp_path, {"a": (4, 3)})
    with (tmp_path / "a.npy").open("r+b") as file:
        file.seek(-12, 2)
        file.write(np.full(3, 9, np.float32).tobytes())
    files.write("a", np.array([0, 2]), np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(files.read()["a"][:, 0], [1, 0, 1, 9])


def test_files_are_made_where_the_system_cannot_reserve_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """macOS has no posix_fallocate."""
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    files = RowFiles(tmp_path, {"a": (3, 2)})
    files.write("a", np.array([2]), np.ones((1, 2), np.float32))
    assert files.read()["a"].sum() == 2


def test_hosts_without_a_common_folder_are_a_sentence(tmp_path: Path):
    def run() -> None:
        folder = tmp_path / str(rank())
        folder.mkdir()
        if rank():
            with pytest.raises(UserError, match=r"not the same folder on all hosts; pass as --cache-dir one"):
                RowFiles(folder, {"a": (4, 3)})
        else:
            RowFiles(folder, {"a": (4, 3)})

    in_world(2, run)
