"""The 2015 Inception-v3 of FID through torch-fidelity, giving every feature in one pass, and a random twin of it.

    pool     2048   FID, KID, precision, recall, density, coverage, MIND
    spatial  2023   sFID: the first 7 channels of `Mixed_6d.branch1x1` (after its ReLU; TensorFlow's mixed_6/conv),
                    17 × 17 × 7 flattened with the channel last, the order of ADM's mu_s and sigma_s
    logits   1008   the Inception Score's, without the bias, as the original graph has them

Pictures of any size are resized to 299 by TensorFlow 1's bilinear rule. `fast` changes memory layout and folds
batch norms into convolutions: twice the speed, features equal to about 3e-7.
"""

import hashlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from svdit.errors import UserError
from svdit.shims import allow_cpu_torchvision

allow_cpu_torchvision()
from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: E402
    BasicConv2d,
    FeatureExtractorInceptionV3,
)

WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}


class Extractor(nn.Module):
    """uint8 (N, 3, H, W) -> {"pool": (N, 2048), "spatial": (N, 2023), "logits": (N, 1008)}, float32.

    `digest` tells weights apart; numbers of extractors with different digests must not be compared.
    """

    widths = WIDTHS

    def __init__(self, state: dict[str, Tensor], name: str, digest: str, fast: bool = True) -> None:
        super().__init__()
        self.name, self.digest, self.comparable = name, digest, name == "inception"
        self.network = _empty_network()
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"these are not the 2015 Inception weights: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.branch: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        if fast:
            _fold_batch_norms(self.network)
            self.network.to(memory_format=torch.channels_last)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.branch = output

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(pixels)
        assert self.branch is not None
        spatial = self.branch[:, :7].permute(0, 2, 3, 1).reshape(len(pixels), -1)  # (N, 17 · 17 · 7)
        self.branch = None
        return {"pool": pool, "spatial": spatial, "logits": logits}


def load_extractor(state: dict[str, Tensor], digest: str, fast: bool = True) -> Extractor:
    """The published network with the weights `state`, whose file has the SHA-256 `digest`."""
    return Extractor(state, "inception", digest, fast)


def random_extractor(seed: int = 0, fast: bool = True) -> Extractor:
    """The same network with seeded He-normal weights: an offline yardstick whose numbers compare to no other's."""
    state = _empty_network().state_dict()
    stream = np.random.RandomState(seed)
    for name, value in state.items():
        if name.endswith("weight") and value.dim() > 1:
            fan_in = value[0].numel()
            drawn = stream.standard_normal(value.numel()) * np.sqrt(2 / fan_in)
            state[name] = torch.from_numpy(drawn.astype(np.float32)).view(value.shape)
    state["fc.bias"] = torch.zeros_like(state["fc.bias"])
    return Extractor(state, "random", hashlib.sha256(f"he-normal {seed}".encode()).hexdigest(), fast)


class _Network(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The library's network without weights: its constructor would load them with code allowed."""

    def load_state_dict(self, state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(state, *args, **kwargs) if state else None


def _empty_network() -> _Network:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return _Network("svdit", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)


def _fold_batch_norms(network: nn.Module) -> None:
    for block in network.modules():
        if isinstance(block, BasicConv2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
