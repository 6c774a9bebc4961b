"""`svdit inspect`: what a checkpoint is, layer by layer."""

import argparse

from svdit.cli import setup


def parser() -> argparse.ArgumentParser:
    """The flags of `svdit inspect`."""
    parser = argparse.ArgumentParser("svdit inspect", description="Say what a checkpoint is, layer by layer.")
    parser.add_argument("file", help="a checkpoint of any kind, or the name of an embedded model")
    parser.add_argument("--model", metavar="NAME", help="for files whose shapes do not tell")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print it."""
    from svdit.checkpoints.store import load_model, locate, read_header
    from svdit.kernels import ops
    from svdit.quant.linear import quantized_layers
    from svdit.report.tables import console, spec_table

    path = locate(args.file)
    model, header = load_model(path, name=args.model), read_header(path)
    layers = quantized_layers(model)
    out = console()
    if layers:
        out.print(spec_table(layers))
    lines = [
        f"file: {path.name}, {path.stat().st_size / 1e6:.2f} MB",
        f"model: {(header or {}).get('name') or 'a DiT'}, {model.config}",
        f"layers: {len(layers)} quantized" if layers else "layers: all at full precision",
    ]
    if layers:
        lines.append(f"runs here by: {ops.describe(ops.choose())}")
    for key, value in {} if header is None else setup.flat(header.get("provenance", {})):
        lines.append(f"{key}: {value}")
    out.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
