"""The compiled library: nothing is loaded that was damaged, or that another user could have written."""

import ctypes
import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from svdit.cli import command
from svdit.kernels import ops
from svdit.kernels.cpu import build, ffi
from svdit.kernels.cpu.sources import source_hash

pytestmark = pytest.mark.skipif(bool(ffi.missing()), reason=ffi.missing() or "-")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache in `tmp_path`; compiling copies this process's library there. The list of what was compiled."""
    library, made = build.library()._name, list[Path]()

    def compile_library(path: Path) -> None:
        made.append(path)
        shutil.copyfile(library, path)

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.setattr(build, "_installed", lambda: None)
    monkeypatch.delenv("SVDIT_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return made


def test_the_library_is_compiled_once_and_is_private(compiled: list[Path], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = build._cached()
    finally:
        os.umask(before)
    assert build._cached() == path
    assert len(compiled) == 1
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path)] == [0o700, 0o600]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.parent == tmp_path / "cache" / "svdit" / "kernels"
    build._find()


def hand_over(path: Path) -> None:
    try:
        os.chown(path, 12345, 12345)
    except PermissionError:
        pytest.skip("only root can give files away")


def to_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 5000),
    "empty": lambda path: os.truncate(path, 0),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "of another owner": hand_over,
    "writable by the group": lambda path: path.chmod(0o660),
    "writable by all": lambda path: path.chmod(0o602),
    "a link": to_link,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_cannot_be_trusted_is_compiled_again(
    compiled: list[Path], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build._cached()
    content = path.read_bytes()
    DAMAGE[damage](path)
    assert build._cached().read_bytes() == content
    assert build.is_ours(path)
    assert len(compiled) == 2
    assert f"{path} is damaged or not your own and is compiled again" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a folder of another owner", "a folder for all", "a file", "relative", "no home"])
def test_where_the_cache_cannot_be_used_temporary_files_are(
    compiled: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    folder = tmp_path / "cache" / "svdit" / "kernels"
    if place == "a file":
        (tmp_path / "cache").touch()
    elif place.startswith("a folder"):
        folder.mkdir(parents=True)
        hand_over(folder) if "owner" in place else folder.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "relative" if place == "relative" else "/proc")
        monkeypatch.chdir(tmp_path)
    expected = tmp_path / f"svdit-kernels-{os.geteuid()}"
    assert {build._cached().parent for _ in range(3)} == {expected}
    assert len(compiled) == 1  # also at later starts
    assert f"cannot hold the compiled CPU kernels; they are in {expected}" in capsys.readouterr().err
    build._find()
    expected.chmod(0o777)
    with pytest.raises(build.MissingKernelsError, match="can hold the compiled library; set XDG_CACHE_HOME"):
        build._cached()


def test_of_two_processes_one_compiles(compiled: list[Path]) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    genuine = build.compile_library

    def compile_library(path: Path) -> None:
        queue.put(path)
        genuine(path)

    build.compile_library = compile_library  # type: ignore[assignment]
    try:
        processes = [context.Process(target=build._cached) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    finally:
        build.compile_library = genuine
    assert queue.get(timeout=10)
    assert queue.empty()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it is not a file"),
        (b"", "file too short"),
        (b"text", "cannot be loaded"),
        (-1, "it is truncated"),
        (5000, "it is truncated"),
    ],
)
def test_a_bad_override_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | int | None, message: str
) -> None:
    path, library = tmp_path / "kernels.so", Path(build.library()._name).read_bytes()
    if content is not None:
        path.write_bytes(library[:content] if isinstance(content, int) else content)
    monkeypatch.setenv("SVDIT_KERNELS", str(path))
    with pytest.raises(build.MissingKernelsError, match=r"kernels\.so cannot be loaded") as caught:
        build._find()
    assert message in str(caught.value)


def test_a_truncated_installed_library_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "_library.so").write_bytes(Path(build.library()._name).read_bytes()[:5000])
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    assert build._installed() is None
    assert "_library.so cannot be loaded (it is truncated); install svdit again" in capsys.readouterr().err


def test_float_models_need_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a float model asked for a backend")

    for name in ("choose", "reasons"):
        monkeypatch.setattr(ops, name, fail)
    flags = ["--ckpt=digits", "--sampler=ddim", "--num-sampling-steps=2"]
    command("sample", [*flags, f"--output={tmp_path / 'a.png'}"])
    command("generate", [*flags, "--num-fid-samples=2", f"--sample-dir={tmp_path / 'set'}"])


def test_the_library_names_no_openmp_runtime() -> None:
    """Torch's has different names in different releases."""
    assert b"omp.so" not in Path(build.library()._name).read_bytes()


@pytest.mark.parametrize("runtime", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-a49a47f9.so.1.0.0"])
def test_torchs_openmp_runtime_is_offered(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[tuple[str, int]]()
    packages = Path(build.torch.__file__).parents[1]
    monkeypatch.setattr("ctypes.CDLL", lambda path, mode: loaded.append((path, mode)))
    build.offer_openmp([str(packages / "scikit_learn.libs/libgomp-1.so"), str(packages / runtime)])
    build.offer_openmp([])
    assert loaded == [(path, ctypes.RTLD_GLOBAL) for path in (str(packages / runtime), "libgomp.so.1")]


def test_without_an_openmp_runtime_the_reason_is_a_sentence() -> None:
    with pytest.raises(build.MissingKernelsError, match="there is no OpenMP runtime"):
        build.offer_openmp(["/nowhere/libgomp.so.1"])


def test_the_name_contains_the_hash_of_the_sources(compiled: list[Path]) -> None:
    assert build._cached().name.startswith(f"{source_hash()}-")


@pytest.mark.parametrize("macro", ["__clang__", "__GNUC__"])
def test_clang_compiles_without_openmp(
    macro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its OpenMP is LLVM's, and torch brings GCC's."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f"""#!/bin/sh
echo "$@" >> {log}
[ "$1" = -dM ] && echo "#define {macro} 1"
exit 0
"""
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    build.compile_library(tmp_path / "kernels.so")
    assert ("-fopenmp" in log.read_text()) == (macro == "__GNUC__")
    assert ("the kernels use one thread" in capsys.readouterr().err) == (macro == "__clang__")
