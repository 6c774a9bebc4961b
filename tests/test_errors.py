"""Which errors are sentences, and that bugs are not among them."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from svdit.errors import REMEDIES, UnreadableError, UserError, sentence
from svdit.files import writing


@pytest.mark.parametrize("code", REMEDIES)
def test_an_error_of_the_system_names_the_path_the_reason_and_the_remedy(code: int) -> None:
    message = sentence(OSError(code, os.strerror(code), "/some/file"))
    assert message == f"cannot access /some/file ({os.strerror(code)}); {REMEDIES[code]}"


def test_rust_and_workers_report_the_system_as_text() -> None:
    assert "No space left" in str(sentence(SafetensorError("Error while serializing: I/O error: x (os error 28)")))
    worker = OSError("Caught OSError in DataLoader worker process 0.\nOriginal …\nOSError: [Errno 24] Too many: '/x'")
    mapped = "unable to open file </x.safetensors> in read-only mode: Too many open files (24)"
    assert "raise the limit of open files" in str(sentence(RuntimeError(mapped)))
    assert sentence(RuntimeError("expected: tensors (24)")) is None
    assert sentence(worker) == "cannot access /x (Too many open files); raise the limit of open files (ulimit -n)"


class Failing(torch.utils.data.Dataset[int]):
    """Every item raises."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> int:
        raise UnreadableError("image 3 cannot be read; remove it")


def test_a_workers_sentence_comes_without_its_traceback() -> None:
    with pytest.raises(UserError) as raised:
        list(DataLoader(Failing(), num_workers=1))
    assert sentence(raised.value) == "image 3 cannot be read; remove it"


def allocate_with_torch() -> None:
    torch.empty(2**58, dtype=torch.uint8)


def allocate_with_numpy() -> None:
    np.ones(2**58, np.uint8)


def allocate_with_python() -> None:
    bytearray(2**62)


def cuda_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate", [allocate_with_torch, allocate_with_numpy, allocate_with_python, cuda_error])
def test_a_lack_of_memory_is_a_sentence_with_the_remedy(allocate: object) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()  # type: ignore[operator]
    message = str(sentence(raised.value, "choose a smaller --batch-size"))
    assert message.startswith("not enough memory (")
    assert message.endswith("); choose a smaller --batch-size")
    assert "\n" not in message


def test_shared_memory_that_is_full_is_not_the_file_that_is_written(tmp_path: Path) -> None:
    text = "unable to write to file </torch_7_1>: No space left on device (28)"
    with pytest.raises(RuntimeError, match="torch_7_1") as raised, writing(tmp_path / "features"):
        raise RuntimeError(text)
    assert "not enough shared memory" in str(sentence(raised.value))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [  # of torch/utils/data, ATen/MapAllocator.cpp and torch/multiprocessing
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that …", "--num-workers 0"),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  File x\nRuntimeError: unable to write to file </torch_7_1>: No space left on device (28)\n",
            "(unable to",
        ),
        ("unable to write to file </torch_7_1>: No space left on device (28)", "--shm-size"),
        ("unable to open shared memory object </torch_7_1> in read-write mode: Too many open files (24)", "--shm-size"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "fewer workers"),
        ("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", "the same command again"),
    ],
)
def test_errors_of_workers_and_other_processes_are_sentences(text: str, remedy: str) -> None:
    assert remedy in str(sentence(RuntimeError(text)))


@pytest.mark.parametrize(
    "bug", [KeyError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("x")]
)
def test_bugs_are_not_sentences(bug: Exception) -> None:
    assert sentence(bug) is None


def test_memory_of_the_system_call(tmp_path: Path) -> None:
    assert str(sentence(OSError(errno.ENOMEM, "Cannot allocate memory"))).startswith("not enough memory (")
