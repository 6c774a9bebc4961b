"""The selftest passes, and fails with a wrong formula."""

import pytest

from svdit.cli import command
from svdit.errors import UserError
from svdit.evaluation import selftest
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.selftest import Check


def test_every_formula_passes():
    failed = [check for check in selftest.formulas() if not check.passed]
    assert failed == []


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("frechet_distance", lambda a, b: 0.0),
        ("metrics.inception_score", lambda logits, blocks: {"is": Estimate(5.0)}),
        ("metrics.kernel_distance", lambda real, fake, blocks: {"kid_full": Estimate(0.0)}),
        ("metrics.monge_distance", lambda real, fake: Estimate(4.0)),
        ("paired.psnr", lambda a, b: 28.0),
        ("paired.ssim", lambda a, b: 1.0),
    ],
)
def test_a_wrong_formula_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, wrong):
    monkeypatch.setattr(f"svdit.evaluation.selftest.{name}", wrong)
    monkeypatch.setattr(selftest, "_network", lambda: iter(()))
    with pytest.raises(SystemExit) as end:
        command("selftest", [])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "FAIL" in printed.out
    assert "checks failed" in printed.err


def test_tolerance_is_two_sided():
    assert Check("", 1.0, 1.1, 0.2).passed
    assert not Check("", 1.0, 1.3, 0.2).passed
    assert not Check("", 1.3, 1.0, 0.2).passed
    assert not Check("", float("nan"), 1.0, 0.2).passed


def test_only_adms_files_have_known_numbers(tmp_path):
    with pytest.raises(UserError, match=r"mine\.npz has no published numbers; pass one of admnet"):
        list(selftest.regression(tmp_path / "mine.npz", tmp_path / "ref.npz", None))
