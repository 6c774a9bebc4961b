"""What users get wrong, as a table: exit code 2, one line on stderr with the value and a remedy, and nothing written.

A row is a command line and words of the message; a new mistake is a new row. The names in braces are files that
`inputs` writes. Errors of the command line itself end with "see `… --help`".
"""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from pixels import ROOT, pixel_model, saved
from worlds import Run

from svdit.checkpoints.store import save_model
from svdit.cli import COMMANDS, command
from svdit.files import sha256
from svdit.images import write_png
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.quantize import quantize_

HUGE, NINES = str(10**30), "9" * 20
SHAPE = (2, 8, 8, 3)

MODEL = [  # of sample, generate and quantize
    ("--ckpt nowhere.pt", "nowhere.pt", "pass a file"),
    ("--ckpt ''", "'' is not a path"),
    ("--ckpt {empty}", "empty"),
    ("--ckpt {text}", "text", "not a checkpoint"),
    ("--ckpt {text}/a.pt", "text/a.pt"),
    ("--ckpt {fifo}", "neither a file nor a folder"),
    ("--ckpt /dev/null", "'/dev/null' is neither a file nor a folder"),
    ("--ckpt {long}", "File name too long"),
    ("--ckpt", "--ckpt: expected one argument"),
    ("--ckpt {set}", "set"),
    ("--model DiT-Z/2", "'DiT-Z/2'", "DiT-XL/2"),
    ("--model ''", "''", "DiT-XL/2"),
    ("--image-size 256", "256", "8×8", "omit it"),
    ("--image-size 0", "'0' is not an integer from 1 to 8192"),
    ("--image-size 100000000", "'100000000' is not an integer from 1 to 8192"),
    ("--num-classes 1000", "5 and not 1000", "pass the options of the file"),
    (f"--num-classes {HUGE}", HUGE, "from 1 to 1000000"),
    ("--device meta", "'meta' is not supported; choose cpu"),
    ("--device mps", "'mps' is not supported; choose cpu"),
    ("--device cpu:7", "'cpu:7' is not supported; choose cpu"),
    ("--device cuda:-1", "'cuda:-1' is not supported; choose cpu"),
    ("--device ''", "'' is not supported; choose cpu"),
    ("--ckp {tiny}", "unrecognized arguments: --ckp", "did you mean --ckpt?"),
    ("--chkpt {tiny}", "unrecognized arguments: --chkpt", "did you mean --ckpt?"),
    ("stray", "unrecognized arguments: stray"),
]
SAMPLING = [  # of sample and generate
    ("--steps 20", "unrecognized arguments: --steps 20", "did you mean --num-sampling-steps?"),
    ("--num-sampling-steps ddim10,10", "'ddim10,10'", "use 250, ddim50"),
    ("--num-sampling-steps ddim1", "selects 1 of 1000", "choose a divisor"),
    ("--num-sampling-steps 0", "'0'", "use 250, ddim50"),
    ("--num-sampling-steps -5", "'-5'", "use 250, ddim50"),
    ("--num-sampling-steps 1001", "1001", "choose at most 1000"),
    ("--num-sampling-steps 1e2", "'1e2'", "use 250, ddim50"),
    ("--num-sampling-steps ''", "''", "use 250, ddim50"),
    ("--num-sampling-steps ²", "'²'", "use 250, ddim50"),
    ("--cfg-scale 1e30", "'1e30' is not a number from 0 to 100"),
    ("--cfg-scale nan", "'nan' is not a number from 0 to 100"),
    ("--cfg-scale -1", "'-1' is not a number from 0 to 100"),
    ("--cfg-scale 1_0", "'1_0' is not a number from 0 to 100"),
    ("--cfg-interval 700 100", "700 to 100", "choose two ascending"),
    ("--cfg-interval 1 2 --num-sampling-steps 2", "1 to 2", "choose a wider one"),
    ("--cfg-interval 5", "expected 2 arguments"),
    ("--cfg-interval 0 1000", "'1000' is not a number from 0 to 999"),
    ("--cfg-interval 0.5 100", "0.5 100", "choose integers"),
    ("--protocol dit-25", "'dit-25'", "dit-250"),
    ("--protocol sit-sde-250", "for the family sit, but the model's is dit", "choose from dit-250"),
    ("--time-shift 0", "'0' is not a number above 0"),
    ("--sde-form sigmoid", "'sigmoid'", "sigma"),
    ("--last-step-size 2", "'2' is not a number above 0 and at most 1"),
    ("--cfg-channels two", "'two'", "three"),
    ("--sampler eular", "'eular'", "ddim"),
    ("--vae mse", "mse", "choose none"),
    ("--vae ''", "'' is not a path"),
    ("--vae {text}", "text", "choose"),
    ("--backend triton", "triton cannot be used here", "choose auto"),
    ("--backend quick", "'quick'", "dequant"),
    ("--ckpt {quantized} --backend triton", "triton cannot be used here", "choose auto"),
]
MISTAKES: dict[str, list[tuple[str, ...]]] = {
    "sample --ckpt {tiny} --output a.png": [
        *MODEL,
        *SAMPLING,
        ("--classes 5", "class 5", "0 to 4"),
        (f"--classes {NINES}", NINES, "0 to 4"),
        ("--classes -1", "no class -1;", "0 to 4"),
        ("--classes ''", "no class ''", "0 to 4"),
        ("--classes 0x1", "no class 0x1", "0 to 4"),
        ("--classes ٣", "no class ٣", "0 to 4"),
        ("--classes", "--classes: expected at least one argument"),
        ("--seed 1.5", "'1.5' is not an integer from 0"),
        (f"--seed {HUGE}", HUGE, "2^63 - 1"),
        ("--output a.jpg", "a.jpg", "ends in .png"),
        ("--output ''", "'' is not a path"),
        ("--output {empty}", "empty", "ends in .png"),
        ("--output {text}/a.png", "text", "choose another"),
        ("--output {fifo}", "fifo.png", "neither a file nor a folder"),
        ("--output {set}/a.png", "set/a.png", "inside the images of", "choose a folder outside"),
        ("--output {set}/deeper/a.png", "set/deeper/a.png", "choose a folder outside"),
        ("--ckpt {tiny_png} --output {tiny_png}", "also the input", "choose another name"),
    ],
    "generate --ckpt {tiny} --sample-dir new --num-fid-samples 2": [
        *MODEL,
        *SAMPLING,
        ("--num-fid-samples 0", "'0' is not an integer from 1"),
        (f"--num-fid-samples {HUGE}", HUGE, "10000000"),
        ("--num-fid-samples 1e3", "'1e3' is not an integer from 1"),
        ("--per-proc-batch-size 0", "'0' is not an integer from 1 to 65536"),
        ("--global-seed -1", "'-1' is not an integer from 0"),
        ("--label-policy all", "'all'", "balanced"),
        ("--rank-ratio 0", "'0' is not a number above 0 and at most 1"),
        ("--rank-ratio 0.5", "0.5", "not quantized", "omit it"),
        ("--ckpt {quantized} --rank-ratio 0.5", "0.5", "without a rank ratio", "omit it"),
        ("--sample-dir ''", "'' is not a path"),
        ("--sample-dir {text}", "text", "choose another"),
        ("--sample-dir {real}", ".png but no manifest.json", "choose an empty folder"),
        ("--sample-dir {set}/deeper", "inside the images of", "choose a folder outside"),
        ("--seed 1", "unrecognized arguments: --seed 1", "did you mean"),
    ],
    "quantize --ckpt {tiny} --output q.safetensors --no-figures": [
        *MODEL,
        ("--output q.bin", "q.bin", ".safetensors or .pt"),
        ("--output {tiny}", "tiny.safetensors", "also the input", "choose another name"),
        ("--output {alias}", "alias.safetensors", "also the input", "choose another name"),
        ("--output {hard}", "hard.safetensors", "also the input", "choose another name"),
        ("--output {set}/../tiny.safetensors", "also the input", "choose another name"),
        ("--output {folder_pt}", "which is a folder", "choose the name of a file"),
        ("--output {set}/q.pt", "set/q.pt", "choose a folder outside"),
        ("--preset w2a2", "'w2a2'", "w4a8"),
        ("--rank-ratio nan", "'nan' is not a number above 0"),
        ("--rank-ratio 0.5 --target-size 1", "--target-size", "--rank-ratio", "omit one"),
        ("--rank-ratio 0.5 --preset w4a8", "--preset", "--rank-ratio", "omit one"),
        ("--rank-ratio 0.5 --rank 4", "--rank", "--rank-ratio", "omit one"),
        ("--target-size 1 --target-sqnr 30", "--target-sqnr", "--target-size", "omit one"),
        ("--target-size 1 --num-bits 4", "--num-bits", "--target-size", "omit one"),
        ("--target-size 1 --rank 4", "--rank", "--target-size", "omit it"),
        ("--target-size nan", "'nan' is not a number above 0"),
        ("--target-size inf", "'inf' is not a number above 0"),
        ("--target-size 0", "'0' is not a number above 0"),
        (f"--target-size {HUGE}", HUGE, "at most 1e6"),
        ("--target-sqnr -10", "'-10' is not a number above 0 and at most 200"),
        ("--target-sqnr nan", "'nan' is not a number above 0 and at most 200"),
        ("--max-memory nan", "'nan' is not a number above 0"),
        ("--max-memory 0", "'0' is not a number above 0"),
        ("--max-memory -1", "'-1' is not a number above 0"),
        ("--num-bits 9", "'9' is not an integer from 2 to 8"),
        ("--num-bits ٤", "'٤' is not an integer from 2 to 8"),
        ("--act-bits 6", "6", "16"),
        ("--act-bits 8 --preset fp8", "--act-bits", "--preset fp8", "choose 16"),
        ("--num-bits 4 --preset nvfp4", "--num-bits", "--preset nvfp4", "omit one"),
        ("--group-size 48", "48"),
        ("--group-size -1", "'-1' is not an integer from 0"),
        ("--rank -1", "'-1' is not an integer from 0"),
        ("--rank 8 --preset rtn", "--rank", "--preset rtn", "omit one"),
        ("--rank 0 --factors int8", "--factors", "--rank 0", "omit one"),
        ("--factors int4", "'int4'", "int8"),
        ("--adaln int2", "'int2'", "fp16"),
        ("--whiten", "--whiten requires --rank-ratio", "omit it"),
        ("--skip ''", "--skip is empty", "pass a pattern"),
        ("--skip *.attn", "'*.attn'", "did you mean *.attn.*?"),
        ("--skip blocks.0.atn.*", "'blocks.0.atn.*'", "did you mean one of blocks.0.attn."),
        ("--skip *", "selects"),
        ("--calib-images 0", "'0' is not an integer from 1"),
        (f"--calib-images {10**18}", "from 1 to 1000000"),
        ("--calib-steps 1001", "'1001' is not an integer from 1 to 1000"),
        ("--cfg-scale 1e30", "'1e30' is not a number from 0 to 100"),
        ("--ckpt {quantized}", "already quantized", "load the full-precision checkpoint"),
    ],
    "inspect": [
        ("nowhere.pt", "nowhere.pt", "pass a file"),
        ("''", "'' is not a path"),
        ("", "required: FILE"),
        ("{empty}", "empty"),
        ("{text}", "text", "not a checkpoint"),
        ("{fifo}", "neither a file nor a folder"),
        ("{real_npz}", "real.npz"),
        ("{tiny} --model DiT-S/2", "DiT-S/2", "pass the options of the file"),
        ("{tiny} --model DiT-Z/2", "'DiT-Z/2'", "DiT-XL/2"),
        ("{tiny} {tiny}", "unrecognized arguments"),
        ("{tiny} --jsn", "did you mean --json?"),
        ("{tiny} --quiet yes", "unrecognized arguments: yes"),
        ("nowhere.pt --json --quiet", "nowhere.pt", "pass a file"),
    ],
    "recover --output new.safetensors": [
        ("{quantized}", "required: --against"),
        ("nowhere.pt --against {tiny}", "nowhere.pt", "pass a file"),
        ("{branchless} --against nowhere.pt", "nowhere.pt", "pass a file"),
        ("{tiny} --against {tiny}", "records no weight errors", "svdit quantize"),
        ("{quantized} --against {tiny}", "is not the source of", "its sha256 is"),
        ("{tiny} --against {quantized}", "records no weight errors", "svdit quantize"),
        ("{branchless} --against {tiny}", "no low-rank branch", "w4a8"),
        ("{branchless} --against {tiny} --output {branchless}", "also the input", "choose another name"),
        ("{branchless} --against {tiny} --output {tiny}", "also the input", "choose another name"),
        ("{branchless} --against {tiny} --output new.bin", "new.bin", ".safetensors or .pt"),
        ("{branchless} --against {tiny} --steps 0", "'0' is not an integer from 1 to 100000"),
        ("{branchless} --against {tiny} --batch-size 0", "'0' is not an integer from 1 to 65536"),
        ("{branchless} --against {tiny} --device cpu:7", "'cpu:7' is not supported; choose cpu"),
        ("{text} --against {tiny}", "text", "not a checkpoint"),
    ],
    "export": [
        ("", "required: FILE, --to, --output"),
        ("{tiny} --to gguf --output f.pt", "invalid choice: 'gguf'"),
        ("{tiny} --to float --output f.onnx", "f.onnx", ".safetensors or .pt"),
        ("{tiny} --to onnx --output f.pt", "f.pt", ".onnx"),
        ("{tiny} --to float --output {tiny}", "also the input", "choose another name"),
        ("{tiny} --to diffusers --output {empty}", "which exists; choose a new folder"),
        ("nowhere.pt --to onnx --output f.onnx", "nowhere.pt", "pass a file"),
        ("{text} --to onnx --output f.onnx", "text", "not a checkpoint"),
    ],
    "cache": [
        ("nowhere.pt --speedup 2", "nowhere.pt", "pass a file"),
        ("{tiny}", "required: --speedup"),
        ("{tiny} --speedup 0.5", "'0.5' is not a number of at least 1"),
        ("{tiny} --speedup nan", "'nan' is not a number of at least 1"),
        ("{tiny} --speedup 2 --images 0", "'0' is not an integer from 1 to 1024"),
        ("{tiny} --speedup 2 --output new.png", "new.png", ".safetensors"),
        ("{tiny} --speedup 2 --output {tiny}", "tiny"),
        ("{tiny} --speedup 2 --sampler eulr", "'eulr'"),
        ("{text} --speedup 2", "text", "not a checkpoint"),
    ],
    "verify": [
        ("{quantized}", "required: --against"),
        ("{quantized} --against {tiny}", "not the source"),
        ("{tiny} --against {tiny}", "records no weight errors", "svdit quantize"),
        ("nowhere.pt --against {tiny}", "nowhere.pt", "pass a file"),
        ("{quantized} --against nowhere.pt", "nowhere.pt", "pass a file"),
        ("{quantized} --against ''", "'' is not a path"),
        ("{fifo} --against {tiny}", "neither a file nor a folder"),
    ],
    "evaluate --real_dir {real} --fake_dir {set} --cache-dir '' --feature-extractor random": [
        ("--fake_dir nowhere", "nowhere", "fix the path"),
        ("--fake_dir ''", "'' is not a path"),
        ("--fake_dir {empty}", "empty", "pass a folder of"),
        ("--fake_dir {text}", "text", "is no folder, .npz or .tar"),
        ("--fake_dir {text_npz}", "text.npz", "create or download it again"),
        ("--fake_dir {fifo}", "neither a file nor a folder"),
        ("--real_dir nowhere", "nowhere", "fix the path"),
        ("--paired_dir {empty}", "empty", "pass a folder of"),
        ("--compare_dir nowhere", "nowhere", "fix the path"),
        ("--num_images 0", "'0' is not an integer from 1"),
        ("--num_images 3", "contains 2 images", "lower --num_images"),
        (f"--num_images {HUGE}", HUGE, "2^63 - 1"),
        ("--metrics ''", "'' has an empty name"),
        ("--metrics fid,,kid", "'fid,,kid' has an empty name"),
        ("--metrics fid,fid", "'fid,fid' names fid 2 times"),
        ("--metrics fidd", "'fidd'", "choose from fid"),
        ("--metrics fid --paired_dir {real}", "--paired_dir", "--metrics fid", "omit --paired_dir"),
        ("--metrics paired --save-stats s.npz", "--save-stats", "--metrics paired", "omit --save-stats"),
        ("--feature-extractor clip", "'clip'", "random"),
        ("--feature-extractor-weights w.pth", "--feature-extractor-weights has no effect", "omit one"),
        ("--seed 4294967296 --num_images 2", "'4294967296' is not an integer from 0 to 4294967295"),
        ("--resize-to 100000000", "'100000000' is not an integer from 1 to 8192"),
        ("--resize-to 0", "'0' is not an integer from 1"),
        ("--batch-size 0", "'0' is not an integer from 1"),
        ("--batch-size 1_0", "'1_0' is not an integer from 1"),
        ("--device cpu:7", "'cpu:7' is not supported; choose cpu"),
        ("--output {set}", "inside the images of", "choose a folder outside"),
        ("--output {set}/report", "set/report", "inside the images of", "choose a folder outside"),
        ("--output {link_to_real}/report", "inside the images of", "choose a folder outside"),
        ("--real_dir {linked} --output {real}/report", "inside the images of", "choose a folder outside"),
        ("--output {text}", "text", "choose another"),
        ("--output ''", "'' is not a path"),
        ("--save-stats {text}/s.npz", "text", "choose another"),
        ("--save-stats s.bin", "s.bin", "ends in .npz"),
        ("--save-stats {real_npz} --real_dir {real_npz}", "also the input", "choose another name"),
        ("--save-stats {alias_npz} --real_dir {real_npz}", "also the input", "choose another name"),
        ("--cache-dir {text}", "text", "choose another"),
        ("--feature-extractor inception --feature-extractor-weights nowhere.pth", "nowhere.pth", "fix the path"),
    ],
    "compare": [
        ("", "required: REPORT"),
        ("nowhere", "nowhere", "svdit evaluate --output"),
        ("{empty}", "empty", "svdit evaluate --output"),
        ("{text}", "text", "svdit evaluate --output"),
        ("''", "'' is not a path"),
        ("{fifo}", "neither a file nor a folder"),
        ("{text} --metrics ''", "'' has an empty name"),
    ],
    "report --output new.html": [
        ("", "required: RUN"),
        ("nowhere", "there is no file or folder nowhere", "pass a .report.json"),
        ("''", "'' is not a path"),
        ("{empty}", "contains no report, set or metrics", "pass a .report.json"),
        ("{text}", "text is no report", "pass a .report.json"),
        ("{tiny}", "there is no", "tiny.report.json beside", "quantize it again"),
        ("{fifo}", "neither a file nor a folder"),
        ("{real_npz} --output new.txt", "new.txt", "ends in .html"),
    ],
    "app --device cpu": [
        ("nowhere.pt", "nowhere.pt", "pass a file"),
        ("''", "'' is not a path"),
        ("{text}", "text", "not a checkpoint"),
        ("{tiny} {quantized}", "quantized.safetensors is already quantized", "pass the checkpoint"),
        ("--port 0", "'0' is not an integer from 1 to 65535"),
        ("--port 65536", "'65536' is not an integer from 1 to 65535"),
        ("--share", "unrecognized arguments: --share"),
        ("--device cpu:7", "'cpu:7' is not supported; choose cpu"),
    ],
    "selftest": [
        ("--adm-samples {real_npz}", "real.npz", "pass --adm-reference together with it"),
        ("--adm-samples '' --adm-reference ''", "'' is not a path"),
        ("--feature-extractor-weights w.pth", "no effect without --adm-samples", "omit it"),
        ("--adm-sample {real_npz}", "did you mean --adm-samples?"),
    ],
    "train --data {real_npz} --results-dir new --steps 1 --num-workers 0": [
        ("--data nowhere", "nowhere"),
        ("--data ''", "'' is not a path"),
        ("--data {empty}", "empty"),
        ("--data {fifo}", "neither a file nor a folder"),
        ("--model DiT-Z/2", "'DiT-Z/2'", "DiT-XL/2"),
        ("--data digits --image-size 16", "16", "8×8", "omit it"),
        ("--image-size 100000000", "'100000000' is not an integer from 1 to 8192"),
        (f"--num-classes {10**18}", "from 1 to 1000000"),
        ("--lr inf", "'inf' is not a number above 0 and at most 1"),
        ("--lr 0", "'0' is not a number above 0 and at most 1"),
        ("--lr 1e30", "'1e30' is not a number above 0 and at most 1"),
        ("--ema-decay 1", "'1' is not a number of at least 0 and below 1"),
        ("--label-dropout 1.5", "'1.5' is not a number of at least 0 and below 1"),
        ("--epochs 3", "--epochs", "not allowed with", "--steps"),
        ("--steps 0", "'0' is not an integer from 1"),
        (f"--steps {10**18}", "from 1 to 1000000000"),
        (f"--global-batch-size {10**18}", "from 1 to 1000000"),
        ("--num-workers 1000000", "'1000000' is not an integer from 0 to 256"),
        ("--ckpt-every 0", "'0' is not an integer from 1"),
        ("--augment crop", "'crop'", "flip"),
        ("--results-dir {text}", "text", "choose another"),
        ("--results-dir {taken}", "loss.png", "is a folder where a file belongs"),
        ("--results-dir {blocked}", "blocked/samples", "remove or rename the file"),
        ("--results-dir {set}", "inside the images of", "choose a folder outside"),
        ("--data {real} --results-dir {real}/results", "inside the images of", "choose a folder outside"),
        ("--device meta", "'meta' is not supported; choose cpu"),
        ("--vae ''", "'' is not a path"),
    ],
}  # fmt: skip
ROWS = [(base, *row) for base, rows in MISTAKES.items() for row in rows]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the table, by name."""
    root = tmp_path_factory.mktemp("mistakes")
    tiny = Path(saved(root / "tiny.safetensors"))
    model = pixel_model()
    quantize_(model, dit_config(recipe_for("rtn")))
    provenance = {"source": {"file": "x", "sha256": "0" * 64}, "quantization": {"weight_errors": {}}}
    save_model(model, root / "quantized.safetensors", name="tiny", provenance=provenance)
    provenance["source"]["sha256"] = sha256(tiny)
    save_model(model, root / "branchless.safetensors", name="tiny", provenance=provenance)
    (root / "tiny.png").write_bytes(tiny.read_bytes())
    (root / "alias.safetensors").symlink_to(tiny)
    (root / "hard.safetensors").hardlink_to(tiny)
    for name in ("empty", "folder.pt"):
        (root / name).mkdir()
    for name in ("text", "text.npz"):
        (root / name).write_text("hello", encoding="utf-8")
    os.mkfifo(root / "fifo.png")
    images = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    for name, image in zip(("real/0", "real/1", "set/000000", "set/000001"), images, strict=True):
        write_png(root / f"{name}.png", image)
    (root / "set" / "manifest.json").write_text('{\n  "tool": "svdit",\n  "num_images": 2\n}', encoding="utf-8")
    np.savez(root / "real.npz", arr_0=images, labels=np.arange(4))
    (root / "alias.npz").symlink_to(root / "real.npz")
    (root / "link").symlink_to(root / "real")
    (root / "linked").mkdir()
    (root / "taken" / "loss.png").mkdir(parents=True)
    (root / "blocked").mkdir()
    (root / "blocked" / "samples").touch()
    (root / "linked" / "class").symlink_to(root / "real")
    special = {"fifo": "fifo.png", "link_to_real": "link", "tiny": "tiny.safetensors", "long": "a" * 5000}
    special |= {f"{name}_npz": f"{name}.npz" for name in ("real", "text", "alias")}
    special |= {name: f"{name}.safetensors" for name in ("quantized", "branchless")}
    special |= {"alias": "alias.safetensors", "hard": "hard.safetensors"}
    special |= {"tiny_png": "tiny.png", "folder_pt": "folder.pt"}
    return {
        name: str(root / special.get(name, name))
        for name in ("empty", "text", "real", "set", "linked", "taken", "blocked", *special)
    }


def words(line: str, inputs: dict[str, str]) -> list[str]:
    """The words of a command line; '' is an empty one. Of an option in two places the last counts."""
    return [word.strip("'").format(**inputs) for word in line.split()]


def state(*folders: str | Path) -> list[tuple[str, int, int]]:
    """Every file below with its size and time; empty folders and locks contain no results."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
    files = [path for path in paths if path.is_symlink() or not (path.is_dir() or path.name.endswith(".lock"))]
    return [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in files]


@pytest.fixture
def workplace(tmp_path: Path, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; at the end neither it nor the inputs have changed."""
    monkeypatch.chdir(tmp_path)
    for variable in ("SVDIT_BACKEND", "SVDIT_INCEPTION_WEIGHTS"):
        monkeypatch.delenv(variable, raising=False)
    before = state(tmp_path, Path(inputs["text"]).parent)
    yield tmp_path
    assert state(tmp_path, Path(inputs["text"]).parent) == before


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row[0].split()[0]} {row[1][:40]}".encode("unicode_escape").decode()
)
def test_a_mistake_is_one_line_and_changes_nothing(
    row: tuple[str, ...], inputs: dict[str, str], workplace: Path
) -> None:
    base, line, *parts = row
    name, *argv = words(f"{base} {line}", inputs)
    if name in ("sample", "generate", "quantize", "recover", "train") and "--device" not in argv:
        argv += ["--device", "cpu"]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        command(name, argv)
    message = err.getvalue()
    assert stop.value.code == 2, message
    assert message.startswith(f"svdit {name}: ") and message.count("\n") == 1
    assert message.rstrip("\n").isprintable()
    assert [part for part in parts if part not in message] == [], message
    assert out.getvalue() == ""
    assert len(message) < 1000 or "File name too long" in message


def test_the_table_is_large_and_covers_every_command() -> None:
    assert {base.split()[0] for base in MISTAKES} == set(COMMANDS)
    assert len(ROWS) >= 120


def process(start: list[str], line: str, inputs: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, *words(line, inputs)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("line", ["smaple", "sample --seed -1", "compare nowhere", "quantize --ckpt {tiny} --rank -1"])
def test_mistakes_in_a_process_of_their_own(line: str, inputs: dict[str, str], workplace: Path) -> None:
    done = process(["-m", "svdit"], line, inputs)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


@pytest.mark.parametrize(
    ("name", "line", "part"),
    [
        ("generate", "--ckpt {text} --sample-dir new --device cpu", "is not a checkpoint"),
        ("quantize", "--ckpt {tiny} --rank-ratio 0.5 --rank 4", "--rank excludes --rank-ratio"),
        ("evaluate", "--fake_dir {set} --output {set}", "inside the images of"),
    ],
)
def test_mistakes_of_several_processes(
    name: str, line: str, part: str, inputs: dict[str, str], workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = Run(lambda: command(name, words(line, inputs)), tmp_path_factory.mktemp("errors"))
    codes, lines = run.end()
    assert codes == [2, 2]
    assert len(lines) == 1 and part in lines[0]  # one process prints it
