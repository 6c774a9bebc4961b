"""Commands whose output is not read, as under `… | head -1`."""

import os
import subprocess
import sys

from pixels import ROOT


def into_closed_pipe(*argv: str) -> tuple[int, str]:
    """Exit code and stderr of `svdit ARGV | true`: stdout is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # argparse hides errors of write()
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from svdit.cli import main; main()", *argv],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            timeout=120,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr
