"""Files from elsewhere: downloads that go on where they stopped, checked, unpacked without surprises, whole or absent.

Everything that takes long is made `once`: under a temporary name, by one process while others wait, then renamed. So a
kill, a full disk or a second process at the same time never leaves a half-written file that is taken for a whole one.
"""

import errno
import hashlib
import lzma
import os
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from support.usage import UsageError

PAUSE, PATIENCE = 1.0, 5  # seconds before the second try, doubled for each further one; tries in vain before giving up
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, SSLError)  # any other OSError is the disk's
STRANGE = (ValueError, ArithmeticError, RuntimeError)  # a name that is no text, a date too far, a password
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
        raise UsageError(f"{path} cannot be written ({error.strerror}); make room, or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """The file or folder `path`: as it is, or filled by make(temporary name) and then renamed.

    A second process that wants it waits for the first and repeats nothing. UsageError if the disk does not take it.
    """
    if path.exists():
        return path
    temporary, lock = path.with_name(f".{path.name}.part"), FileLock(path.with_name(f".{path.name}.lock"))
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
        raise OSError(errno.ENOSPC, f"it needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left")


def digest(path: Path, kind: str) -> str:
    made = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if kind == "git" else hashlib.new(kind)
    with (
        path.open("rb") as raw,
        tqdm.wrapattr(raw, "read", path.stat().st_size, desc=f"{kind} of {path.name}", **BYTES) as file,
    ):
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def verify(path: Path, checksum: str | None, record: Path) -> None:
    """Compare a file with "md5:...", "sha256:..." or "git:..." (git's own sha1 of a file); if none is known, with the
    record that its first copy left. UsageError if it is another.
    """
    if checksum is None and not record.exists():
        write(record, f"{digest(path, 'sha256')}  {path.name}\n".encode())  # as `sha256sum` writes it
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
    return once(path, make)


def download(url: str, partial: Path) -> None:
    """Go on with `partial` until it is whole, through broken connections. NETWORK errors if the server stays away."""
    vain = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return receive(url, partial, before)
        except NETWORK as error:
            refused = isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429)
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

    once(folder, make)
    if downloaded:
        archive.unlink(missing_ok=True)
    return folder


def inside(name: str) -> bool:
    """Whether a path that somebody else wrote stays below the folder that it is relative to."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def allow(name: str, plain: bool) -> None:
    """UsageError for a member of an archive that is not plain (a link, a device), or would land outside its folder."""
    if not (plain and inside(name)):
        raise UsageError(f"the archive holds '{name}', which is no file inside it; do not use this archive")


def refuse_a_bomb(size: int, archive: Path) -> None:
    """UsageError if an archive unpacks to more than any honest one."""
    if size > RATIO * archive.stat().st_size:
        raise UsageError(f"{archive} unpacks to more than {RATIO} times its size; do not use this archive")


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
        tqdm.wrapattr(raw, "read", archive.stat().st_size, desc=f"unpacking {archive.name}", **BYTES) as file,
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
            allow(member.filename, stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR))
            file.extract(member, folder)
