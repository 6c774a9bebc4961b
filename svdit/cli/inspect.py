"""`svdit inspect`: what a checkpoint contains, from its header and the shapes of its tensors; no model is built."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from svdit.cli import setup
from svdit.cli.arguments import Parser, path
from svdit.cli.result import Result
from svdit.printing import printable

if TYPE_CHECKING:
    from torch import Tensor

    from svdit.model.dit import DiTConfig
    from svdit.quant.linear import LinearSpec
    from svdit.report.tables import Stored

SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
LARGE = 20  # entries, from which on a dict in the header is not printed
WIDTH = 80  # columns


def parser() -> Parser:
    """The options of `svdit inspect`."""
    parser = Parser("svdit inspect", description="Show what a checkpoint contains, layer by layer.")
    parser.add_argument("file", type=path, metavar="FILE", help="any checkpoint, or digits, digits-sit, digits-jit")
    parser.add_argument("--model", metavar="NAME", help="DiT-XL/2, SiT-B/4, ...; for files whose shapes leave a choice")
    setup.add_shape(parser)
    return parser


def run(args: argparse.Namespace) -> Result:
    """The configuration, the provenance and the table of quantized layers."""
    from rich.constrain import Constrain

    from svdit.checkpoints import io, restore, store
    from svdit.checkpoints.quantizer import from_quantizer
    from svdit.report.tables import plan_lines, spec_table, transform_text

    path = store.locate(args.file)
    contents = from_quantizer(io.contents(path), path)
    store.check_finite(contents.tensors, path)
    tensors = {name: tensor.to("meta") if tensor.ndim > 1 else tensor for name, tensor in contents.tensors.items()}
    contents = contents._replace(tensors=tensors)  # with its vectors: a batch norm's are part of the configuration
    _, config = store.configured(contents, args.model, setup.claims(args), path, args.latent_stats)
    header = contents.header or {}
    specs = restore.specs_from_header(header, path)
    names = store.class_names(header, config, path)
    plan = restore.cache_plan(header, config, path)
    layers = {name: (spec, *size(name, spec, tensors)) for name, spec in specs.items()}
    backend, fallbacks = execution(layers) if layers else (None, "")
    data = {
        "file": path,
        "bytes": sum(part.stat().st_size for part in io.parts(path)),
        "name": header.get("name") or None,
        "config": asdict(config),
        "class_names": names,
        "layers": [
            {"name": name, "shape": (rows, columns), "bytes": nbytes, **asdict(spec)}
            for name, (spec, rows, columns, nbytes) in layers.items()
        ],
        "backend": backend,
        "fallbacks": fallbacks or None,
        "caching": plan and asdict(plan),
        "provenance": header.get("provenance", {}),
    }
    lines = [*text(data, config, guessed=not header), *(plan_lines(plan, config.depth) if plan else ())]
    if layers:
        lines.append(f"transforms: {transform_text(layers)}")
    shown = [part for line in lines for part in wrapped(line)]
    return Result(data, [*shown, Constrain(spec_table(layers), WIDTH)] if layers else shown)


def text(data: dict[str, Any], config: "DiTConfig", guessed: bool) -> Iterator[str]:
    """The lines above the table; `guessed`: the file has no header."""
    from svdit.checkpoints.families import NAMES

    yield f"file: {data['file'].name}, {data['bytes'] / 1e6:.2f} MB"
    yield f"family: {config.family}, prediction: {config.prediction}, time: {config.time}, path: {config.path}"
    name = data["name"] or f"a {NAMES[config.family]}"
    yield f"model: {name}, {pairs(shown(config))}"
    if config.latent_std:
        yield f"latents: normalized, with the statistics of {len(config.latent_std)} channels"
    yield f"classes: {classes(config, guessed)}"
    if data["class_names"]:
        yield f"class names: {listed(data['class_names'])}"
    yield f"layers: {len(data['layers']) or 'none'} quantized"
    if data["backend"]:
        yield f"backend on this machine: {data['backend']}"
    if data["fallbacks"]:
        yield data["fallbacks"]
    yield from groups(data["provenance"])


def wrapped(line: str) -> list[str]:
    """The line as several of at most WIDTH columns, further ones indented; words that are shorter stay whole."""
    return wrap(printable(line), WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]


def shown(config: "DiTConfig") -> dict[str, Any]:
    """The sizes of a configuration, and what differs from a DiT's."""
    elsewhere = ("family", "prediction", "time", "path", "latent_mean", "latent_std")
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in elsewhere and (field.name in SIZES or getattr(config, field.name) != field.default)
    }


def execution(layers: "Mapping[str, Stored]") -> tuple[str, str]:
    """The backend on this machine, and the layers that it does not support, as a sentence; "" for none."""
    from svdit.kernels import ops

    device = setup.device(None)
    backend = ops.choose(device)
    shapes = {name: (spec, (rows, columns)) for name, (spec, rows, columns, _) in layers.items()}
    return ops.describe(backend), setup.unsupported(shapes, backend, device)


def classes(config: "DiTConfig", guessed: bool) -> str:
    """The number of classes, and what the last row of the label table is; `guessed`: no header says so."""
    if not config.has_null_class:
        return f"{config.num_classes}, no null class, so no guidance"
    rows = config.num_classes + 1
    doubt = f"; if all {rows} rows of the label table are classes, pass --num-classes {rows}" if guessed else ""
    return f"{config.num_classes} and the null class of guidance{doubt}"


def listed(names: Sequence[str]) -> str:
    """The names, or where there are many, the first and the last."""
    return ", ".join(names) if len(names) <= LARGE else f"{names[0]} … {names[-1]}"


def size(name: str, spec: "LinearSpec", tensors: Mapping[str, "Tensor"]) -> tuple[int, int, int]:
    """(O, I, bytes) of a quantized layer; widths are multiples of 8, so codes fill whole bytes."""
    stored = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    kind, form = ("residual", spec.weight) if spec.weight else ("l2", spec.factors)
    codes = stored.get(f"{kind}_codes", stored.get("l2"))
    rows = next(stored[key] for key in ("residual_codes", "l1_codes", "l1") if key in stored)
    columns = 0 if codes is None else codes.shape[1] * 8 // form.bits if form else codes.shape[1]
    return rows.shape[0], columns, sum(tensor.nbytes for tensor in stored.values())


def groups(tree: dict[str, Any], name: str = "provenance") -> Iterator[str]:
    """A line for every dict that holds more than dicts: its dotted name and its values; large ones are left out."""
    if values := {key: value for key, value in tree.items() if not isinstance(value, dict)}:
        yield f"{name}: {pairs(values)}"
    for key, value in tree.items():
        if isinstance(value, dict) and len(value) <= LARGE:
            yield from groups(value, f"{name}.{key}" if name != "provenance" else key)


def pairs(values: Mapping[str, Any]) -> str:
    """ "depth=2, num_heads=4" """
    return ", ".join(f"{key}={brief(value)}" for key, value in values.items())


def brief(value: Any) -> str:
    """The value with at most 6 digits; of a list of dicts its length."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return str(len(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
