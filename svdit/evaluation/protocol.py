"""The protocol: the fields that must agree before two numbers are comparable; and warnings about the inputs.

The sampling fields come from the sample folder's `manifest.json`; without a manifest they are null, which equals only
null.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from svdit import __version__
from svdit.evaluation.features import FeatureNetwork
from svdit.evaluation.inputs import SAMPLE_FIELDS, Inputs, differences
from svdit.evaluation.metrics import KID_SUBSET_SIZE
from svdit.evaluation.options import Options
from svdit.evaluation.sources import ImageSet
from svdit.evaluation.weights import SHA256
from svdit.storage.manifest import EARLIER

# Another seed is another sample of the same protocol; errors are then not paired. A name says no more than its fields.
# Feature caching is compared with its absence, as a quantized model with the original.
NOT_COMPARED = ("sample_seed", "sample_protocol", "sample_caching")
OF_PAIRS = ("counterparts_sha256",)  # concerns the metrics of pairs only
PACKAGES = ("torch", "torch-fidelity", "numpy", "scipy", "pillow")


def protocol(inputs: Inputs, network: FeatureNetwork | None, options: Options) -> dict[str, Any]:
    """The fields that `svdit compare` checks, and the seeds."""
    real, fake, counterparts = inputs.real, inputs.fake, inputs.counterparts
    manifest = fake.source.manifest
    return {
        "extractor": network and network.name,
        "weights_sha256": network and network.digest,
        "comparable": network is None or network.comparable,
        "precision": network and "float32, no TF32",
        "resize": network and "TensorFlow 1 bilinear to 299",
        "resize_to": options.resize_to,
        "reference_sha256": real and real.content,
        "counterparts_sha256": counterparts and counterparts.content,
        "n_real": real and _count(real),
        "n_fake": fake.count,
        "pixels": "×".join(map(str, fake.size)),
        "lossy": fake.lossy,
        "selection_seed": options.seed,
        **{"sample_" + name: manifest.get(name) for name in SAMPLE_FIELDS},
        "sample_seed": manifest.get("seed"),
        "sample_protocol": manifest.get("protocol"),
        "sample_caching": manifest.get("caching"),
    }


def _count(real: ImageSet) -> int | None:
    """The number of images of the reference; for stored statistics, the number they record."""
    return next((gaussian.count for gaussian in real.source.gaussians.values()), real.count)


def disagreements(a: dict[str, Any], b: dict[str, Any], pairs: bool = True) -> list[str]:
    """The names of the fields in which two protocols differ; `pairs`: the fields of paired metrics too."""
    a, b = completed(a, b), completed(b, a)
    ignored = NOT_COMPARED if pairs else NOT_COMPARED + OF_PAIRS
    return [name for name in a | b if name not in ignored and a.get(name) != b.get(name)]


def completed(protocol: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """With the sampling fields that earlier versions did not record: DiT's, and the precision of the other set.

    Without those of a network that did not run, which they recorded.
    """
    if protocol.get("extractor") is None:
        protocol = {**protocol, "precision": None, "resize": None}
    if protocol.get("sample_sampler") is None:  # no manifest
        return protocol
    earlier = {"sample_" + name: EARLIER[name] for name in SAMPLE_FIELDS if name in EARLIER}
    return {**earlier, "sample_precision": other.get("sample_precision"), **protocol}


def versions() -> dict[str, str]:
    """The versions of Python, svdit and the packages that compute."""
    found = {"svdit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an extra that these metrics do not need
            continue
    return found


def input_warnings(inputs: Inputs, network: FeatureNetwork | None, metrics: Sequence[str]) -> list[str]:
    """Warnings about inputs that can be measured but look wrong."""
    real, fake = inputs.real, inputs.fake
    warnings = [] if network is None else _network_warnings(inputs, network, metrics)
    for other in (inputs.second, inputs.counterparts):
        if other is not None and (fields := differences(fake, other)):
            warnings.append(f"{fake.source.path} and {other.source.path} were sampled with {', '.join(fields)}")
    for generated in (fake, inputs.second):
        if generated is not None and generated.copies:
            counts = f"{generated.copies} of {generated.count} images of {generated.source.path}"
            warnings.append(f"{counts} are exact copies of others")
    name, reference = (fake.source.manifest.get(field) for field in ("protocol", "reference"))
    if real and reference and not real.source.manifest and real.source.path.name != reference:
        warnings.append(f"figures of {name} are against {reference}, not {real.source.path.name}")
    if real is None or real.count == 0:
        return warnings
    if real.content == fake.content:
        warnings.append(f"{real.source.path} and {fake.source.path} contain the same images")
    if real.lossy != fake.lossy:
        warnings.append("one side is stored lossy (JPEG or WebP), the other is not; compression alone changes FID")
    if real.size != fake.size:
        warnings.append(f"the real images are {real.size}, the generated {fake.size} (H, W); both are resized to 299")
    return warnings


def _network_warnings(inputs: Inputs, network: FeatureNetwork, metrics: Sequence[str]) -> list[str]:
    warnings, D = [], network.widths["pool"]
    sides = {"real": inputs.real, "generated": inputs.fake}
    counts = {name: side.count for name, side in sides.items() if side is not None and side.count}
    few = " and ".join(f"{count} {name}" for name, count in counts.items() if count <= D)
    if few and {"fid", "sfid"} & set(metrics):
        warnings.append(f"{few} images have a singular covariance of {D} features: FID is noisy and biased upwards")
    if "kid" in metrics and min(counts.values()) < KID_SUBSET_SIZE:
        warnings.append(f"KID uses subsets of {min(counts.values())} images, all there are, not of {KID_SUBSET_SIZE}")
    if network.comparable and network.digest != SHA256:
        warnings.append(f"the Inception weights have the SHA-256 {network.digest}, not the known {SHA256}")
    return warnings
