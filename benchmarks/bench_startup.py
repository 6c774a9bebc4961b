"""Where the time of `sample.py` goes that is not denoising: a table of phases, wall and processor seconds.

    python benchmarks/bench_startup.py [--threads 2] [--repeats 3] [--checkout DIR] [--record NAME]

One image of a random W8A8 DiT-XL/2 at 256 px, one sampling step, a random VAE of Stable Diffusion's size. Every repeat
is a new process that runs the command with clocks around the functions in `PHASES`; a phase's time excludes that of
phases within it. Of each phase the least of all repeats is shown. Processor seconds are those of all threads, also of
the system. Where other programs run, they are the more reliable number. Needs 1.1 GB of temporary disk space.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PHASES = {  # function, as module:name, to its phase; the others' time is "rest"
    "svdit.cli.setup:checkpoint_path": "svdit's own imports",
    "svdit.checkpoints.store:load_model": "read and verify the checkpoint, build the model",
    "svdit.cli.setup:accelerated": "pack the layers",
    "svdit.cli.sampling:load_vae": "load the autoencoder",
    "svdit.sampling.batch:generate": "denoise (one step)",
    "svdit.model.autoencoder:Autoencoder.decode": "decode",
    "svdit.images:write_png": "write the PNG",
}
START, TORCH = "start Python, parse the arguments", "import torch"


def clocks() -> tuple[float, float]:
    """Seconds since the epoch, and those of all processors for this process."""
    return time.time(), time.process_time()


class Clock:
    """Wall and processor seconds by phase; the innermost phase counts."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.open, self.last = [START], (started, 0.0)

    def switch(self) -> None:
        """Add the time since the last switch to the innermost open phase."""
        now = clocks()
        total = self.seconds.setdefault(self.open[-1], [0.0, 0.0])
        for i in range(2):
            total[i] += now[i] - self.last[i]
        self.last = now

    def wrap(self, place: str, phase: str) -> None:
        """Replace a function by one that counts as `phase`."""
        from importlib import import_module

        module, _, name = place.partition(":")
        owner: Any = import_module(module)
        *path, leaf = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        function = getattr(owner, leaf)

        def timed(*args: Any, **options: Any) -> Any:
            self.switch()
            self.open.append(phase)
            try:
                return function(*args, **options)
            finally:
                self.switch()
                self.open.pop()

        setattr(owner, leaf, timed)


def child(started: float, argv: list[str]) -> None:
    """Run the command in this process and print the seconds of its phases as JSON."""
    clock = Clock(started)
    from svdit.cli import command, parser, setup

    setup.read_ahead(parser("sample").parse_args(argv))  # as the command does, before torch is imported
    with setup.uncollected():
        clock.switch()
        clock.open = [TORCH]
        import torch

        clock.switch()
        clock.open = ["svdit's own imports"]
        for place, phase in PHASES.items():
            clock.wrap(place, phase)
        clock.switch()
    clock.open = ["rest"]
    command("sample", argv)
    clock.switch()
    print(json.dumps({"threads": torch.get_num_threads(), "seconds": clock.seconds}))


def run(folder: Path, threads: int, root: Path) -> dict[str, list[float]]:
    """The phases of a new process that runs the code of a checkout."""
    argv = ["--ckpt", str(folder / "w8a8.safetensors"), "--vae", str(folder / "vae"), "--device", "cpu", "--quiet"]
    argv += ["--sampler", "ddim", "--num-sampling-steps", "1", "--classes", "207", "--output", str(folder / "a.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    script = root / "benchmarks" / "bench_startup.py"
    command = [sys.executable, str(script), "--child", repr(time.time()), *argv]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def prepare(folder: Path) -> None:
    """Write the checkpoint and the autoencoder."""
    from bench_sampling import save_vae
    from random_models import quantized

    from svdit.checkpoints.store import save_model

    save_vae(folder / "vae")
    save_model(quantized("W8A8"), folder / "w8a8.safetensors", name="DiT-XL/2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the model here, for the next run")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="of the code to measure; default: this one")
    parser.add_argument("--record", metavar="NAME", help="append the phases to results.csv under the version's name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "w8a8.safetensors").exists():
            prepare(folder)
        runs = [run(folder, args.threads, args.checkout.resolve()) for _ in range(args.repeats)]
    table = {phase: [min(each[phase][i] for each in runs) for i in range(2)] for phase in runs[0]}
    others = [seconds for phase, seconds in table.items() if not phase.startswith("denoise")]
    table["all but denoising"] = [sum(seconds) for seconds in zip(*others, strict=True)]
    print(f"{'phase':50} {'wall, s':>9} {'processor, s':>13}")
    for phase, seconds in table.items():
        print(f"{phase:50} {seconds[0]:9.2f} {seconds[1]:13.2f}")
    if args.record:
        from record import record

        setting = f"W8A8 DiT-XL/2, one image of 256 px, {args.threads} threads"
        for phase, (wall, processor) in table.items():
            record("startup", f"{args.record}: {phase}", wall, "s", f"{processor:.2f} s of processors; {setting}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
