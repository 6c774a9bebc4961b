"""`evaluate(real, fake, network, options) -> Report`: images → features → statistics → metrics → report.

Metrics that the inputs do not allow (a reference of statistics only, too few images) are empty, with the reason.
Under torchrun the processes share the images, and all return the same report. `stream` calls the same functions for
images that are evaluated while they are sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from svdit.distributed import gather, rank
from svdit.errors import UserError
from svdit.evaluation.features import (
    Extraction,
    FeatureNetwork,
    Features,
    NotFiniteError,
    extract,
    features_folder,
    full_precision,
)
from svdit.evaluation.figures import overview, shown, worst_pairs
from svdit.evaluation.inputs import Inputs, open_inputs
from svdit.evaluation.jackknife import Blocks, Estimate, Estimates, assign_blocks
from svdit.evaluation.metrics import METRICS, RANDOM, Data, compute_metrics
from svdit.evaluation.options import Options
from svdit.evaluation.paired import Distance, pair_scores, paired_metrics
from svdit.evaluation.protocol import input_warnings, protocol, versions
from svdit.evaluation.report import NOT_COMPARABLE, Report
from svdit.evaluation.sources import ImageSet
from svdit.evaluation.statistics import save_statistics
from svdit.extras import require
from svdit.images import Pixels
from svdit.progress import progress

REAL_ROWS, FAKE_ROWS = ("pool",), ("pool", "spatial", "logits")


def evaluate(
    real: str | Path | None, fake: str | Path, network: FeatureNetwork | None = None, options: Options | None = None
) -> Report:
    """Compare the images of `fake` with those, or the statistics, of `real`. Raises UserError for unusable inputs.

    `network` (see `inception`) may be None if only metrics of pairs are requested. With `options.compare` the report
    also has the metrics of that set, and the differences with their errors.
    """
    options, started = options or Options(), time.perf_counter()
    inputs = open_inputs(real, fake, options)
    network, distances = prepare(inputs, network, options)
    blocks = assign_blocks(inputs.fake.count)
    estimates = feature_metrics(inputs, network, options, blocks, partial(_extracted, inputs, options))
    notes = picture_notes(network)
    images = {"grid_fake": overview(inputs.fake, {n: inputs.fake.read(n) for n in shown(inputs.fake.count)}, notes)}
    if inputs.counterparts is not None:
        for values, image_set in zip(estimates, inputs.generated, strict=True):
            scores = pair_scores(image_set, inputs.counterparts, distances, options.progress)
            values |= paired_metrics(scores, blocks)
            if image_set is inputs.fake:
                images["grid_pairs"] = worst_pairs(image_set, inputs.counterparts, scores["psnr"], notes)
    return report(inputs, network, options, estimates, images, time.perf_counter() - started)


def prepare(
    inputs: Inputs, network: FeatureNetwork | None, options: Options
) -> tuple[FeatureNetwork | None, dict[str, Distance]]:
    """The network on its device, None if no metric needs it; and the distances of pairs.

    Raises UserError for one that is missing, before any computation.
    """
    distances = {} if inputs.counterparts is None else _distances(options)
    if not options.network_metrics:
        return None, distances
    if network is None or inputs.real is None:
        raise UserError("these metrics need a network and real images; only --metrics paired does not")
    for module in ("scipy.linalg", "torch_fidelity"):  # a missing one must not end a long run
        require(module)
    if hasattr(network, "to"):  # others compute where their input is
        network = network.to(options.device)
    return network, distances


def _distances(options: Options) -> dict[str, Distance]:
    """Those of every metric of pairs, except for unnamed ones on request; loads their weights."""
    chosen = [m for name, m in METRICS.items() if not m.on_request or name in (options.metrics or ())]
    return {key: load(options.device) for metric in chosen for key, load in metric.distances.items()}


def feature_metrics(
    inputs: Inputs,
    network: FeatureNetwork | None,
    options: Options,
    blocks: Blocks,
    features: Callable[[FeatureNetwork], tuple[Features, list[Features]]],
) -> list[Estimates]:
    """The metrics of each generated set, computed by the first process: without values where features are not finite.

    `features` is called by all processes and returns those of the real and of each generated set to the first.
    """
    if network is None:
        return [{} for _ in inputs.generated]
    estimates = list[Estimates]()
    try:
        real, fakes = features(network)
        if rank() == 0:
            data = partial(Data, real, blocks=blocks, device=options.device)
            with full_precision(), progress("computing", options.progress, "metrics") as update:
                estimates = [compute_metrics(options.network_metrics, data(fake=fake), update) for fake in fakes]
    except NotFiniteError as error:
        reason = Estimate(None, reason=str(error))
        estimates = [dict.fromkeys(options.network_metrics, reason) for _ in inputs.generated]
    prefix = "" if network.comparable else RANDOM
    return [{prefix + name: estimate for name, estimate in each.items()} for each in gather(estimates)[0]]


def _extracted(inputs: Inputs, options: Options, network: FeatureNetwork) -> tuple[Features, list[Features]]:
    """One pass over every set. Raises NotFiniteError on all processes."""
    with extraction(options) as how:
        real = reference(inputs, network, options, how)
        return real, [extract(image_set, network, FAKE_ROWS, how) for image_set in inputs.generated]


@contextmanager
def extraction(options: Options) -> Iterator[Extraction]:
    """How features are computed; without a cache their files are removed at the end, and stay mapped."""
    with features_folder(options.cache) as folder:
        yield Extraction(folder, options.device, options.batch_size, options.progress)


def reference(inputs: Inputs, network: FeatureNetwork, options: Options, how: Extraction) -> Features:
    """The features of the real images, on the first process, which saves them on request. Raises UserError."""
    if inputs.real is None:
        return Features({}, {})
    real = _reference(inputs.real, network, how)
    if rank() == 0 and options.save_stats:
        rows = {"features": real.rows["pool"]} if "pool" in real.rows else {}
        save_statistics(options.save_stats, real.gaussians, network.digest, **rows)
    return real


def _reference(real: ImageSet, network: FeatureNetwork, how: Extraction) -> Features:
    """Features of the real images; or stored statistics, with rows that are stored too or from images beside them."""
    source = real.source
    if not source.gaussians:
        return extract(real, network, REAL_ROWS, how)
    if source.extractor != network.digest and not (source.extractor == "inception" and network.comparable):
        raise UserError(
            f"the statistics in {source.path} come from other weights ({source.extractor[:12]}) than this run's "
            f"{network.name} ones ({network.digest[:12]}); use the same weights for both"
        )
    for layer, gaussian in source.gaussians.items():
        if gaussian.mean.size != network.widths[layer]:
            widths = f"{gaussian.mean.size} {layer} features, the network {network.widths[layer]}"
            raise UserError(f"the statistics in {source.path} have {widths}; compute them with this network")
    rows = extract(real, network, REAL_ROWS, how).rows if real.count else {}
    return Features(source.gaussians, rows if source.rows is None else {"pool": source.rows})


def picture_notes(network: FeatureNetwork | None) -> tuple[str, ...]:
    """What stands below the images of a report."""
    return () if network is None or network.comparable else (NOT_COMPARABLE,)


def report(
    inputs: Inputs,
    network: FeatureNetwork | None,
    options: Options,
    estimates: list[Estimates],
    images: dict[str, Pixels],
    seconds: float,
) -> Report:
    """The report of the metrics of each generated set, with its protocol and warnings; images are (H, W, 3)."""
    metrics, second = estimates[0], estimates[1] if len(estimates) > 1 else {}
    warnings = [warning for image_set in inputs.named.values() for warning in image_set.warnings]
    warnings += input_warnings(inputs, network, options.network_metrics)
    return Report(
        metrics=metrics,
        second=second,
        difference={name: metrics[name].minus(other) for name, other in second.items()},
        protocol=protocol(inputs, network, options),
        inputs={name: image_set.describe() for name, image_set in inputs.named.items()},
        versions=versions(),
        warnings=tuple(warnings),
        seconds=seconds,
        failed=_failed(options, metrics),
        images=images,
    )


def _failed(options: Options, metrics: Estimates) -> tuple[str, ...]:
    """The named metrics that have no value."""
    available = {key.removeprefix(RANDOM) for key, estimate in metrics.items() if estimate.value is not None}
    return tuple(name for name in options.metrics or () if METRICS[name].headline not in available)
