"""Files that the system cannot read, on a network that is down for example, are not damaged: nothing is drawn again."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Means
from pixels import draw, interrupt_at

from svdit.errors import UserError
from svdit.evaluation.options import Options
from svdit.evaluation.stream import Stream
from svdit.sampling.sinks import Sink


def sink(form: str, folder: Path) -> str | Sink:
    """The sink of a form; that of features has real images beside the folder."""
    real = folder.with_name("real.npz")
    if form != "features":
        return form
    np.savez(real, arr_0=np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8))
    return Stream(real, Means(), Options(cache=None))


def disconnect(monkeypatch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """Let reading the file fail."""
    opened, read = Path.open, io.FileIO

    def fail(name: Any) -> None:
        if name == path:
            raise OSError(code, os.strerror(code), str(path))

    def open_path(self: Path, *args: Any, **options: Any) -> Any:
        fail(self)
        return opened(self, *args, **options)

    class Pieces(read):  # type: ignore[misc, valid-type]
        def __init__(self, name: Any) -> None:
            fail(name)
            super().__init__(name)

    monkeypatch.setattr(Path, "open", open_path)
    monkeypatch.setattr("svdit.storage.npz._Pieces", Pieces)


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize(
    ("form", "pattern", "images"),
    [
        ("png", "set/000003.png", 7),
        ("tar", "set/000000.tar", 7),
        ("tar", "set/.parts/*.tar", 6),
        ("npz", "set.npz", 7),
        ("npz", "set/.parts/*.tar", 6),
        ("features", "set/features/*.npz", 7),
    ],
)
def test_nothing_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, pattern: str, images: int, code: int
) -> None:
    folder = tmp_path / "set"
    if images == 7:
        draw(folder, sink=sink(form, folder))
    else:
        with pytest.raises(KeyboardInterrupt):
            draw(folder, sink=sink(form, folder), progress=interrupt_at(6.5))
    path, drawn = next(tmp_path.glob(pattern)), list[float]()
    with monkeypatch.context() as patch:
        disconnect(patch, path, code)
        with pytest.raises(UserError, match=f"cannot read {path} .*{os.strerror(code)}"):
            draw(folder, sink=sink(form, folder), progress=lambda done, total: drawn.append(done))
    assert not drawn
    draw(folder, sink=sink(form, folder), progress=lambda done, total: drawn.append(done))
    assert min(drawn, default=7) >= images
