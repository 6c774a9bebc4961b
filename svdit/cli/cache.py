"""`svdit cache`: a copy of a checkpoint with a plan that skips blocks while sampling with certain settings."""

import argparse
from typing import Any

from svdit.cli import outputs, sampling, setup
from svdit.cli.arguments import Parser, integer, number, path
from svdit.cli.result import Result

CFG_SCALE = 1.5  # as `svdit generate`


def parser() -> Parser:
    """The options of `svdit cache`."""
    parser = Parser(
        "svdit cache",
        description="Plan which blocks run at which sampling steps; the others are predicted from earlier steps. The "
        "plan is measured on the model's own trajectories, and sample and generate follow it with the same settings.",
    )
    add = parser.add_argument
    add("ckpt", type=path, metavar="FILE", help="checkpoint, quantized or not, or digits, digits-sit, digits-jit")
    add(
        "--speedup", type=number("of at least 1", lambda x: x >= 1), required=True, metavar="X", help="2: half the work"
    )
    outputs.add_output(parser, "cached_model.safetensors", ".safetensors or .pt; ")
    add("--images", type=integer(1, 1024), default=8, metavar="N", help="images to measure on; default: %(default)s")
    add("--model", metavar="NAME", help="DiT-XL/2, SiT-B/4, ...; must match the checkpoint")
    setup.add_shape(parser)
    setup.add_device(parser)
    setup.add_seed(parser)
    setup.add_speed(parser)
    sampling.add_steps(parser, CFG_SCALE)
    parser.set_defaults(image_size=None, vae=None)
    return parser


def run(args: argparse.Namespace) -> Result:
    """Measure, plan, check, and write the copy."""
    from svdit.checkpoints.io import fingerprint
    from svdit.checkpoints.store import save_model
    from svdit.files import exclusive
    from svdit.progress import progress
    from svdit.report.tables import plan_lines
    from svdit.sampling.batch import check_guidance
    from svdit.sampling.caching import Planner

    outputs.output_file(args, ".safetensors", ".pt")
    device = setup.device(args.device)
    with exclusive(args.output):
        source = setup.load_checkpoint(args, device)
        outputs.check_distinct("--output", args.output, source.path)
        config = sampling.settings(args, source.model, CFG_SCALE).config
        check_guidance(source.model, config.scale(source.model.config))
        model = setup.accelerated(source.model, args)
        with progress("measuring", unit="trajectories") as tick:
            plan = Planner(model, config, images=args.images, seed=args.seed, progress=tick).plan(args.speedup)
        copy = setup.load_checkpoint(args, device).model  # the accelerated one has no tensors to save
        copy.cache_plan = plan
        origin: dict[str, Any] = {"source": {"file": source.path.name, "sha256": fingerprint(source.path)}}
        provenance = (source.header or {}).get("provenance") or origin
        save_model(copy, args.output, name=source.name, provenance=provenance)
    data = {"output": args.output, "groups": plan.groups, "runs": plan.runs, **plan.record}
    return Result(data, [*plan_lines(plan, copy.config.depth), args.output], [args.output])
