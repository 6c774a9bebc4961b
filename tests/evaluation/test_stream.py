"""Stream: the report of `evaluate` without the images, however they are batched, interrupted, or shared."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_distributed import in_world

from svdit import distributed
from svdit.distributed import barrier, claimed, on_first
from svdit.errors import UserError
from svdit.evaluation.compare import compare
from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.features import NotFiniteError
from svdit.evaluation.inception import Extractor
from svdit.evaluation.inputs import SAME_NOISE
from svdit.evaluation.metrics import METRICS
from svdit.evaluation.options import Options
from svdit.evaluation.report import Report
from svdit.evaluation.stream import Stream

from .conftest import Overflowing, TinyNetwork, make_images, write_folder

COUNT, BATCH = 26, 8
IMAGES = make_images(COUNT, noise=30)
OPTIONS = Options(batch_size=BATCH)


def manifest(count: int = COUNT) -> dict[str, Any]:
    """As `generate_dataset` passes it."""
    fields: dict[str, Any] = dict.fromkeys(SAME_NOISE)
    fields |= {"seed": 7, "steps": "20", "cfg_interval": (0, 9), "image_size": IMAGES.shape[1], "num_images": count}
    files = [f"{i:06d}.png" for i in range(count)]
    return fields | {"tool": "svdit", "labels": [i % 3 for i in range(count)], "files": files}


def stored(folder: Path, images: np.ndarray = IMAGES) -> Path:
    """The images as `generate_dataset` stores them."""
    write_folder(folder, images)
    (folder / "manifest.json").write_text(json.dumps(manifest(len(images))))
    return folder


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "real", make_images(30, seed=1))


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return stored(tmp_path / "full", make_images(COUNT))


def batches(indices: Sequence[int], size: int = BATCH) -> list[Sequence[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def sample(
    sink: Stream, folder: Path, images: np.ndarray = IMAGES, size: int = BATCH, until: int | None = None
) -> Report:
    """As `generate_dataset`, with the images at hand; stops before batch `until`."""
    sink.open(folder, manifest(len(images)))
    folder.mkdir(exist_ok=True)
    shares = batches(on_first(sink.missing), size)
    for k in claimed(len(shares)):
        if k == until:
            raise KeyboardInterrupt
        sink.write(shares[k], images[list(shares[k])])
    barrier()
    return sink.finish()


def comparable(report: Report) -> dict[str, Any]:
    """What must be equal, of a stream and of files."""
    content = json.loads(json.dumps(report.to_json()))
    for name in ("path", "kind", "sha256"):
        del content["inputs"]["fake"][name]
    del content["seconds"]
    return content


@pytest.mark.parametrize("metrics", [None, *((name,) for name in METRICS if name != "lpips")])
def test_the_report_is_that_of_the_same_images_in_files(
    tmp_path: Path, real: Path, full: Path, metrics: tuple[str, ...] | None
) -> None:
    counterparts = full if metrics in (None, ("paired",)) else None
    options = replace(OPTIONS, metrics=metrics, paired=counterparts)
    through_files = evaluate(real, stored(tmp_path / "files"), TinyNetwork(), options)
    streamed = sample(Stream(real, TinyNetwork(), options), tmp_path / "set")
    assert comparable(streamed) == comparable(through_files)
    assert streamed.metrics == through_files.metrics
    assert streamed.inputs["fake"]["kind"] == "features"
    assert streamed.failed == through_files.failed == (("fid_inf",) if metrics == ("fid_inf",) else ())
    assert np.array_equal(streamed.images["grid_fake"], through_files.images["grid_fake"])


def test_the_report_of_inception_is_bit_equal_in_equal_batches(tmp_path: Path, random_network: Extractor) -> None:
    images, real = IMAGES[:5], write_folder(tmp_path / "real", make_images(3, seed=1))
    options = Options(("fid", "is"), batch_size=3, cache=tmp_path / "cache")
    through_files = evaluate(real, stored(tmp_path / "files", images), random_network, options)
    streamed = sample(Stream(real, random_network, options), tmp_path / "set", images, size=3)
    assert comparable(streamed) == comparable(through_files)
    assert next(iter(streamed.metrics)) == "random_fid"
    assert np.array_equal(streamed.images["grid_fake"], through_files.images["grid_fake"])  # with its caption


def test_the_folder_has_results_that_compare_reads(tmp_path: Path, real: Path) -> None:
    for name, images in (("a", IMAGES), ("b", make_images(COUNT))):
        sample(Stream(real, TinyNetwork(), OPTIONS), tmp_path / name, images)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "features", "metrics.json", "metrics.md", "grid_fake.png",
    }  # fmt: skip
    assert "paired by seed" in compare([tmp_path / "a", tmp_path / "b"])


def test_images_of_the_same_noise_are_counterparts(tmp_path: Path, full: Path) -> None:
    report = sample(Stream(full, TinyNetwork(), OPTIONS), tmp_path / "set", make_images(COUNT))
    assert report.metrics["identical_pairs"].value == COUNT
    assert report.protocol["counterparts_sha256"] == report.protocol["reference_sha256"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(COUNT)), st.integers(1, COUNT))
def test_batches_do_not_change_the_report(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], size: int
) -> None:
    """Nor does their order: sums are over rows in the order of the index."""
    folder = tmp_path_factory.mktemp("batches")
    real = write_folder(folder / "real", make_images(8, seed=1))
    sink = Stream(real, TinyNetwork(), replace(OPTIONS, metrics=("fid", "is")))
    reports = []
    for name, share in (("a", batches(order, size)), ("b", batches(range(COUNT)))):
        sink.open(folder / name, manifest())
        for indices in share:
            sink.write(indices, IMAGES[indices])
        reports.append(sink.finish())
    assert reports[0].metrics == reports[1].metrics


@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree_with_one(tmp_path: Path, real: Path, full: Path, world: int) -> None:
    """The float64 sums of 26 rows in another order: each is off by at most 26 ε of the sum of the absolute values."""
    names = tuple(name for name in METRICS if name not in ("fid_inf", "lpips"))
    options = replace(OPTIONS, metrics=names, paired=full)
    alone = sample(Stream(real, TinyNetwork(), options), tmp_path / "alone")

    def together() -> tuple[Report, int]:
        network = TinyNetwork()
        return sample(Stream(real, network, options), tmp_path / "set", size=3), network.seen

    results = in_world(world, together)
    assert sum(seen for _, seen in results) == 30 + COUNT  # every image once
    for report, _ in results:
        assert report.inputs["fake"]["sha256"] == alone.inputs["fake"]["sha256"]
        for name, estimate in alone.metrics.items():
            assert report.metrics[name].value == pytest.approx(estimate.value, rel=1e-9), name
            assert report.metrics[name].leave_out == pytest.approx(estimate.leave_out, rel=1e-9), name


def test_an_interrupted_run_computes_no_batch_twice(tmp_path: Path, real: Path, full: Path) -> None:
    options, network = replace(OPTIONS, paired=full, cache=tmp_path / "cache"), TinyNetwork()
    with pytest.raises(KeyboardInterrupt):
        sample(Stream(real, network, options), tmp_path / "set", until=2)
    assert network.seen == 30 + 2 * BATCH
    resumed = sample(Stream(real, network, options), tmp_path / "set", size=3)
    assert network.seen == 30 + COUNT
    assert resumed.metrics == sample(Stream(real, TinyNetwork(), options), tmp_path / "alone").metrics
    again = sample(Stream(real, network, options), tmp_path / "set")
    assert network.seen == 30 + COUNT  # a finished run is evaluated from what is stored
    assert comparable(again) == comparable(resumed)


def test_damaged_features_are_computed_again(tmp_path: Path, real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = sample(Stream(real, TinyNetwork(), OPTIONS), tmp_path / "set")
    damaged = sorted((tmp_path / "set" / "features").iterdir())[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    network = TinyNetwork()
    again = sample(Stream(real, network, OPTIONS), tmp_path / "set", size=3)
    assert network.seen == 30 + BATCH
    assert again.metrics == first.metrics
    assert capsys.readouterr().err.count(f"{damaged} is damaged; its images are generated again") == 1


def test_features_that_are_gone_are_missed(tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "LATE", 0)
    sink = Stream(real, TinyNetwork(), OPTIONS)
    sink.open(tmp_path / "set", manifest())
    sink.write(range(BATCH), IMAGES[:BATCH])
    with pytest.raises(UserError, match="lacks 18 images that were sampled; run the same command again"):
        sink.finish()
    assert not (tmp_path / "set" / "metrics.json").exists()


def test_a_set_can_grow(tmp_path: Path, real: Path, full: Path) -> None:
    """Also with counterparts, of which there are more already; 64 of 70 images are shown, all of 26 were."""
    images, network, options = make_images(70, noise=30), TinyNetwork(), replace(OPTIONS, paired=tmp_path / "more")
    write_folder(tmp_path / "more", make_images(70))
    sample(Stream(real, network, options), tmp_path / "set", images[:COUNT])
    grown = sample(Stream(real, network, options), tmp_path / "set", images)
    assert network.seen == 30 + COUNT + 30 + 70 - COUNT
    assert grown.metrics == sample(Stream(real, TinyNetwork(), options), tmp_path / "alone", images).metrics
    assert grown.inputs["fake"]["images"] == 70


def test_the_grid_of_a_grown_set_shows_the_nearest_images_whose_pixels_were_kept(tmp_path: Path) -> None:
    images = np.stack([np.full((12, 12, 3), i, np.uint8) for i in range(200)])
    full = write_folder(tmp_path / "full", images)
    options = replace(OPTIONS, metrics=("paired",))
    sample(Stream(full, None, options), tmp_path / "set", images[:100])  # shows about every second image
    grown = sample(Stream(full, None, options), tmp_path / "set", images)
    whole = sample(Stream(full, None, options), tmp_path / "whole", images)
    difference = np.abs(grown.images["grid_fake"].astype(int) - whole.images["grid_fake"])
    assert 0 < difference.max() <= 1


def test_another_reference_needs_no_sampling(tmp_path: Path, real: Path) -> None:
    sample(Stream(real, TinyNetwork(), OPTIONS), tmp_path / "set")
    other, network = write_folder(tmp_path / "other", make_images(20, seed=5)), TinyNetwork()
    report = sample(Stream(other, network, OPTIONS), tmp_path / "set")
    assert network.seen == 20
    assert report.metrics == sample(Stream(other, TinyNetwork(), OPTIONS), tmp_path / "alone").metrics


@pytest.mark.parametrize(
    ("network", "paired", "message"),
    [
        (TinyNetwork(digest="other"), False, "has no features of this inception network"),
        (TinyNetwork(), True, "has no distances to the images of"),
        (TinyNetwork(), None, "has no psnr, relative_l2, ssim;"),
    ],
)
def test_features_of_another_run_are_not_thrown_away(
    tmp_path: Path, real: Path, full: Path, network: TinyNetwork, paired: bool | None, message: str
) -> None:
    other = stored(tmp_path / "other", make_images(COUNT, noise=1))
    before = replace(OPTIONS, paired=None if paired is None else full)
    sample(Stream(real, TinyNetwork(), before), tmp_path / "set")
    with pytest.raises(UserError, match=message):
        sample(Stream(real, network, replace(OPTIONS, paired=full if paired is False else other)), tmp_path / "set")
    assert len(list((tmp_path / "set" / "features").iterdir())) == 4


def test_other_files_among_the_features_are_refused(tmp_path: Path, full: Path) -> None:
    (tmp_path / "set" / "features").mkdir(parents=True)
    np.savez(tmp_path / "set" / "features" / "mine.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"mine\.npz has no features of svdit"):
        sample(Stream(full, None, Options(("paired",))), tmp_path / "set")
    assert (tmp_path / "set" / "features" / "mine.npz").exists()


def test_images_in_the_folder_are_refused(tmp_path: Path, real: Path) -> None:
    folder = write_folder(tmp_path / "set", IMAGES[:1], ["cat.png"])
    with pytest.raises(UserError, match=r"contains cat\.png, but no images are stored with --evaluate"):
        sample(Stream(real, TinyNetwork(), OPTIONS), folder)


@pytest.mark.parametrize("options", [{"num_images": 5}, {"compare": "x"}, {"resize_to": 8}])
def test_options_that_need_stored_images_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} cannot be used while sampling"):
        Stream("real", TinyNetwork(), Options(**options))


def test_unusable_real_images_and_networks_are_errors_before_sampling(tmp_path: Path, real: Path, full: Path) -> None:
    for sink, message in (
        (Stream(tmp_path / "nothing", TinyNetwork()), "there is no folder or file"),
        (Stream(real), "need a network and real images"),
        (Stream(real, TinyNetwork(), replace(OPTIONS, paired=full)), "4 of 30 images .* have no counterpart"),
    ):
        with pytest.raises(UserError, match=message):
            sink.open(tmp_path / "set", manifest(30))
    Image.new("RGB", (12, 12), "white").save(real / "000003.png")
    with pytest.raises(NotFiniteError, match=r"features of 1 of 30 images in .*000003"):
        Stream(real, Overflowing()).open(tmp_path / "set", manifest())


def test_generated_images_with_nan_features_are_named_and_other_results_kept(
    tmp_path: Path, real: Path, full: Path
) -> None:
    images = IMAGES.copy()
    images[[4, 17]] = 255
    options = replace(OPTIONS, paired=full)
    streamed = sample(Stream(real, Overflowing(), options), tmp_path / "set", images)
    assert "of 2 of 26 images in" in streamed.metrics["fid"].reason
    assert "(000004, 000017); check these images" in streamed.metrics["fid"].reason
    assert streamed.metrics["psnr"].value > 0
    for report in in_world(2, lambda: sample(Stream(real, Overflowing(), options), tmp_path / "two", images)):
        assert "(000004, 000017)" in (report.metrics["fid"].reason or "")


def test_features_do_not_use_the_samplers_tf32(tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Notes(TinyNetwork):
        def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            precisions.append(torch.backends.cudnn.allow_tf32)
            return super().__call__(pixels)

    precisions: list[bool] = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    sample(Stream(real, Notes(), OPTIONS), tmp_path / "set")
    assert precisions == [False] * len(precisions) != []
    assert torch.backends.cudnn.allow_tf32


def test_copies_are_counted(tmp_path: Path, real: Path) -> None:
    images = IMAGES.copy()
    images[5] = images[20] = images[0]
    through_files = evaluate(real, stored(tmp_path / "set", images), TinyNetwork(), OPTIONS)
    streamed = sample(Stream(real, TinyNetwork(), OPTIONS), tmp_path / "streamed", images)
    assert "2 of 26 images" in streamed.warnings[-1]
    assert [w.replace("streamed", "set") for w in streamed.warnings] == list(through_files.warnings)
