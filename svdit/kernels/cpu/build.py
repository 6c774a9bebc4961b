"""The kernels in C as one shared library: the installed one, or compiled at first use into the user's cache.

It holds every instruction set of this kind of processor; ffi.py chooses. A library is used only if it was compiled
from exactly the sources in csrc/. SVDIT_KERNELS names another library instead (`make sanitize` does), CC another
compiler.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch  # before our library: it brings the OpenMP runtime that both use

from svdit.kernels.cpu.sources import FLAGS, files, source_hash
from svdit.printing import write_error


class MissingKernelsError(Exception):
    """Why there is no library."""


def library() -> ctypes.CDLL:
    """The library. Raises MissingKernelsError, with the reason, where there is none."""
    result = _attempt()
    if isinstance(result, str):
        raise MissingKernelsError(result)
    return result


@cache
def _attempt() -> ctypes.CDLL | str:
    """The library or why there is none, so that a failing compiler runs only once per process."""
    try:
        return _find()
    except MissingKernelsError as error:
        return str(error)


def _find() -> ctypes.CDLL:
    torch.get_num_threads()
    before = openmp_runtimes()
    lib = _load(os.environ["SVDIT_KERNELS"]) if "SVDIT_KERNELS" in os.environ else _installed() or _cached()
    if lib is None:
        path = os.environ.get("SVDIT_KERNELS", "the compiled library")
        raise MissingKernelsError(f"{path} was not made from these sources; unset SVDIT_KERNELS")
    if before and openmp_runtimes() != before:
        raise MissingKernelsError(f"the kernels loaded a second OpenMP runtime beside torch's {', '.join(before)}")
    return lib


def openmp_runtimes() -> list[str]:
    """Files of OpenMP runtimes mapped into this process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _load(path: str | Path) -> ctypes.CDLL | None:
    """The library at `path`, None if it was made from other sources."""
    try:
        lib = ctypes.CDLL(str(path))
        lib.svdit_source.restype = ctypes.c_char_p
        return lib if lib.svdit_source() == source_hash().encode() else None
    except (OSError, AttributeError) as error:
        raise MissingKernelsError(f"{path} cannot be loaded ({error})") from error


def _installed() -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob("_library*.so"):
        if lib := _load(path):
            return lib
    return None


def _cached() -> ctypes.CDLL | None:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "svdit" / f"kernels-{source_hash()}.so"
    if not path.exists():
        compile_library(path)
    return _load(path)


def compile_library(path: Path, extra: Sequence[str] = ()) -> None:
    """Compile the sources into `path`, with `extra` flags. Raises MissingKernelsError where that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise MissingKernelsError("there is no C compiler (cc, gcc or clang); install one for fast inference")
    write_error(f"compiling the CPU kernels with {compiler}, once")
    define = f'-DSVDIT_SOURCE="{source_hash()}"'
    with tempfile.TemporaryDirectory() as folder:
        objects = [(source, Path(folder) / f"{Path(source).stem}.o") for source in files()]
        flags = [*compiler.split(), *FLAGS, *extra]
        _run([[*flags, define, "-c", source, "-o", str(made)] for source, made in objects])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            _run([[*flags, "-shared", *(str(made) for _, made in objects), "-lm", "-o", str(fresh)]])
            fresh.replace(path)
        except OSError as error:
            raise MissingKernelsError(f"{path} cannot be written ({error})") from error


def _run(commands: list[list[str]]) -> None:
    """Run all commands in parallel."""
    try:
        running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    except OSError as error:
        raise MissingKernelsError(f"{commands[0][0]} cannot be run ({error})") from error
    messages = [process.communicate()[1] for process in running]
    for process, message in zip(running, messages, strict=True):
        if process.returncode:
            raise MissingKernelsError(f"the kernels did not compile:\n{message.strip()[-2000:]}")
