"""`evaluate(real, fake, network, options) -> Report`: images → features → statistics → metrics → report.

What the inputs do not allow (a reference of statistics only, too few images) is reported empty, with the reason.
Started by torchrun, the processes share the images and all return the same report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from svdit.distributed import gather, rank
from svdit.errors import UserError
from svdit.evaluation.features import FeatureNetwork, Features, Track, cache_key, extract, features_folder
from svdit.evaluation.figures import caption, overview, worst_pairs
from svdit.evaluation.frechet import Blocks
from svdit.evaluation.inputs import Inputs, Set, open_inputs
from svdit.evaluation.jackknife import assign_blocks
from svdit.evaluation.lpips import load_lpips
from svdit.evaluation.measures import Found, measure
from svdit.evaluation.options import Options
from svdit.evaluation.paired import paired_metrics
from svdit.evaluation.protocol import protocol, remarks, versions
from svdit.evaluation.report import NOT_COMPARABLE, Report
from svdit.evaluation.statistics import save_statistics

REAL_ROWS, FAKE_ROWS = ("pool",), ("pool", "spatial", "logits")
KEYS = {"prc": "precision", "paired": "psnr"}  # where a metric's main number has another name


def evaluate(
    real: str | Path | None,
    fake: str | Path,
    network: FeatureNetwork | None = None,
    options: Options | None = None,
    track: Track = lambda items, name, count: items,
) -> Report:
    """Measure the images of `fake` against those, or the statistics, of `real`; UserError for what the user can mend.

    `network` (see `inception`) may be None where only paired metrics are asked for. With `options.compare`, that set
    is measured too, and the differences are given with their errors.
    """
    options, started = options or Options(), time.perf_counter()
    inputs = open_inputs(real, fake, options)
    network = network if options.network_metrics else None
    sets = [each for each in (inputs.fake, inputs.second) if each is not None]
    blocks = assign_blocks(inputs.fake.count)
    found: list[Found] = [{} for _ in sets]
    if options.network_metrics:
        found = _network_metrics(inputs, sets, network, options, blocks, track)
    pictures = {"grid_fake": overview(inputs.fake)}
    if inputs.partners is not None:
        lpips = load_lpips(options.device) if "lpips" in (options.metrics or ()) else None
        for estimates, each in zip(found, sets, strict=True):
            paired, psnrs = paired_metrics(each, inputs.partners, blocks, track, lpips)
            estimates |= paired
            if each is inputs.fake:
                pictures["grid_pairs"] = worst_pairs(each, inputs.partners, psnrs)
    if network is not None and not network.comparable:
        pictures = {name: caption(picture, NOT_COMPARABLE) for name, picture in pictures.items()}
    second = found[1] if len(found) > 1 else {}
    warnings = [one for each in inputs.named.values() for one in each.warnings]
    warnings += remarks(inputs, network, options.network_metrics)
    return Report(
        metrics=found[0],
        second=second,
        difference={name: found[0][name].minus(other) for name, other in second.items()},
        protocol=protocol(inputs, network, options.seed),
        inputs={name: each.describe() for name, each in inputs.named.items()},
        versions=versions(),
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
        failed=_failed(options, found[0]),
        pictures=pictures,
    )


def _network_metrics(
    inputs: Inputs, sets: list[Set], network: FeatureNetwork | None, options: Options, blocks: Blocks, track: Track
) -> list[Found]:
    """One pass over every set by all processes, then the metrics of each fake one, by the first."""
    if network is None or inputs.real is None:
        raise UserError("these metrics need a network and real images; --metrics paired does without both")
    with features_folder(options.cache) as folder:

        def features(each: Set, keep: tuple[str, ...]) -> Features:
            where, how = folder / cache_key(each.content, network, each.indices), (options.device, options.batch_size)
            return extract(each.source, each.indices, network, keep, where, *how, track)

        real = _reference(inputs.real, network, features)
        fakes = [features(each, FAKE_ROWS) for each in sets]
        found: list[Found] = []
        if rank() == 0:
            if options.save_stats:
                rows = {"features": real.rows["pool"]} if "pool" in real.rows else {}
                save_statistics(options.save_stats, real.gaussians, network.digest, **rows)
            found = [measure(options.network_metrics, real, fake, blocks, options.device) for fake in fakes]
    prefix = "" if network.comparable else f"{network.name}_"
    return [{prefix + name: estimate for name, estimate in each.items()} for each in gather(found)[0]]


def _reference(real: Set, network: FeatureNetwork, features: Callable[[Set, tuple[str, ...]], Features]) -> Features:
    """The real side: from its images, or from stored statistics and, if it has them too, images or stored rows."""
    source = real.source
    if not source.gaussians:
        return features(real, REAL_ROWS)
    if source.extractor != network.digest and not (source.extractor == "inception" and network.comparable):
        told = f"the statistics in {source.path} come from other weights ({source.extractor[:12]})"
        raise UserError(f"{told} than this run's {network.name} ones ({network.digest[:12]}); they cannot be mixed")
    for layer, gaussian in source.gaussians.items():
        if gaussian.mean.size != network.widths[layer]:
            widths = f"{gaussian.mean.size} {layer} features, the network {network.widths[layer]}"
            raise UserError(f"the statistics in {source.path} have {widths}; they cannot be mixed")
    rows = features(real, REAL_ROWS).rows if real.count else {}
    return Features(source.gaussians, rows if source.rows is None else {"pool": source.rows})


def _failed(options: Options, found: Found) -> tuple[str, ...]:
    """What was asked for by name and is empty."""
    had = {name.removeprefix("random_") for name, estimate in found.items() if estimate.value is not None}
    return tuple(name for name in options.metrics or () if KEYS.get(name, name) not in had)
