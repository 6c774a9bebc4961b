"""What must be equal before two numbers may stand in one table, and what should be said about the inputs.

The sampling side comes from the sample folder's `manifest.json`; without one its fields are null, and null agrees
only with null.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from svdit import __version__
from svdit.evaluation.features import FeatureNetwork
from svdit.evaluation.inputs import Inputs, Set
from svdit.evaluation.metrics import KID_SUBSET_SIZE
from svdit.evaluation.weights import SHA256

SAMPLE_FIELDS = ("image_size", "sampler", "steps", "cfg_scale", "cfg_channels", "cfg_interval", "vae", "label_policy")
NOT_COMPARED = ("sample_seed",)  # another seed is another draw of the same protocol; errors are then not paired
PACKAGES = ("torch", "torch-fidelity", "numpy", "scipy", "pillow")


def protocol(inputs: Inputs, network: FeatureNetwork | None, seed: int) -> dict[str, Any]:
    """The fields that `svdit compare` holds against each other, and the seeds."""
    real, fake, manifest = inputs.real, inputs.fake, inputs.fake.source.manifest
    return {
        "extractor": network and network.name,
        "weights_sha256": network and network.digest,
        "comparable": network is None or network.comparable,
        "precision": "float32, no TF32",
        "resize": "TensorFlow 1 bilinear to 299",
        "reference_sha256": real and real.content,
        "n_real": real and _count(real),
        "n_fake": fake.count,
        "pixels": "×".join(map(str, fake.size)),
        "lossy": fake.source.lossy,
        "selection_seed": seed,
        **{"sample_" + name: manifest.get(name) for name in SAMPLE_FIELDS},
        "sample_seed": manifest.get("seed"),
    }


def _count(real: Set) -> int | None:
    """The images behind the reference, where stored statistics tell."""
    return next((gaussian.count for gaussian in real.source.gaussians.values()), real.count)


def disagreements(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of the fields in which two protocols differ."""
    return [name for name in a | b if name not in NOT_COMPARED and a.get(name) != b.get(name)]


def versions() -> dict[str, str]:
    return {"svdit": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def remarks(inputs: Inputs, network: FeatureNetwork | None, metrics: Sequence[str]) -> list[str]:
    """Warnings about inputs that can be measured but should be looked at."""
    real, fake = inputs.real, inputs.fake
    said = [] if network is None else _network_remarks(inputs, network, metrics)
    if real is None or real.count == 0:
        return said
    if real.content == fake.content:
        said.append(f"{real.source.path} and {fake.source.path} hold the same images")
    if real.source.lossy != fake.source.lossy:
        said.append("one side is stored lossy (JPEG or WebP), the other is not; compression alone moves FID")
    if real.size != fake.size:
        said.append(f"the real images are {real.size}, the generated {fake.size} (H, W); both are resized to 299")
    return said


def _network_remarks(inputs: Inputs, network: FeatureNetwork, metrics: Sequence[str]) -> list[str]:
    said, D = [], network.widths["pool"]
    sides = {"real": inputs.real, "generated": inputs.fake}
    counts = {name: side.count for name, side in sides.items() if side is not None and side.count}
    few = " and ".join(f"{count} {name}" for name, count in counts.items() if count <= D)
    if few and {"fid", "sfid"} & set(metrics):
        said.append(f"{few} images give a singular covariance of {D} features: FID is noisy and biased upwards")
    if "kid" in metrics and min(counts.values()) < KID_SUBSET_SIZE:
        said.append(f"KID's subsets are of {min(counts.values())} images, not {KID_SUBSET_SIZE}: there are no more")
    if network.comparable and network.digest != SHA256:
        said.append(f"the Inception weights have the SHA-256 {network.digest}, not the known {SHA256}")
    return said
