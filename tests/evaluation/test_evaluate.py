"""evaluate(): parity with torch-fidelity, unavailable metrics, second sets, saved statistics, the cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from test_distributed import in_world

from svdit.errors import UserError
from svdit.evaluation.compare import compare
from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.inception import load_extractor
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.metrics import METRICS, Metric
from svdit.evaluation.options import Options
from svdit.evaluation.report import Report

from .conftest import Overflowing, TinyNetwork, make_images, write_folder

NAMES = ["fid", "sfid", "kid", "kid_std", "kid_full", "is", "precision", "recall", "density", "coverage", "mind"]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "real", make_images(30, seed=1))


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "fake", make_images(26, noise=30))


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "full", make_images(26))


def values(report: Report) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in report.metrics.items()}


def test_parity_with_torch_fidelity_on_the_same_weights_file(tmp_path: Path, weights_file: Path):
    """Features are bit-equal, so IS and precision/recall are exact; torch-fidelity's FID of a singular covariance
    carries round-off of 1e-6 relative itself."""
    real, fake = (
        write_folder(tmp_path / "real", make_images(8, seed=1)),
        write_folder(tmp_path / "fake", make_images(7)),
    )
    network = load_extractor(torch.load(weights_file), "digest", fast=False)
    ours = values(evaluate(real, fake, network, Options(("fid", "kid", "is", "prc"))))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(fake), input2=str(real), cuda=False, verbose=False, cache=False,
        fid=True, isc=True, kid=True, prc=True, isc_splits=1, kid_subset_size=7, save_cpu_ram=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights_file),
    )  # fmt: skip
    assert ours["is"] == theirs["inception_score_mean"]
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours["fid"] > 1


def test_all_available_metrics_are_measured_in_one_pass(real: Path, fake: Path, tiny_network: TinyNetwork):
    report = evaluate(real, fake, tiny_network)
    assert [name for name, value in values(report).items() if value is not None] == NAMES
    assert report.metrics["fid_inf"].reason == "needs at least 4000 images for its line, found 26"
    assert report.failed == ()
    assert report.metrics["fid"].se > 0
    assert report.inputs["fake"]["images"] == 26
    assert tiny_network.seen == 56  # one pass


def test_a_network_that_cannot_be_moved(real: Path, fake: Path, tiny_network: TinyNetwork):
    class Unmovable(TinyNetwork):
        to = property()  # type: ignore[assignment]

    options = Options(("fid", "kid"))
    assert values(evaluate(real, fake, Unmovable(), options)) == values(evaluate(real, fake, tiny_network, options))


def test_images_with_nan_features_are_named_and_other_results_kept(real: Path, fake: Path, full: Path, tmp_path: Path):
    for name in ("000004", "000007"):
        Image.new("RGB", (12, 12), "white").save(fake / f"{name}.png")
    options = Options(paired=full, cache=tmp_path / "cache", save_stats=tmp_path / "stats.npz")
    report = evaluate(real, fake, Overflowing(), options)
    reason = report.metrics["fid"].reason
    assert "features of 2 of 26 images in" in reason and "(000004, 000007); check these images" in reason
    assert {name for name, value in values(report).items() if value is not None} >= {"psnr", "ssim"}
    assert report.metrics["kid"].value is None
    assert options.save_stats is not None and options.save_stats.exists()
    assert len(list((tmp_path / "cache" / "features").glob("*/statistics.npz"))) == 1  # of the real images


@pytest.mark.parametrize("n", [2, 3])
def test_two_images_are_enough_for_numbers_and_three_for_errors(
    tmp_path: Path, real: Path, tiny_network: TinyNetwork, n: int
):
    report = evaluate(real, write_folder(tmp_path / "few", make_images(n)), tiny_network)
    assert report.metrics["prc"].reason == f"needs more than 5 images on both sides, found 30 and {n}"
    for name in ("fid", "sfid", "kid_full", "is"):
        assert np.isfinite(report.metrics[name].value)
        assert np.isfinite(report.metrics[name].leave_out).all()
        assert (report.metrics[name].se is not None) == (n == 3)


def test_unavailable_metrics_fail_if_named(real: Path, fake: Path, tiny_network: TinyNetwork):
    report = evaluate(real, fake, tiny_network, Options(("fid", "prc", "fid_inf")))
    assert report.failed == ("fid_inf",)


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in ("lpips", "fid_inf", "paired")])
def test_each_metric_can_be_measured_alone(real: Path, fake: Path, tiny_network: TinyNetwork, metric: str):
    everything = evaluate(real, fake, tiny_network)
    alone = evaluate(real, fake, tiny_network, Options((metric,)))
    assert alone.failed == ()
    assert alone.metrics
    assert alone.metrics.items() <= everything.metrics.items()


def test_real_images_as_npz_give_the_same_numbers(tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork):
    np.savez(tmp_path / "real.npz", make_images(30, seed=1))
    np.savez_compressed(tmp_path / "fake.npz", np.stack([np.asarray(Image.open(p)) for p in sorted(fake.iterdir())]))
    assert values(evaluate(tmp_path / "real.npz", tmp_path / "fake.npz", tiny_network)) == values(
        evaluate(real, fake, tiny_network)
    )


def test_saved_statistics_replace_the_folder(tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork):
    direct = evaluate(real, fake, tiny_network, Options(save_stats=tmp_path / "stats.npz"))
    stored = evaluate(tmp_path / "stats.npz", fake, tiny_network)
    assert values(stored) == values(direct)
    assert stored.protocol["n_real"] == 30
    with pytest.raises(UserError, match=r"stats\.npz come from other weights"):
        evaluate(tmp_path / "stats.npz", fake, TinyNetwork(digest="other"))


def adm_reference(path: Path, real: Path, network: TinyNetwork, **arrays: np.ndarray) -> Path:
    evaluate(real, real, network, Options(("fid",), save_stats=path))
    with np.load(path) as ours:
        np.savez(path, **{key: ours[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}, **arrays)
    return path


def test_statistics_without_images_leave_neighbour_metrics_empty(
    tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork
):
    reference = adm_reference(tmp_path / "adm.npz", real, tiny_network)
    report = evaluate(reference, fake, tiny_network)
    direct = values(evaluate(real, fake, tiny_network))
    assert values(report)["fid"] == pytest.approx(direct["fid"], rel=1e-12)
    assert values(report)["sfid"] == pytest.approx(direct["sfid"], rel=1e-12)
    for name in ("kid", "prc", "mind"):
        assert report.metrics[name].value is None
        assert report.metrics[name].reason == "the reference has statistics only, no images"
    assert report.failed == ()
    assert evaluate(reference, fake, tiny_network, Options(("fid", "kid"))).failed == ("kid",)
    again = evaluate(reference, fake, tiny_network, Options(("fid",), save_stats=tmp_path / "again.npz"))
    assert values(evaluate(tmp_path / "again.npz", fake, tiny_network, Options(("fid",)))) == values(again)


def test_without_pool_statistics_fid_is_empty(tmp_path: Path, fake: Path, tiny_network: TinyNetwork):
    np.savez(tmp_path / "s.npz", mu_s=np.zeros(12), sigma_s=np.eye(12))
    report = evaluate(tmp_path / "s.npz", fake, tiny_network, Options(("fid", "sfid")))
    assert report.failed == ("fid",)
    assert report.metrics["fid"].reason == "the reference has no statistics of the pool features"
    assert report.metrics["sfid"].value > 0


def test_adm_reference_uses_its_statistics_and_its_images(
    tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork
):
    reference = adm_reference(tmp_path / "adm.npz", real, tiny_network, arr_0=make_images(30, seed=1)[:20])
    some = write_folder(tmp_path / "some", make_images(30, seed=1)[:20])
    mixed, whole, part = (
        values(evaluate(each, fake, tiny_network, Options(num_images=None))) for each in (reference, real, some)
    )
    assert mixed["fid"] == pytest.approx(whole["fid"], rel=1e-12)
    assert mixed["precision"] == part["precision"] != whole["precision"]
    assert values(evaluate(reference, fake, tiny_network, Options(num_images=25)))["recall"] is not None


def test_statistics_of_another_network_are_refused(tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork):
    reference = adm_reference(tmp_path / "adm.npz", real, tiny_network)
    with pytest.raises(UserError, match="come from other weights"):
        evaluate(reference, fake, TinyNetwork(name="random"))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="have 3 pool features, the network 16"):
        evaluate(tmp_path / "narrow.npz", fake, tiny_network)


def test_random_features_are_labelled_everywhere(tmp_path: Path, real: Path, fake: Path):
    report = evaluate(real, fake, TinyNetwork(name="random"), Options(("fid", "is")))
    assert list(report.metrics) == ["random_fid", "random_is"]
    assert report.failed == ()
    report.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]["comparable"] is False
    assert "NOT comparable" in (tmp_path / "out" / "metrics.md").read_text()
    plain = evaluate(real, fake, TinyNetwork(), Options(("fid",))).images["grid_fake"]
    assert report.images["grid_fake"].shape[0] > plain.shape[0]  # a line of text below


def test_pairs_need_no_network(fake: Path, full: Path):
    report = evaluate(None, fake, options=Options(("paired",), paired=full))
    assert list(report.metrics) == ["psnr", "ssim", "relative_l2", "psnr_pooled", "identical_pairs"]
    assert sorted(report.images) == ["grid_fake", "grid_pairs"]
    pairs = report.images["grid_pairs"]
    assert (pairs != 255).any(-1).mean() > 0.3  # images, and above and beside them text on white


def test_protocol_records_the_counterparts(tmp_path: Path, fake: Path, full: Path):
    other = write_folder(tmp_path / "other", make_images(26, seed=9))
    hashes = [
        evaluate(None, fake, options=Options(("paired",), paired=path)).protocol["counterparts_sha256"]
        for path in (full, full, other)
    ]
    assert None not in hashes
    assert hashes[0] == hashes[1] != hashes[2]


def test_counterparts_of_other_sampling_options_are_a_warning(fake: Path, full: Path):
    for folder, seed in ((fake, 0), (full, 1)):
        (folder / "manifest.json").write_text(json.dumps({"tool": "svdit", "seed": seed, "steps": 20}))
    warnings = evaluate(None, fake, options=Options(("paired",), paired=full)).warnings
    assert warnings == (f"{fake} and {full} were sampled with seed 0 and 1",)


def test_a_new_metric_is_one_entry(
    tmp_path: Path, real: Path, fake: Path, full: Path, tiny_network: TinyNetwork, monkeypatch: pytest.MonkeyPatch
):
    """It can be named, is measured by default, debiased, and shown by `svdit compare`; so is one of pairs."""
    mean = Metric(
        "shift",
        lambda d: {"shift": Estimate(float(d.fake.rows["pool"].mean()), (1.0, 2.0))},
        biased=True,
        in_comparison=("shift",),
    )
    peak = Metric("peak", distances={"peak": lambda device: lambda a, b: 3.0}, in_comparison=("peak",))
    monkeypatch.setitem(METRICS, "shift", mean)
    monkeypatch.setitem(METRICS, "peak", peak)
    named = evaluate(real, fake, tiny_network, Options(("shift", "peak"), paired=full))
    default = evaluate(real, fake, tiny_network, Options(paired=full))
    for report in (named, default):
        assert report.failed == ()
        assert report.metrics["peak"].value == 3
        assert report.rows()[list(report.metrics).index("shift")][3]  # debiased
    default.save(tmp_path / "out")
    table = compare([tmp_path / "out"])
    assert " shift " in table
    assert " peak " in table


def test_second_set_is_measured_as_if_alone_and_differences_have_smaller_errors(
    real: Path, fake: Path, full: Path, tiny_network: TinyNetwork
):
    report = evaluate(real, fake, tiny_network, Options(("fid", "kid", "is", "prc"), compare=full))
    alone = evaluate(real, full, tiny_network, Options(("fid", "kid", "is", "prc")))
    assert report.second == alone.metrics
    for name in ("fid", "kid_full"):
        difference = report.difference[name]
        assert difference.value == report.metrics[name].value - alone.metrics[name].value
        assert 0 < difference.se < 0.7 * np.hypot(report.metrics[name].se, alone.metrics[name].se)


def test_both_sets_use_the_same_choice(tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork):
    twin = write_folder(tmp_path / "twin", np.stack([np.asarray(Image.open(p)) for p in sorted(fake.iterdir())]))
    report = evaluate(real, fake, tiny_network, Options(("fid",), num_images=20, compare=twin, seed=3))
    assert report.difference["fid"].value == 0
    assert report.protocol["n_fake"] == report.protocol["n_real"] == 20


def test_cache_is_used_until_an_image_changes(tmp_path: Path, real: Path, fake: Path, tiny_network: TinyNetwork):
    options = Options(("fid",), cache=tmp_path / "cache")
    first = evaluate(real, fake, tiny_network, options)
    again = evaluate(real, fake, tiny_network, options)
    assert tiny_network.seen == 56
    assert again.metrics == first.metrics
    Image.fromarray(255 - make_images(1)[0]).save(fake / "000003.png")
    changed = evaluate(real, fake, tiny_network, options)
    assert tiny_network.seen == 56 + 26
    assert changed.metrics["fid"].value != first.metrics["fid"].value


def test_suspicious_inputs_are_warnings(tmp_path: Path, real: Path, tiny_network: TinyNetwork):
    lossy = write_folder(tmp_path / "lossy", make_images(10, 16), [f"{i}.jpg" for i in range(10)])
    warnings = " ".join(evaluate(real, lossy, tiny_network, Options(("fid", "kid"))).warnings)
    for part in (
        "compression alone changes FID", "10 generated images have a singular covariance of 16 features",
        "KID uses subsets of 10 images", "not the known 6726825d", "(12, 12), the generated (16, 16)",
    ):  # fmt: skip
        assert part in warnings
    assert (
        evaluate(real, lossy, TinyNetwork(name="random"), Options(("is",))).warnings
        == evaluate(real, lossy, options=Options(("paired",), paired=lossy)).warnings
    )
    assert "contain the same images" in " ".join(evaluate(real, real, tiny_network, Options(("fid",))).warnings)


def test_network_metrics_without_a_network_are_refused(real: Path, fake: Path):
    with pytest.raises(UserError, match="need a network"):
        evaluate(real, fake)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_and_agree_with_one_process(
    tmp_path: Path, real: Path, fake: Path, full: Path, world: int
):
    wanted = tuple(name for name in METRICS if name not in ("fid_inf", "lpips"))
    options = Options(wanted, paired=full, compare=full, num_images=23)
    alone = evaluate(real, fake, TinyNetwork(), options)

    def together() -> tuple[Report, int]:
        network = TinyNetwork()
        return evaluate(real, fake, network, options), network.seen

    results = in_world(world, together)
    assert sum(seen for _, seen in results) == 3 * 23  # every image once, none padded
    assert max(seen for _, seen in results) <= 3 * 8 + 3 * 4 * (world == 2)
    for report, _ in results:
        for name, estimate in alone.metrics.items():
            assert report.metrics[name].value == pytest.approx(estimate.value, rel=1e-9), name
            assert report.metrics[name].leave_out == pytest.approx(estimate.leave_out, rel=1e-9), name
            assert report.difference[name].value == pytest.approx(alone.difference[name].value, rel=1e-6), name
