"""What the C library is made of, for build.py and for setup.py; nothing is imported from here on."""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).with_name("csrc")
FLAGS = ["-O3", "-std=gnu11", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
COMPILE = {"extra_compile_args": FLAGS, "extra_link_args": ["-fopenmp"]}  # as setuptools wants it


def files() -> list[str]:
    """One for each instruction set, and the mark of origin; relative in setup.py, as setuptools wants it."""
    return sorted(str(path) for path in FOLDER.glob("*.c"))


def source_hash() -> str:
    """Of all sources and headers: a library made from others is not used."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(FOLDER.glob("*.[ch]")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
