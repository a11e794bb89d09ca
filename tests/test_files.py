"""files.py: how a command ends, downloads over bad connections, nothing half-written is taken."""

import hashlib
import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from support import files
from support.files import UsageError, exit_code, fetch, obtain, write

ROOT = Path(__file__).parent.parent
CONTENT = bytes(range(256)) * 4000  # about 1 MB
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture
def site(site, tmp_path):
    (tmp_path / "site" / "file.bin").write_bytes(CONTENT)
    (tmp_path / "got").mkdir()
    return site


def test_a_connection_cut_in_the_middle_goes_on_where_it_was(site, tmp_path):
    site.cuts = 3
    path = fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", MD5)
    assert path.read_bytes() == CONTENT
    starts = [start for _, start in site.log]
    assert starts == sorted(starts)
    assert len(set(starts)) == 4  # the first from 0, every other from where the one before was cut


def test_a_server_that_cannot_go_on_sends_everything_again(site, tmp_path):
    site.cuts, site.resumes = 1, False
    assert (
        fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", MD5).read_bytes() == CONTENT
    )


def test_a_busy_server_is_asked_again_and_a_missing_file_sought_at_the_next_source(site, tmp_path):
    site.failures = 2
    urls = [f"{site.url}/gone.bin", f"{site.url}/file.bin"]
    assert fetch(urls, tmp_path / "got" / "file.bin", MD5).read_bytes() == CONTENT
    with pytest.raises(UsageError, match=r"cannot be downloaded .*gone.bin.*404.*put it at"):
        fetch(urls[:1], tmp_path / "got" / "other.bin", MD5)


def test_a_wrong_checksum_is_refused_and_nothing_stays(site, tmp_path):
    with pytest.raises(UsageError, match="damaged, or another file"):
        fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", "md5:" + "0" * 32)
    assert not [path for path in (tmp_path / "got").iterdir() if path.suffix != ".lock"]


def test_a_checksum_that_nobody_published_is_recorded_and_held_to(site, tmp_path):
    path = fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", None)
    recorded = (tmp_path / "got" / "file.bin.sha256").read_text()
    assert recorded.split()[0] == hashlib.sha256(CONTENT).hexdigest()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UsageError, match="damaged, or another file"):
        fetch([f"{site.url}/file.bin"], path, None)


def test_a_download_that_was_killed_goes_on_in_the_next_process(site, tmp_path):
    (tmp_path / "site" / "file.bin").write_bytes(CONTENT * 60)

    def slowly(source, target):
        while block := source.read(1 << 18):
            target.write(block)
            time.sleep(0.02)

    def work():
        # In the process that is to be killed. tqdm's lock would be ours too, and stay locked.
        files.tqdm.set_lock(threading.RLock())
        files.shutil.copyfileobj = slowly
        fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    partial = tmp_path / "got" / ".file.bin.partial"
    while not (partial.exists() and partial.stat().st_size > 10**6) and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    held = partial.stat().st_size
    assert not (tmp_path / "got" / "file.bin").exists()
    path = fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", None)
    assert path.read_bytes() == CONTENT * 60
    assert site.log[-1][1] == held > 10**6


def test_without_a_network_every_source_is_asked_once_and_nothing_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: pytest.fail("it waited"))
    asked = []

    def offline(request, timeout):
        asked.append(request.full_url)
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(files, "urlopen", offline)
    with pytest.raises(UsageError, match=r"name resolution.*get it elsewhere and put it at"):
        fetch(["http://a/x", "http://b/x"], tmp_path / "x", None)
    assert asked == ["http://a/x", "http://b/x"]


def member(name: str, **values) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def test_a_truncated_archive_is_named_and_a_whole_one_then_taken(tmp_path):
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for i in range(20):
            made = member(f"images/{i}.jpg", size=10_000)
            tar.addfile(made, io.BytesIO(os.urandom(10_000)))
    whole = path.read_bytes()
    path.write_bytes(whole[:100_000])
    with pytest.raises(UsageError, match=r"a.tgz is damaged"):
        obtain(tmp_path / "out", path, [], None)
    assert not (tmp_path / "out").exists()
    path.write_bytes(whole)
    (tmp_path / "a.tgz.sha256").unlink()
    assert len(list((obtain(tmp_path / "out", path, [], None) / "images").iterdir())) == 20
    assert path.exists()  # the user's own archive stays


def test_a_full_disk_is_one_sentence_and_the_download_goes_on_later(site, tmp_path, monkeypatch):
    def full(source, target):
        target.write(source.read(1000))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copyfileobj", full)
        with pytest.raises(UsageError, match=r"No space left on device.; give a folder on a disk"):
            fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", MD5)
    path = fetch([f"{site.url}/file.bin"], tmp_path / "got" / "file.bin", MD5)
    assert path.read_bytes() == CONTENT
    assert [start for _, start in site.log] == [0, 1000]


def test_a_download_that_was_stopped_after_its_last_byte_is_not_repeated(site, tmp_path):
    for content in (CONTENT, CONTENT + b"more"):  # the second is another file
        (tmp_path / "got" / ".file.bin.partial").write_bytes(content)
        path = fetch([f"{site.url}/file.bin"] * 2, tmp_path / "got" / "file.bin", MD5)
        assert path.read_bytes() == CONTENT
        path.unlink()
    assert [start for _, start in site.log] == [len(CONTENT), len(CONTENT) + 4, 0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UsageError, match=r"a\.json cannot be written \(No space left on device\); make room"
    ):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# How a command ends


NO_TORCH = "import types; sys.modules['torch'] = types.SimpleNamespace(OutOfMemoryError=OSError)"


def command(code: str, **streams) -> subprocess.CompletedProcess:
    """A process whose work is `code`. It does without torch, whose import is slow."""
    whole = f"""import sys; {NO_TORCH}
from support.files import exit_code
{code}
sys.exit(exit_code(work))"""
    return subprocess.run([sys.executable, "-c", whole], cwd=ROOT, **streams)


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    made = command("def work(): print('caf\u00e9 \\udce9')", capture_output=True)
    assert (made.returncode, made.stdout) == (0, b"caf\\xe9 \\udce9\n")


def test_a_reader_that_has_gone_and_a_full_disk_end_without_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has seen enough
    made = command("def work(): print('x')", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (made.returncode, made.stderr) == (141, b"")
    with open("/dev/full", "w") as full:
        made = command("def work(): print('x')", stdout=full, stderr=subprocess.PIPE)
    assert made.returncode == 2
    assert made.stderr == b"error: [Errno 28] No space left on device\n"


def test_closed_streams_do_no_harm(capsys, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # what Python makes of `2>&-`

    def work():
        print("x", file=sys.stderr)
        raise UsageError("mend this")

    assert exit_code(work) == 2
    for name in ("stdout", "stderr"):
        getattr(sys, name).close()


@pytest.mark.slow
def test_torch_compile_without_a_compiler_is_one_sentence(capsys):
    config = {"cpp.cxx": ("no compiler",), "fx_graph_cache": False}

    def work():
        with torch._inductor.config.patch(config):
            torch.compile(lambda x: (2 * x).relu())(torch.ones(9))

    assert exit_code(work) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: torch.compile does not work here (")
    assert error.endswith("; run with --no-compile")


def test_only_a_want_of_memory_is_called_one(capsys):
    def raises(error: BaseException) -> int:
        def work():
            raise error

        return exit_code(work)

    allocator = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    for error in (torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError(allocator)):
        assert raises(error) == 2
        assert "out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        raises(RuntimeError("CUDA error: an illegal memory access was encountered"))
