"""Files from elsewhere: downloads that go on where they stopped, checked, unpacked without surprises, whole or absent.

Everything that takes long is made `once`: under a temporary name, by one process while others wait, then renamed. So a
kill, a full disk or a second process at the same time never leaves a half-written file that is taken for a whole one.
"""

import argparse
import errno
import hashlib
import json
import lzma
import os
import shutil
import signal
import stat
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import field, fields
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from ssl import SSLError
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn
from tqdm import tqdm

GOES_ON = "stopped; the same command goes on from the last finished epoch"


class UsageError(Exception):
    """Something the user can mend. The command line prints it as one sentence and exits with code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def exit_code(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command. Ctrl-C prints `stopped`."""
    pressed = False

    def interrupt(signum: int, frame: object) -> NoReturn:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    # An import or a library may turn KeyboardInterrupt into an error of its own: remember that the user pressed Ctrl-C.
    at_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    listens = at_default and threading.current_thread() is threading.main_thread()
    if listens:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return work() or 0
    except BaseException as error:  # noqa: BLE001  `explain` raises again what is no mistake
        if pressed or isinstance(error, KeyboardInterrupt):
            print(stopped, file=sys.stderr)
            return 130
        reason = explain(error)
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    print("error:", " ".join(reason.split()), file=sys.stderr)
    return 2


def explain(error: BaseException) -> str:
    """What to tell the user. Raises the error again if it is no mistake of theirs."""
    if isinstance(error, UsageError | OSError):
        return str(error)
    # PyTorch has no class of its own for a CPU's memory
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    ):
        return f"out of memory ({str(error).split(chr(10))[0]}); a smaller --batch or --length needs less"
    raise error


def opt(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def add_options(made: argparse.ArgumentParser, options: type) -> None:
    """A command-line option for every field of a dataclass; a list takes any number of values."""
    for f in fields(options):
        kind: dict[str, Any] = {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        elif get_origin(f.type) is list:
            kind = {"type": get_args(f.type)[0], "nargs": "*"}
        made.add_argument(
            f"--{f.name.replace('_', '-')}",
            help=f.metadata["help"],
            **kind | f.metadata.get("kind", {}),
        )


PAUSE, PATIENCE = (
    1.0,
    5,
)  # seconds before the second try, doubled for each further one; tries in vain before giving up
NETWORK = (
    URLError,
    HTTPException,
    ConnectionError,
    TimeoutError,
    SSLError,
)  # any other OSError is the disk's
STRANGE = (
    ValueError,
    ArithmeticError,
    RuntimeError,
)  # a name that is no text, a date too far, a password
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, *STRANGE)
RATIO = 100  # no archive of pictures or texts holds more than so many times its own size
BYTES = {"unit": "B", "unit_scale": True, "delay": 2}


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: under a temporary name, then rename. UsageError if the disk is full or read-only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
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

    A second process that wants it waits for the first and repeats nothing. UsageError if the disk does not take it.
    """
    if path.exists():
        return path
    temporary, lock = (
        path.with_name(f".{path.name}.part"),
        FileLock(path.with_name(f".{path.name}.lock")),
    )
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
            f"{path} cannot be written ({error.strerror or error}); give a folder on a disk with room "
            "where you may write: --data-dir"
        ) from error
    return path


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def need(size: int, folder: Path) -> None:
    """OSError, as the disk itself would raise it later, if the disk of `folder` has not `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC, f"it needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left"
        )


def digest(path: Path, kind: str) -> str:
    made = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if kind == "git" else hashlib.new(kind)
    with (
        path.open("rb") as raw,
        tqdm.wrapattr(
            raw, "read", path.stat().st_size, desc=f"{kind} of {path.name}", **BYTES
        ) as file,
    ):
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def verify(path: Path, checksum: str | None, record: Path) -> None:
    """Compare a file with "md5:...", "sha256:..." or "git:..." (git's own sha1 of a file); if none is known, with the
    record that its first copy left. UsageError if it is another.
    """
    if checksum is None and not record.exists():
        write(
            record, f"{digest(path, 'sha256')}  {path.name}\n".encode()
        )  # as `sha256sum` writes it
        return
    kind, expected = (checksum or f"sha256:{record.read_text().split()[0]}").split(":")
    if (found := digest(path, kind)) != expected:
        raise UsageError(
            f"{path} has {kind} {found}, not {expected}: damaged, or another file; delete it"
            + (f", or {record} if you put another file there" if checksum is None else "")
        )


def fetch(urls: Sequence[str], path: Path, checksum: str | None) -> Path:
    """The file `path`, verified; downloaded from the first of `urls` that gives it whole, unless it is there already.

    What has arrived waits beside it under another name until the rest has come, in this process or in a later one.
    UsageError if the checksum is another, or, with every source's reason, if none gives the file.
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
                partial.unlink(missing_ok=True)  # the next source starts from its first byte
                reasons.append(f"{url}: {error}")
        raise UsageError(
            f"{path.name} cannot be downloaded ({'; '.join(reasons)}); get it elsewhere and put it at {path}"
        )

    if path.exists():
        verify(path, checksum, record)
    return build_once(path, make)


def download(url: str, partial: Path) -> None:
    """Go on with `partial` until it is whole, through broken connections. NETWORK errors if the server stays away."""
    vain = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return receive(url, partial, before)
        except NETWORK as error:
            refused = (
                isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429)
            )
            vain = 0 if partial.exists() and partial.stat().st_size > before else vain + 1
            if refused or vain == PATIENCE:
                raise
            time.sleep(PAUSE * 2**vain)


def receive(url: str, partial: Path, start: int) -> None:
    """One connection: append to `partial` what comes after its first `start` bytes. ConnectionError if it is cut."""
    headers = {"User-Agent": "Mozilla/5.0"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=30)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
            return  # nothing lies after `start`: it was whole already
        if error.code == 416:
            partial.unlink()
        raise
    with answer:
        start = start if answer.status == 206 else 0  # 200: this server always sends everything
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        need(int(length or 0), partial.parent)
        with (
            partial.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, desc=url.split("/")[-1], **BYTES) as bar,
        ):
            while block := answer.read(1 << 18):
                file.write(block)
                bar.update(len(block))
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"cut off after {partial.stat().st_size} of {total} bytes")


def obtain(folder: Path, archive: Path, urls: Sequence[str], checksum: str | None) -> Path:
    """`folder` with what `archive` holds. The archive is downloaded unless it is there, and then deleted.

    UsageError if the archive cannot be had, is damaged, or holds anything but files and folders inside itself.
    """
    downloaded = not archive.exists()

    def make(temporary: Path) -> None:
        fetch(urls, archive, checksum)
        need(archive.stat().st_size, folder.parent)  # pictures do not shrink in an archive
        temporary.mkdir()
        try:
            (unpack_zip if zipfile.is_zipfile(archive) else unpack_tar)(archive, temporary)
        except DAMAGED as error:
            raise UsageError(f"{archive} is damaged ({error}); delete it and try again") from error

    build_once(folder, make)
    if downloaded:
        archive.unlink(missing_ok=True)
    return folder


def inside(name: str) -> bool:
    """Whether a path that somebody else wrote stays below the folder that it is relative to."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def allow(name: str, plain: bool) -> None:
    """UsageError for a member of an archive that is not plain (a link, a device), or would land outside its folder."""
    if not (plain and inside(name)):
        raise UsageError(
            f"the archive holds '{name}', which is no file inside it; do not use this archive"
        )


def refuse_a_bomb(size: int, archive: Path) -> None:
    """UsageError if an archive unpacks to more than any honest one."""
    if size > RATIO * archive.stat().st_size:
        raise UsageError(
            f"{archive} unpacks to more than {RATIO} times its size; do not use this archive"
        )


def unpack_tar(archive: Path, folder: Path) -> None:
    size = 0

    def check(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        nonlocal size
        size += member.size + tarfile.BLOCKSIZE  # an empty file is not nothing
        refuse_a_bomb(size, archive)
        allow(member.name, member.isfile() or member.isdir())
        return tarfile.data_filter(member, destination)  # no foreign owners, no execute bits

    with (
        archive.open("rb") as raw,
        tqdm.wrapattr(
            raw, "read", archive.stat().st_size, desc=f"unpacking {archive.name}", **BYTES
        ) as file,
        tarfile.open(fileobj=file, mode="r|*") as tar,
    ):
        tar.extractall(folder, filter=check)


def unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        size = sum(member.file_size for member in members)
        refuse_a_bomb(size, archive)
        need(size, folder)
        for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file", delay=2):
            allow(
                member.filename,
                stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR),
            )
            file.extract(member, folder)


State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


def weights_digest(state: State, strings: dict[str, str]) -> str:
    """sha256 of all strings, and of all tensors in fp32, with their names."""
    made = hashlib.sha256(json.dumps(sorted(strings.items())).encode() if strings else b"")
    for name, value in sorted(state.items()):
        made.update(name.encode() + value.float().contiguous().numpy(force=True).tobytes())
    return made.hexdigest()


def pack(state: State, strings: dict[str, str]) -> bytes:
    return safetensors.save(state, strings | {"sha256": weights_digest(state, strings)})


def seal(path: str | Path) -> None:
    """Give a file its checksum."""
    write(Path(path), pack(*read_weights(path)))


def read_weights(path: str | Path) -> tuple[State, dict[str, str]]:
    """The tensors and strings of a .safetensors file. ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            strings = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    expected = strings.pop("sha256", None)
    if expected and expected != weights_digest(state, strings):
        raise ValueError(f"{path} is damaged (its checksum is another)")
    return state, strings


def fill(kind: type[Model], sizes: dict, state: State, path: str | Path) -> Model:
    """A model of these sizes with these weights, in fp32. ValueError, which names `path`, if they do not fit."""
    other = f"{path} holds another model than a {kind.__name__} of the sizes {sizes}"
    if sizes.get("n_layer", 0) > len(state):  # a lie that would take forever to build
        raise ValueError(f"{other} (it has {len(state)} tensors)")
    with torch.device(
        "meta"
    ):  # nothing is drawn that is overwritten at once, and a lie about a size takes no memory
        model = kind(**sizes)
    expected = model.state_dict()
    for name in sorted(expected.keys() | state):
        if name not in expected or name not in state or state[name].shape != expected[name].shape:
            reason = (
                "is missing"
                if name not in state
                else "has another shape"
                if name in expected
                else "is unknown"
            )
            raise ValueError(f"{other} ({name} {reason})")
    copies = {
        name: value.to(torch.float32, copy=True) for name, value in state.items()
    }  # not the mapped file itself
    model.load_state_dict(copies, assign=True)
    return model.eval()
