"""`evaluate(real, fake, network, options) -> Report`: images → features → statistics → metrics → report.

Metrics that the inputs do not allow (a reference of statistics only, too few images) are empty, with the reason.
Under torchrun the processes share the images, and all return the same report.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from svdit.distributed import gather, rank
from svdit.errors import UserError
from svdit.evaluation.features import Extraction, FeatureNetwork, Features, NotFiniteError, extract, features_folder
from svdit.evaluation.figures import caption, overview, worst_pairs
from svdit.evaluation.inputs import Inputs, open_inputs
from svdit.evaluation.jackknife import Blocks, Estimate, Estimates, assign_blocks
from svdit.evaluation.metrics import METRICS, RANDOM, Data, compute_metrics
from svdit.evaluation.options import Options
from svdit.evaluation.paired import Distance, paired_metrics
from svdit.evaluation.protocol import input_warnings, protocol, versions
from svdit.evaluation.report import NOT_COMPARABLE, Report
from svdit.evaluation.sources import ImageSet
from svdit.evaluation.statistics import save_statistics
from svdit.extras import require
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
    network = network if options.network_metrics else None
    fakes = [inputs.fake] if inputs.second is None else [inputs.fake, inputs.second]
    blocks = assign_blocks(inputs.fake.count)
    distances = {} if inputs.counterparts is None else _distances(options)
    estimates: list[Estimates] = [{} for _ in fakes]
    if options.network_metrics:
        estimates = _from_features(inputs, fakes, network, options, blocks)
    images = {"grid_fake": overview(inputs.fake)}
    if inputs.counterparts is not None:
        for values, image_set in zip(estimates, fakes, strict=True):
            paired, psnrs = paired_metrics(image_set, inputs.counterparts, blocks, distances, options.progress)
            values |= paired
            if image_set is inputs.fake:
                images["grid_pairs"] = worst_pairs(image_set, inputs.counterparts, psnrs)
    if network is not None and not network.comparable:
        images = {name: caption(image, NOT_COMPARABLE) for name, image in images.items()}
    metrics, second = estimates[0], estimates[1] if len(fakes) > 1 else {}
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
        seconds=time.perf_counter() - started,
        failed=_failed(options, metrics),
        images=images,
    )


def _distances(options: Options) -> dict[str, Distance]:
    """Those of every metric of pairs, except for unnamed ones on request; loads their weights."""
    chosen = [m for name, m in METRICS.items() if not m.on_request or name in (options.metrics or ())]
    return {key: load(options.device) for metric in chosen for key, load in metric.distances.items()}


def _from_features(
    inputs: Inputs, fakes: list[ImageSet], network: FeatureNetwork | None, options: Options, blocks: Blocks
) -> list[Estimates]:
    """One pass over every set by all processes, then the metrics of each generated set by the first process."""
    if network is None or inputs.real is None:
        raise UserError("these metrics need a network and real images; only --metrics paired does not")
    for module in ("scipy.linalg", "torch_fidelity"):  # a missing one must not end a long run
        require(module)
    if hasattr(network, "to"):  # others compute where their input is
        network = network.to(options.device)
    try:
        estimates = _estimates(inputs.real, fakes, network, options, blocks)
    except NotFiniteError as error:
        estimates = [dict.fromkeys(options.network_metrics, Estimate(None, reason=str(error))) for _ in fakes]
    prefix = "" if network.comparable else RANDOM
    return [{prefix + name: estimate for name, estimate in each.items()} for each in gather(estimates)[0]]


def _estimates(
    reals: ImageSet, fakes: list[ImageSet], network: FeatureNetwork, options: Options, blocks: Blocks
) -> list[Estimates]:
    """The metrics of features of each generated set, on the first process. Raises NotFiniteError on all of them."""
    with features_folder(options.cache) as folder:
        how = Extraction(folder, options.device, options.batch_size, options.progress)
        real = _reference(reals, network, how)
        if rank() == 0 and options.save_stats:
            rows = {"features": real.rows["pool"]} if "pool" in real.rows else {}
            save_statistics(options.save_stats, real.gaussians, network.digest, **rows)
        features = [extract(image_set, network, FAKE_ROWS, how) for image_set in fakes]
        if rank() != 0:
            return []
        data = partial(Data, real, blocks=blocks, device=options.device)
        with progress("computing", options.progress, "metrics") as update:
            return [compute_metrics(options.network_metrics, data(fake=fake), update) for fake in features]


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


def _failed(options: Options, metrics: Estimates) -> tuple[str, ...]:
    """The named metrics that have no value."""
    available = {key.removeprefix(RANDOM) for key, estimate in metrics.items() if estimate.value is not None}
    return tuple(name for name in options.metrics or () if METRICS[name].headline not in available)
