"""The sources of the C library and the flags to compile them, for build.py and setup.py; imports nothing of svdit."""

import hashlib
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("csrc")
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none
FLAGS = ["-O3", "-std=gnu11", *OPENMP, "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
COMPILE = {"extra_compile_args": FLAGS}  # in the form setuptools expects; build.py loads an OpenMP runtime


def files() -> list[str]:
    """One file per instruction set, and source.c; relative paths in setup.py, as setuptools requires."""
    return sorted(str(path) for path in FOLDER.glob("*.c"))


def source_hash() -> str:
    """Hash of all sources and headers; a library compiled from others is not used."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(FOLDER.glob("*.[ch]")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
