"""`svdit export`: a checkpoint in the format of another tool."""

import argparse
from pathlib import Path

from svdit.cli import outputs, setup
from svdit.cli.arguments import Parser, output, path
from svdit.cli.result import Result
from svdit.errors import UserError
from svdit.printing import note

SUFFIXES = {"float": (".safetensors", ".pt"), "onnx": (".onnx",)}
TIMESTEPS = "diffusers' DiT spaces timestep frequencies by 1/127, the published one by 1/128"
CORRECTED = {  # by whether it is quantized: a full-precision folder must load without svdit
    True: "config.json asks for the latter: import svdit.integrations.diffusers before loading",
    False: "after loading, call svdit.integrations.diffusers.published_timesteps_(model) for the latter",
}


def parser() -> Parser:
    """The options of `svdit export`."""
    parser = Parser("svdit export", description="Write a checkpoint, quantized or not, in the format of another tool.")
    add = parser.add_argument
    add("ckpt", type=path, metavar="FILE", help="checkpoint, quantized or not, or digits, digits-sit, digits-jit")
    add(
        "--to",
        choices=("float", "diffusers", "onnx"),
        required=True,
        help="float: a state dict under the published names, quantized layers multiplied out; diffusers: a folder of "
        "DiTTransformer2DModel; onnx: the forward pass as a graph, with INT8 layers as QDQ",
    )
    add("--output", type=output, required=True, help=".safetensors or .pt; a new folder; .onnx")
    add("--model", metavar="NAME", help="DiT-XL/2, SiT-B/4, ...; must match the checkpoint")
    setup.add_shape(parser)
    parser.set_defaults(image_size=None, vae=None)
    return parser


def run(args: argparse.Namespace) -> Result:
    """Load, convert, write. Raises UserError for models that the format cannot hold."""
    import torch

    from svdit.files import exclusive

    if args.to in SUFFIXES:
        outputs.output_file(args, *SUFFIXES[args.to])
    elif args.output.exists():
        raise UserError(f"--output is {args.output}, which exists; choose a new folder, or delete it")
    with exclusive(args.output):
        source = setup.load_checkpoint(args, torch.device("cpu"))
        outputs.check_distinct("--output", args.output, source.path)
        if source.model.cache_plan:
            note("the cache plan is omitted: it is for svdit's samplers")
        WRITERS[args.to](source, args.output)
    return Result({"output": args.output, "format": args.to}, [args.output], [args.output])


def write_float(source: setup.Checkpoint, place: Path) -> None:
    """A .safetensors file with svdit's header too, or a plain state dict as .pt."""
    import torch

    from svdit.checkpoints.store import save_model
    from svdit.export.plain import multiplied_out
    from svdit.files import atomic_path
    from svdit.model.dit import DiT

    tensors = multiplied_out(source.model)
    if place.suffix == ".pt":
        with atomic_path(place) as temporary:
            torch.save(tensors, temporary)
        return
    with torch.device("meta"):
        model = DiT(source.model.config)
    model.load_state_dict(tensors, assign=True)
    model.class_names = source.model.class_names
    save_model(model, place, name=source.name, provenance=origin(source))


def write_diffusers(source: setup.Checkpoint, place: Path) -> None:
    """A folder for `from_pretrained`."""
    from svdit.files import temporary_folder, writing
    from svdit.integrations.dit import write_folder
    from svdit.quant.linear import layer_specs

    with writing(place), temporary_folder(place.parent) as folder:
        whole = folder / "model"
        whole.mkdir()
        write_folder(source.model, whole)
        whole.rename(place)
    note(f"{TIMESTEPS}; {CORRECTED[bool(layer_specs(source.model))]}")


def write_onnx(source: setup.Checkpoint, place: Path) -> None:
    """One file."""
    from svdit.export.onnx import onnx_model
    from svdit.files import atomic_path

    content = onnx_model(source.model).SerializeToString()
    with atomic_path(place) as temporary:
        temporary.write_bytes(content)


def origin(source: setup.Checkpoint) -> dict[str, object]:
    """Where the weights come from."""
    from svdit.checkpoints.io import fingerprint

    return {"source": {"file": source.path.name, "sha256": fingerprint(source.path)}}


WRITERS = {"float": write_float, "diffusers": write_diffusers, "onnx": write_onnx}
