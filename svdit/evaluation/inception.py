"""The 2015 Inception-v3 of FID through torch-fidelity, with all features in one pass, and with random weights.

    pool     2048   FID, KID, precision, recall, density, coverage, MIND
    spatial  2023   sFID: the first 7 channels of Mixed_6d, 17 × 17 × 7 flattened with the channel last. They are
                    TensorFlow's mixed_6/conv after its ReLU, in the order of ADM's mu_s and sigma_s
    logits   1008   Inception Score: without the bias, as in the original graph

Images are resized to 299 by TensorFlow 1's bilinear rule: output i is the input at i · size / 299. `fast` resizes in
one call, folds the batch norms and uses channels_last: twice the speed, features equal to about 1e-6.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from svdit.errors import UserError, unknown
from svdit.evaluation.weights import find_weights, load_weights
from svdit.extras import require

EXTRACTORS = ("inception", "random")
WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}
SIZE = 299
# fmt: off
TRUNK = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
)
# fmt: on
HEAD = ("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")


class Extractor(nn.Module):
    """uint8 (N, 3, H, W) -> {"pool": (N, 2048), "spatial": (N, 2023), "logits": (N, 1008)}, float32.

    `digest` identifies the weights; results of different digests are not comparable. Raises UserError if `state` does
    not fit the network.
    """

    widths = WIDTHS

    def __init__(self, state: dict[str, Tensor], name: str, digest: str, fast: bool = True) -> None:
        super().__init__()
        self.name, self.digest, self.comparable, self.fast = name, digest, name == "inception", fast
        self.network = _empty_network()
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"these are not the 2015 Inception weights: {reason}; pass the published file") from None
        if fast:
            _fold_batch_norms(self.network)
            self.network.to(memory_format=torch.channels_last)

    # fmt: off
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = (resize_fast if self.fast else resize)(pixels.float())         # (N, 3, 299, 299)
        x = (x - 128) / 128
        for stage in TRUNK:
            x = getattr(self.network, stage)(x)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                  # (N, 17 · 17 · 7)
        for stage in HEAD:
            x = getattr(self.network, stage)(x)
        pool = x.flatten(1)                                                # (N, 2048)
        logits = pool.mm(self.network.fc.weight.T)                         # (N, 1008)
        return {"pool": pool, "spatial": spatial, "logits": logits}
    # fmt: on


def resize(x: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 3, 299, 299), bit-equal to torch-fidelity."""
    interpolate = require("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    resized: Tensor = interpolate(x, size=(SIZE, SIZE), align_corners=False)
    return resized


def resize_fast(x: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 3, 299, 299), within 5e-5 grey levels of `resize`."""
    # With the last row and column repeated, aligned corners are H / 299 apart too.
    x = F.pad(x.contiguous(memory_format=torch.channels_last), (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(SIZE + 1, SIZE + 1), mode="bilinear", align_corners=True)
    return x[:, :, :SIZE, :SIZE]


def load_extractor(state: dict[str, Tensor], digest: str, fast: bool = True) -> Extractor:
    """The network with the published weights: `state`, whose file has the SHA-256 `digest`; shapes as (O, I, …)."""
    return Extractor(state, "inception", digest, fast)


def random_extractor(seed: int = 0, fast: bool = True) -> Extractor:
    """The network with seeded He-normal weights: works offline, but its results are comparable only to its own."""
    state = _empty_network().state_dict()
    stream = np.random.RandomState(seed)
    for name, value in state.items():
        if name.endswith("weight") and value.dim() > 1:
            fan_in = value[0].numel()
            normal = stream.standard_normal(value.numel()) * np.sqrt(2 / fan_in)
            state[name] = torch.from_numpy(normal.astype(np.float32)).view(value.shape)
    state["fc.bias"] = torch.zeros_like(state["fc.bias"])
    return Extractor(state, "random", hashlib.sha256(f"he-normal {seed}".encode()).hexdigest(), fast)


def named_extractor(name: str, weights: str | Path | None = None, folder: Path | None = None) -> Extractor:
    """The network called "inception", with the published weights as `find_weights` finds them, or "random".

    Raises UserError for another name, and for weights that are missing or damaged.
    """
    if name == "random":
        return random_extractor()
    if name != "inception":
        raise unknown("feature extractor", name, EXTRACTORS)
    return load_extractor(*load_weights(find_weights(weights, folder)))


def _empty_network() -> Any:
    """torch-fidelity's network without weights. Its constructor unpickles a file, so it gets an empty one."""

    class Network(require("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state, *args, **kwargs) if state else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Network("svdit", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)


def _fold_batch_norms(network: Any) -> None:
    for block in network.modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
