"""Errors that a user can fix: commands print one sentence and exit with code 2. Other exceptions are bugs.

`sentence` recognizes them: our own, those of the operating system, and those that torch and safetensors report as text.
"""

import errno
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches

from svdit import restarts

REMEDIES = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another file system",
    errno.EACCES: "change the permissions, or choose another path",
    errno.EPERM: "change the permissions, or choose another path",
    errno.EROFS: "choose another folder",
    errno.EISDIR: "remove or rename the folder, or choose another path",
    errno.ENOTDIR: "remove or rename the file where a folder belongs, or choose another path",
    errno.EEXIST: "remove or rename the file where a folder belongs, or choose another path",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "check the symbolic links",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.EIO: "check the disk or the network, then try again",
    errno.ESTALE: "check the network, then try again",
    errno.ETIMEDOUT: "check the network, then try again",
}
LESS_MEMORY = "use a smaller batch or model, or a machine with more memory"
NO_MEMORY = r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory|Unable to allocate"
LOST = r"gloo|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe"
SHARED_MEMORY = r"shared memory|</torch_|Bus error"
OF_TORCH = {  # RuntimeErrors by their text: what happened and what to do
    SHARED_MEMORY: (
        "not enough shared memory for the data loading workers",
        "enlarge /dev/shm (docker run --shm-size), or train with --num-workers 0",
    ),
    r"DataLoader worker .*(is killed|exited unexpectedly)": (
        "a data loading worker was killed, probably for lack of memory",
        "use fewer workers or a smaller batch",
    ),
    r"failed to listen": (
        "MASTER_PORT is in use by another run",
        "end that one, or choose another port",
    ),
    LOST: (
        "the connection to another process of this run failed",
        "see its message",
    ),
}


class UserError(Exception):
    """The message is one sentence: what was wrong, the value, and what to do."""


def unknown(kind: str, value: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is none of the choices: "there is no preset 'w8a'; choose one of w8a8, …"."""
    names = list(choices)
    return UserError(f"there is no {kind} {value!r}; choose one of {', '.join(names)}{nearest(value, names)}")


def check_names(kind: str, given: Iterable[str], choices: Iterable[str]) -> None:
    """Raises UserError for the first given name that is none of the choices."""
    choices = list(choices)
    for name in given:
        if name not in choices:
            raise unknown(kind, name, choices)


def nearest(value: object, choices: Iterable[str]) -> str:
    """The end of such a sentence: "; did you mean w8a8?", or "" where no choice is near."""
    names = {choice.lower(): choice for choice in choices}
    near = get_close_matches(value.lower(), names, 1) if isinstance(value, str) else []
    return f"; did you mean {names[near[0]]}?" if near else ""


class UnreadableError(UserError):
    """The system cannot read a file, whose content may be whole."""


def sentence(error: BaseException, less_memory: str = LESS_MEMORY) -> str | None:
    """The message for an error that the user can fix, None for others; `less_memory`: how to need less of it."""
    text = re.sub(r"^\[enforce fail at .*?\] (err == 0)?\W*", "", str(error)).strip()
    if worker := re.search(r"^[\w.]*Error: (.*)", text, re.MULTILINE | re.DOTALL):
        text = worker[1].strip()  # after the traceback of a DataLoader worker
    if isinstance(error, UserError):
        return text
    first = (text or type(error).__name__).splitlines()[0][:200]
    if isinstance(error, RuntimeError):
        for pattern, (problem, remedy) in OF_TORCH.items():
            if re.search(pattern, text):
                return f"{problem} ({first}); {restarts.again(remedy) if pattern == LOST else remedy}"
    if out_of_memory(error):
        return f"not enough memory ({first}); {less_memory}"
    system = system_error(error)
    return None if system is None else failed("access", system.filename or "a file", system)


def lost_connection(error: BaseException) -> bool:
    """Whether the error is that another process of the run is gone."""
    return isinstance(error, RuntimeError) and re.search(LOST, str(error)) is not None


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is a lack of memory, on the CPU or a GPU."""
    system = system_error(error)
    torch_memory = isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error))
    return isinstance(error, MemoryError) or bool(torch_memory) or (system is not None and system.errno == errno.ENOMEM)


def failed(action: str, path: object, error: OSError) -> str:
    """The sentence for a system's error: "cannot write PATH (No space left on device); free some space, …"."""
    remedy = REMEDIES.get(error.errno or 0, "check the path and the disk, then try again")
    return f"cannot {action} {path} ({error.strerror}); {remedy}"


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that `error` is, or whose text it has where Rust, torch or a worker raised it.

    None for a lack of shared memory, which is no file that anybody named.
    """
    if isinstance(error, OSError) and error.errno:
        return error
    text = str(error).strip()
    if re.search(SHARED_MEMORY, text):
        return None
    number = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\] [^:]*(?:: '(.+)')?|: [^:]+ \((\d+)\)$", text)
    code = int(number[1] or number[2] or number[4]) if number else 0
    if number is None or (number[4] and os.strerror(code) not in text):
        return None
    return OSError(code, os.strerror(code), number[3])
