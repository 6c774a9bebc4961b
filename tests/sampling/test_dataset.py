"""Data sets of images: the same for every batch size and world size, never partial, never mixed."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pixels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pixels import SEED, draw, interrupt_at
from worlds import in_world

from svdit import distributed, images
from svdit.distributed import rank
from svdit.errors import UserError
from svdit.model.autoencoder import PIXELS
from svdit.model.dit import DiT
from svdit.quant.config import QuantConfig, Rule, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate
from svdit.sampling import dataset
from svdit.sampling.dataset import LABEL_POLICIES, split

COUNT = 7
OLD_KEYS = {
    *("tool", "version", "model", "checkpoint", "checkpoint_sha256", "quantization", "precision", "image_size"),
    *("num_images", "num_classes", "label_policy", "labels", "seed", "sampler", "steps", "cfg_scale"),
    *("cfg_channels", "cfg_interval", "vae", "files"),
}
KEYS = OLD_KEYS | {
    *("family", "prediction", "time", "path", "noise_scale", "uint8", "latents", "protocol", "overrides", "reference"),
    *("time_shift", "sde_form", "sde_norm", "last_step", "last_step_size", "caching", "storage", "manifest_sha256"),
}


def arrays(npz: Path) -> np.ndarray:
    with np.load(npz) as archive:
        return archive["arr_0"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("reference") / "set", batch_size=COUNT)


def same_images(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to a float's last bits: no pixel is off by more than one grey level, and hardly any is."""
    off = np.abs(a.astype(int) - b.astype(int))
    return bool(off.max() <= 1 and (off > 0).mean() < 0.01)


def test_npz_holds_the_pngs_in_adms_layout(reference: Path) -> None:
    pixels = arrays(reference)
    assert pixels.shape == (COUNT, 8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.mean((pixels > 0) & (pixels < 255)) > 0.9, "clipping hides differences"
    files = images.list_images(reference.with_suffix(""))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.array_equal(pixels, np.stack([images.read_image(file) for file in files]))
    assert len({image.tobytes() for image in pixels}) == COUNT


def test_the_manifest_records_the_settings(reference: Path) -> None:
    manifest = json.loads((reference.with_suffix("") / "manifest.json").read_text())
    assert set(manifest) == KEYS
    assert manifest["labels"] == LABEL_POLICIES["random"](SEED, range(COUNT), 5)
    assert (manifest["image_size"], manifest["num_classes"], manifest["cfg_scale"]) == (8, 5, 1.5)


def test_the_precision_is_that_of_the_weights() -> None:
    settings = {"config": pixels.CONFIG, "count": 1, "seed": 0, "label_policy": "random"}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        manifest = dataset.describe(pixels.pixel_model().to(dtype), PIXELS, **settings)  # type: ignore[arg-type]
        assert manifest["precision"] == name


def test_three_processes_draw_what_one_does(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"

    def noted() -> dict[int, list[str]]:
        notes: dict[int, list[str]] = {}
        dataset.image_noise = pixels.noting(notes)  # type: ignore[assignment]
        draw(folder, batch_size=2)
        return notes

    notes = in_world(3, noted)
    drawn = sorted(i for note in notes for i in note)
    assert drawn == list(range(COUNT))  # none twice, none missing
    alone: dict[int, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "image_noise", pixels.noting(alone))
        draw(tmp_path / "alone", batch_size=4)
    assert {i: draws for note in notes for i, draws in note.items()} == alone  # bit for bit
    assert all(len(draws) == 5 for draws in alone.values())
    assert same_images(arrays(folder.with_suffix(".npz")), arrays(reference))


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slower_process_draws_less(
    reference: Path, tmp_path: Path, slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws its first batch as long as the others need for the rest; they wait for it, and not for a slow disk."""
    monkeypatch.setattr(distributed, "LATE", 0)
    folder, genuine = tmp_path / "set", dataset.generate_images

    def drawn() -> int:
        drawn = 0

        def generate_images(model: DiT, labels: Sequence[int], *rest: Any, **options: Any) -> images.Pixels:
            nonlocal drawn
            drawn += len(labels)
            while rank() == slow and len(list(folder.glob("*.png"))) < COUNT - 1:
                time.sleep(0.01)
            return genuine(model, labels, *rest, **options)

        dataset.generate_images = generate_images  # type: ignore[assignment]
        draw(folder, batch_size=1)
        return drawn

    counts = in_world(3, drawn)
    assert counts[slow] == 1
    assert sum(counts) == COUNT
    assert same_images(arrays(folder.with_suffix(".npz")), arrays(reference))


def test_processes_that_would_draw_other_images_are_refused(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            draw(tmp_path / "set", origin={"backend": ("cpu (avx512vnni)", "cpu (avx2)")[rank()]})
        return str(caught.value)

    sentence, other = in_world(2, refused)
    assert sentence == other
    assert sentence.startswith("process 1 has the backend 'cpu (avx2)', the first one 'cpu (avx512vnni)'; use the same")
    assert not (tmp_path / "set").exists()


def test_hosts_that_do_not_share_the_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            draw(tmp_path / str(rank()))
        return str(caught.value)

    monkeypatch.setattr(distributed, "LATE", 0)
    first, _ = in_world(2, refused)
    assert "manifest.json is not the same file on" in first


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_changes_no_image(reference: Path, tmp_path: Path, batch_size: int) -> None:
    assert same_images(arrays(draw(tmp_path / "set", batch_size=batch_size)), arrays(reference))


def test_another_seed_changes_every_image(reference: Path, tmp_path: Path) -> None:
    other = arrays(draw(tmp_path / "set", seed=12))
    assert not any(same_images(a, b) for a, b in zip(other, arrays(reference), strict=True))


def test_an_interrupted_run_resumes_and_keeps_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        draw(folder, progress=interrupt_at(4.5))
    assert len(images.list_images(folder)) == 3  # the batch that was finished
    assert not folder.with_suffix(".npz").exists()
    kept = np.zeros((8, 8, 3), np.uint8)
    images.write_png(folder / "000001.png", kept)  # overwritten if it were generated again
    calls: list[tuple[float, int]] = []
    resumed = arrays(draw(folder, progress=lambda done, total: calls.append((done, total))))
    assert np.array_equal(resumed[1], kept)
    assert calls[0] == (3.75, 7)
    assert calls[-1] == (7, 7)


def test_the_last_progress_counts_what_other_processes_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_process(seconds: float) -> None:
        tally.drawn.add(3)
        tally.ended.add(1)

    calls: list[float] = []
    tally = dataset._Tally(10, 4, lambda done, total: calls.append(done))
    monkeypatch.setattr("svdit.sampling.dataset.world_size", lambda: 2)
    monkeypatch.setattr(time, "sleep", other_process)
    tally.add(1)
    tally.wait()
    assert calls == [7, 7, 10]


def test_a_set_can_grow_but_not_shrink(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert len(arrays(draw(folder, count=4))) == 4
    assert same_images(arrays(draw(folder, origin={"checkpoint": "moved.pt"})), arrays(reference))
    with pytest.raises(UserError, match="a run of 7 images, not 4"):
        draw(folder, count=4)


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    before = draw(tmp_path / "set").stat()
    after = draw(tmp_path / "set").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 12}, "seed 11, not 12"),
        ({"label_policy": "balanced"}, "label_policy 'random', not 'balanced'"),
        ({"origin": {"checkpoint_sha256": "ab"}}, "checkpoint_sha256 '[0-9a-f]{64}', not 'ab'"),
        ({"origin": {"quantization": {"mode": "rtn"}}}, "quantization None, not \\{'mode': 'rtn'\\}"),
    ],
)
def test_another_runs_folder_is_refused(reference: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(reference.with_suffix(""), **change)


@pytest.mark.parametrize("fast", [False, True])
def test_images_of_another_model_are_not_taken_for_this_ones(fast: bool, tmp_path: Path) -> None:
    def model(change: float) -> DiT:
        made = pixels.pixel_model()
        made.final_layer.linear.bias.data.add_(change)
        quantize_(made, QuantConfig((Rule("*", recipe_for("rtn")),)))
        return accelerate(made) if fast else made

    for _ in range(2):
        dataset.generate_dataset(model(0), tmp_path / "set", 2, pixels.CONFIG, autoencoder=pixels.Squash())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="belongs to a run with checkpoint_sha256"):
        dataset.generate_dataset(model(1), tmp_path / "set", 2, pixels.CONFIG, autoencoder=pixels.Squash())  # type: ignore[arg-type]


def test_a_set_of_an_earlier_version_resumes(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(reference.with_suffix(""), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({name: manifest[name] for name in OLD_KEYS}))
    with pytest.raises(UserError, match="a run with family 'dit', not 'sit'"):
        draw(folder, origin={"family": "sit"})
    assert np.array_equal(arrays(draw(folder)), arrays(reference))
    assert json.loads((folder / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'"x"', b'{"num_images": "7"}', b"\xff", None])
def test_a_foreign_manifest_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "manifest.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="is not a manifest written by svdit"):
        draw(tmp_path)


def test_a_manifest_without_some_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"tool": "svdit", "num_images": 3}')
    with pytest.raises(UserError, match="belongs to a run with version None, not "):
        draw(tmp_path)


def test_a_changed_folder_is_refused(reference: Path, tmp_path: Path) -> None:
    """Images in sub-folders are found by whoever reads the set, so one that was moved there would count."""
    folder, npz = tmp_path / "set", tmp_path / "set.npz"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            draw(folder)
        shutil.rmtree(folder)
        shutil.copytree(reference.with_suffix(""), folder)
        npz.unlink(missing_ok=True)

    shutil.copytree(reference.with_suffix(""), folder)
    (folder / "good").mkdir()
    (folder / "000003.png").rename(folder / "good" / "000003.png")
    refused(r"contains good.000003\.png, which is not an image of this set; move it out")
    shutil.copy(folder / "000003.png", folder / "grid.png")
    refused(r"contains grid\.png, which is not an image of this set")
    (folder / "000003.png").unlink()
    (folder / "000003.png").mkdir()
    refused(r"000003\.png is a folder where a file belongs")
    npz.mkdir()
    with pytest.raises(UserError, match=r"set\.npz is a folder where a file belongs"):
        draw(folder)


def test_a_second_run_in_the_folder_is_refused_while_the_first_writes(reference: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second_run(done: float, total: int) -> None:
        for options in ({"seed": 12}, {"count": 2 * COUNT}):
            with pytest.raises(UserError, match=r"another process is writing .*set; wait for it to finish") as caught:
                draw(tmp_path / "set", **options)
            refused.append(str(caught.value))

    npz = draw(tmp_path / "set", progress=second_run)
    assert len(refused) > 2
    assert np.array_equal(arrays(npz), arrays(reference))
    assert len(images.list_images(tmp_path / "set")) == COUNT
    assert len(arrays(draw(tmp_path / "set", count=COUNT + 1))) == COUNT + 1


def damage(npz: Path, kind: str) -> None:
    """Leave an .npz as killed, faulty and concurrent runs did."""
    content = bytearray(npz.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    npz.write_bytes(content[:2] if kind == "two bytes" else content[:-100] if kind == "truncated" else content)
    if kind in ("fewer", "other type", "other size"):
        array = arrays(npz)
        changed = {"fewer": array[:4], "other type": array.astype(np.float32), "other size": array[:, :4, :4]}
        np.savez(npz, arr_0=changed[kind])


@pytest.mark.parametrize("kind", ["two bytes", "truncated", "flipped", "fewer", "other type", "other size"])
def test_an_incomplete_npz_is_written_again(
    reference: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reference.with_suffix(""), tmp_path / "set")
    shutil.copy(reference, tmp_path / "set.npz")
    damage(tmp_path / "set.npz", kind)
    assert np.array_equal(arrays(draw(tmp_path / "set")), arrays(reference))
    message = "" if kind == "fewer" else f"warning: {tmp_path}/set.npz is damaged and is written again\n"
    assert capsys.readouterr().err == message


def test_damaged_images_are_generated_again(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(reference.with_suffix(""), folder)
    (folder / "000001.png").write_text("no image")
    (folder / "000002.png").write_bytes(b"")
    images.write_png(folder / "000003.png", np.zeros((9, 9, 3), np.uint8))
    content = bytearray((folder / "000004.png").read_bytes())
    content[60] ^= 4
    (folder / "000004.png").write_bytes(content)
    assert same_images(arrays(draw(folder)), arrays(reference))
    assert "4 images in" in (message := capsys.readouterr().err)
    assert "are damaged and are generated again (first: 000001.png)" in message


def test_foreign_images_are_refused(tmp_path: Path) -> None:
    images.write_png(tmp_path / "cat.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"contains cat\.png but no manifest\.json"):
        draw(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into the folder .*file"):
        draw(tmp_path / "file" / "set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "the number of images is 0"),
        ({"batch_size": 0}, "the batch size is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"label_policy": "odd"}, "no label policy 'odd'; choose one of random, balanced"),
    ],
)
def test_invalid_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 9))
def test_batches_share_the_images_evenly(images: int, batch_size: int, processes: int) -> None:
    batches = list(split(range(images), batch_size, processes))
    assert [i for batch in batches for i in batch] == list(range(images))
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len(batch) >= batch_size // 4 for batch in batches[:-1])
    if images >= processes * batch_size:
        assert all(len(batch) == batch_size for batch in batches[: images // batch_size - processes])
    if batches:
        assert len(batches[-1]) <= max(1, batch_size // 4) or processes == 1


def test_balanced_labels_repeat_in_order() -> None:
    assert LABEL_POLICIES["balanced"](3, range(7), 3) == [0, 1, 2, 0, 1, 2, 0]
