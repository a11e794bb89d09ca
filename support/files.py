"""Everything between the program and the machine: command line, files, downloads.

- A user's mistake is a `UsageError` whose sentence says how to fix it; `exit_code` prints it.
- `write` and `build_once` make a file or folder whole or not at all: first under a temporary name,
  then renamed. A kill, a full disk or a second process never leaves half a file under its name.
- `fetch` downloads a file and compares it with its checksum; `obtain` also unpacks it.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import field, fields
from http.client import HTTPException
from pathlib import Path, PurePath
from ssl import SSLError
from typing import Any, BinaryIO, Literal, NoReturn, get_args, get_origin
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

GOES_ON = "stopped; the same command goes on from the last finished epoch"


# The command line and the user's mistakes


class UsageError(Exception):
    """What the user can fix. The command line prints it as one sentence and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """A command line whose help begins with the first line of `text`, a module's docstring."""

    def __init__(self, text: str | None, **others: Any):
        super().__init__(description=(text or "").split("\n")[0], allow_abbrev=False, **others)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def opt(default: Any, help: str) -> Any:
    """A field of a dataclass of options: its default and its help."""
    return field(default=default, metadata={"help": help})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """A command-line option for every field of a dataclass; a list takes any number of values."""
    for f in (f for f in fields(options) if f.metadata):
        kind: dict[str, Any] = {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        elif get_origin(f.type) is list:
            kind = {"type": get_args(f.type)[0], "nargs": "*"}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **kind)


def exit_code(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command and return its exit code.

    That is the work's own (None is 0), 2 after a user's mistake, 130 after Ctrl-C, which prints
    `stopped`, and 141 when the reader of our output has gone (`| head`). Any other error is a bug
    and keeps its traceback.
    """
    open_streams()
    pressed: list[int] = []

    def interrupt(signum: int, frame: object) -> NoReturn:
        pressed.append(signum)  # a library may turn the exception into one of its own
        raise KeyboardInterrupt

    # A command in the background ignores Ctrl-C, and goes on doing so.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        code, sentence = work() or 0, ""
        sys.stdout.flush()  # now, while an error can still be reported
    except BaseException as error:  # noqa: BLE001  `explain` raises again what is no mistake
        if pressed or isinstance(error, KeyboardInterrupt):
            code, sentence = 130, f"{stopped}\n"
        elif isinstance(error, BrokenPipeError):
            code, sentence = 141, ""
        else:
            code, sentence = 2, f"error: {' '.join(explain(error).split())}\n"

    # Python flushes once more as it ends, so a stream that fails now is pointed to nowhere.
    for stream, text in ((sys.stdout, ""), (sys.stderr, sentence)):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def open_streams() -> None:
    """Escape what a terminal cannot show; send to nowhere what is written to a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends
        # The stream of a notebook has no such method; a file that became a pipe cannot seek.
        with suppress(AttributeError, OSError):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out. PyTorch has an error class for a GPU's, but none for a CPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def explain(error: BaseException) -> str:
    """What to tell the user. Raises the error again if it is no mistake of theirs."""
    if isinstance(error, UsageError | OSError):
        return str(error)
    reason = str(error).partition("\n")[0] or type(error).__name__
    if no_memory(error):
        return f"out of memory ({reason}); a smaller --batch or --length needs less"
    if type(error).__name__ in ("InductorError", "BackendCompilerFailed"):
        return f"torch.compile does not work here ({reason}); run with --no-compile"
    raise error


# Files that are whole or absent


def write(path: Path, content: bytes) -> None:
    """Write all of `content` or nothing, in a folder that is made if it is not there.

    UsageError if the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut after the renaming finds it on the disk
        temporary.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); make room, or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def build_once(path: Path, make: Callable[[Path], None]) -> Path:
    """The file or folder `path`: as it is, or filled by make(temporary name) and then renamed.

    A second process that wants it waits for the first. UsageError if it cannot be written.
    """
    if path.exists():
        return path
    temporary = path.with_name(f".{path.name}.part")
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is making {path}; waiting for it", file=sys.stderr)
            lock.acquire()
        try:
            if not path.exists():
                remove(temporary)  # what a killed process left
                make(temporary)
                temporary.replace(path)
        finally:
            remove(temporary)
            lock.release()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror or error}); "
            "give a folder on a disk with room where you may write: --data-dir"
        ) from error
    return path


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


# Downloads

PAUSE, TRIES = 1.0, 5  # seconds before a second try, doubled for each further one; tries in vain
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError)  # not the disk's


def digest(path: Path, kind: str) -> str:
    """The checksum of a file: "md5", "sha256", or "git", the name that git gives a file."""
    made = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if kind == "git" else hashlib.new(kind)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def verify(path: Path, checksum: str | None, record: Path) -> None:
    """Compare a file with "md5:...", "sha256:..." or "git:...". UsageError if it is another.

    checksum: None if none is published; then the first copy leaves its own in `record`.
    """
    if checksum is None and not record.exists():
        write(record, f"{digest(path, 'sha256')}  {path.name}\n".encode())  # as sha256sum does
        return
    kind, expected = (checksum or f"sha256:{record.read_text().split()[0]}").split(":")
    found = digest(path, kind)
    if found != expected:
        raise UsageError(
            f"{path} has {kind} {found}, not {expected}: damaged, or another file; delete it"
            + ("" if checksum else f", or {record} if you put another file there")
        )


def fetch(urls: Sequence[str], path: Path, checksum: str | None) -> Path:
    """The file `path`, verified; if it is missing, from the first of `urls` that gives it whole.

    Half a download waits beside it and goes on later. UsageError with every source's reason if
    none gives it.
    """
    partial, record = path.with_name(f".{path.name}.partial"), path.with_name(f"{path.name}.sha256")

    def make(temporary: Path) -> None:
        reasons = []
        for url in urls:
            try:
                download(url, partial)
                verify(partial, checksum, record)
                partial.rename(temporary)
                return
            except NETWORK as error:
                reasons.append(f"{url}: {error}")
            except UsageError as error:
                partial.unlink()  # the next source starts from its first byte
                reasons.append(f"{url}: {error}")
        raise UsageError(
            f"{path.name} cannot be downloaded ({'; '.join(reasons)}); "
            f"get it elsewhere and put it at {path}"
        )

    if path.exists():
        verify(path, checksum, record)
    return build_once(path, make)


def download(url: str, partial: Path) -> None:
    """Fill `partial` until it is whole. NETWORK errors if the server gives nothing (more)."""
    tries, started = 0, False
    with partial.open("ab") as file:
        while True:
            before = file.tell()
            try:
                return receive(url, file)
            except NETWORK as error:
                # 416: nothing comes after what is here, and the checksum says whether it is whole.
                code = getattr(error, "code", 0)
                if code == 416:
                    return
                # Go on where bytes came, ask a busy server again; without a network stop at once.
                arrived = file.tell() > before
                started = started or arrived
                tries = 0 if arrived else tries + 1
                busy = code >= 500 or code in (408, 429)
                if tries == TRIES or not (started or busy):
                    raise
                time.sleep(PAUSE * 2**tries)


def receive(url: str, file: BinaryIO) -> None:
    """One connection: append to the file what comes after the bytes that it has."""
    start = file.tell()
    request = Request(url, headers={"User-Agent": "Mozilla/5.0"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urlopen(request, timeout=30) as answer:
        # 200 instead of 206: this server always sends everything
        if answer.status != 206:
            start = 0
            file.seek(0)
            file.truncate()

        length = int(answer.headers.get("Content-Length", 0))  # a server need not say it
        name, total = url.split("/")[-1], start + length
        with tqdm.wrapattr(file, "write", total, desc=name, initial=start, delay=2) as out:
            shutil.copyfileobj(answer, out)
    if length and file.tell() < total:
        raise ConnectionError(f"cut off after {file.tell()} of {total} bytes")


# Archives


def obtain(folder: Path, archive: Path, urls: Sequence[str], checksum: str | None) -> Path:
    """`folder` with what `archive` holds. An archive that is missing is downloaded, later deleted.

    UsageError if the archive cannot be had, is damaged, or holds anything but files inside itself.
    """
    downloaded = not archive.exists()

    def make(temporary: Path) -> None:
        fetch(urls, archive, checksum)
        temporary.mkdir()
        try:
            unpack(archive, temporary)
        except (UsageError, OSError):
            raise
        except Exception as error:  # tarfile and zipfile raise ten kinds of them
            raise UsageError(f"{archive} is damaged ({error}); delete it and try again") from error

    build_once(folder, make)
    if downloaded:
        archive.unlink(missing_ok=True)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file. UsageError if a tar file holds more than files inside itself."""
    bar = {"desc": f"unpacking {archive.name}", "unit": "file", "delay": 2}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder, tqdm(file.namelist(), **bar))  # never leaves its folder
        return

    # tarfile can leave it: its filter against that is missing in Python 3.10.0.
    with tarfile.open(archive, mode="r|*") as tar:
        for member in tqdm(tar, **bar):
            name = PurePath(member.name)
            if name.anchor or ".." in name.parts or not (member.isfile() or member.isdir()):
                raise UsageError(
                    f"{archive} holds '{name}', which is no file inside it; do not use this archive"
                )
            content = tar.extractfile(member)  # None of a folder
            if content:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.read())
