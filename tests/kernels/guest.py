"""The C kernels of another kind of processor: called here, run by an emulator.

A `Guest` stands in for the library that ffi.py loads. Each call sends the structures, and the tensors that pointers in
them lead to, to guest.c, and writes what comes back into the same tensors.
"""

import ctypes
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svdit.kernels.cpu import ffi

STEPS = {0: (ffi.Rows, ffi.Product), 1: (ffi.Attention,)}  # what a Step of a kind points to
Place = tuple[int, int]  # buffer and offset


class Function:
    """A function of the library; ffi.py sets its types."""

    def __init__(self, guest: "Guest", name: str) -> None:
        self.guest, self.name = guest, name
        self.argtypes: list[Any] = []
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        return Call(self.guest).run(self.name, arguments, self.argtypes)


class Guest:
    """A library for another processor; `command` runs guest.c, built for it."""

    def __init__(self, command: list[str], library: Path) -> None:
        self.names = library.read_bytes()
        self.process = subprocess.Popen([*command, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.storages: dict[int, torch.UntypedStorage] = {}  # by address; kept, so that no other takes its place

    def __getattr__(self, name: str) -> Function:
        if f"\0{name}\0".encode() not in self.names:
            raise AttributeError(name)
        return Function(self, name)

    def remember(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Know every tensor whose address is asked for from now on, and none of those before."""
        genuine: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
        self.storages.clear()

        def data_ptr(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage
            return genuine(tensor)

        monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)

    def close(self) -> None:
        """End the program. Raises CalledProcessError where it failed."""
        self.process.communicate()
        if self.process.returncode:
            raise subprocess.CalledProcessError(self.process.returncode, self.process.args)


class Call:
    """One call: buffers, by the address that they have here, and the pointers in them."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.buffers: dict[int, int] = {}  # sizes
        self.pointers: list[tuple[int, ...]] = []
        self.results: list[int] = []  # addresses of what the function may change
        self.known = sorted(guest.storages)

    def buffer(self, address: int, size: int) -> int:
        """The number of a buffer."""
        self.buffers.setdefault(address, size)
        return list(self.buffers).index(address)

    def tensor(self, address: int) -> Place:
        """Where in a buffer an address of a tensor is. Raises LookupError for any other address."""
        place = bisect_right(self.known, address) - 1
        start = self.known[max(place, 0)]
        size = self.guest.storages[start].nbytes()
        if not start <= address <= start + size:  # at its end what follows is empty
            raise LookupError(f"{address:#x} is in no tensor")
        self.results.append(start)
        return self.buffer(start, size), address - start

    def structure(self, item: Any) -> Place:
        """A structure, an array or a number that the function gets the address of."""
        address = ctypes.addressof(item)
        number = self.buffer(address, ctypes.sizeof(item))
        if isinstance(item, ctypes.Array) and issubclass(item._type_, ctypes.Structure):
            for i, each in enumerate(item):
                self.follow(each, number, i * ctypes.sizeof(each))
        elif isinstance(item, ctypes.Structure):
            self.follow(item, number, 0)
        else:
            self.results.append(address)
        return number, 0

    def follow(self, item: ctypes.Structure, number: int, offset: int) -> None:
        """The pointers of a structure that lies at an offset of a buffer."""
        kinds = iter(STEPS[item.kind] if isinstance(item, ffi.Step) else ())
        for name, kind in item._fields_:
            address = getattr(item, name)
            if kind is ctypes.c_void_p and address is not None:
                pointee = next(kinds, None)
                place = self.structure(pointee.from_address(address)) if pointee else self.tensor(address)
                self.pointers.append((number, offset + getattr(type(item), name).offset, *place))

    def argument(self, value: Any, kind: Any) -> Place:
        if kind is ctypes.c_int64:
            return -1, value
        return self.tensor(value) if kind is ctypes.c_void_p else self.structure(value)

    def run(self, name: str, arguments: tuple[Any, ...], kinds: list[Any]) -> int:
        """The function's result; tensors and numbers have their new values."""
        places = [self.argument(value, kind) for value, kind in zip(arguments, kinds, strict=True)]
        places += [(-1, 0)] * (6 - len(places))
        parts = [integers(len(self.buffers))]
        parts += [integers(size) + ctypes.string_at(start, size) for start, size in self.buffers.items()]
        parts += [integers(len(self.pointers)), *(integers(*pointer) for pointer in self.pointers)]
        parts += [integers(len(name)), name.encode(), *(integers(*place) for place in places)]
        stdin, stdout = self.guest.process.stdin, self.guest.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(b"".join(parts))
        stdin.flush()
        answer = stdout.read(8)
        if len(answer) < 8:
            raise RuntimeError(f"the emulator ended in {name}: {self.guest.process.wait()}")
        for start, size in self.buffers.items():
            content = stdout.read(size)
            if start in self.results:
                ctypes.memmove(start, content, size)
        return int(struct.unpack("=q", answer)[0])


def integers(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}q", *numbers)
