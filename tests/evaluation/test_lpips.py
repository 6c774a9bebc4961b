"""torch-fidelity's LPIPS, with random VGG features instead of 500 MB of weights."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch_fidelity import sample_similarity_lpips

from svdit.errors import UserError
from svdit.evaluation.paired import LPIPS_URLS, load_lpips

from .conftest import Touch, make_images

CPU = torch.device("cpu")


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for url in LPIPS_URLS:
        torch.save({}, folder / url.rsplit("/", 1)[1])
    return folder


@pytest.mark.parametrize("url", LPIPS_URLS)
def test_each_missing_file_is_named_with_its_url(checkpoints: Path, url: str):
    (checkpoints / url.rsplit("/", 1)[1]).unlink()
    with pytest.raises(UserError, match=f"LPIPS needs .*, which does not exist; download it from {url}"):
        load_lpips(CPU)


@pytest.mark.parametrize("url", LPIPS_URLS)
def test_files_with_code_are_refused(checkpoints: Path, url: str):
    trace = checkpoints / "trace"
    torch.save(Touch(trace), checkpoints / url.rsplit("/", 1)[1])
    with pytest.raises(UserError, match="is not a weights file"):
        load_lpips(CPU)
    assert not trace.exists()


def test_distance_is_the_formula_over_unit_features(checkpoints: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    features = torchvision.models.vgg.make_layers(plan).eval()
    linear = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    state = {f"lin{i}.model.1.weight": weight for i, weight in enumerate(linear)}
    monkeypatch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *args, **kwargs: state)
    vgg = SimpleNamespace(features=features)
    monkeypatch.setattr(sample_similarity_lpips, "torchvision_load_pretrained_vgg16", lambda: vgg)
    distance = load_lpips(CPU)
    a, b = make_images(2, 32)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, y = ((torch.from_numpy(p).permute(2, 0, 1)[None] / 255 - mean) / std for p in (a, b))
    expected = 0.0
    with torch.no_grad():
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                squared = (torch.nn.functional.normalize(x) - torch.nn.functional.normalize(y)) ** 2
                expected += float((squared * linear[(3, 8, 15, 22, 29).index(i)]).sum(1).mean())
    assert distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert distance(a, a) == 0
    assert np.isclose(distance(a, b), distance(b, a))
    for size, usable in ((16, True), (15, False)):
        assert np.isfinite(distance(a[:size], b[:size])) == usable
