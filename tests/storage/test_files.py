"""Files and folders that are whole or not there: errors of the system, impossible names, what killed processes left."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError

from easyedit_moe.errors import DataError, WriteError
from easyedit_moe.storage import files, partial
from easyedit_moe.storage import tensors as stored
from easyedit_moe.storage.figures import save_figure
from easyedit_moe.storage.files import (
    check_readable,
    check_writable,
    discard,
    filled_folder,
    make_folder,
    new_folder,
    replacing,
    temporary_folder,
    write_text,
)
from easyedit_moe.storage.strict_json import write_json
from easyedit_moe.storage.tensors import write_safetensors, write_tensors, write_torch

VALUES = {"a": torch.ones(3)}


def fill(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "one").write_text("1")
        (folder / "two").mkdir()
        (folder / "two" / "three").write_text("3")


def fill_more(path: Path) -> None:
    with filled_folder(path) as folder:
        (folder / "one").write_text("1")
        (folder / "two").mkdir()
        (folder / "two" / "three").write_text("3")


FILES: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"a": 1}),
    "tensors": lambda path: write_safetensors(path, VALUES, {"kind": "test"}),
    "tensors for others": lambda path: write_tensors(path, VALUES, {"format": "pt"}),
    "torch": lambda path: write_torch(path, VALUES["a"]),
    "figure": lambda path: save_figure(Figure(), path.with_suffix(".png")),
}
FOLDERS: dict[str, Callable[[Path], Any]] = {"new folder": fill, "filled folder": fill_more}
EVERY = {**FILES, **FOLDERS}

# ---------------------------------------------------------------- errors of the system


class _Faults:
    """An audit hook that refuses the n-th change of the file system; hooks can't be removed, so there is one."""

    def __init__(self) -> None:
        self.at, self.number, self.below, self.count, self.said = 0, 0, "", 0, ""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.below or event not in ("open", "os.mkdir", "os.rename", "os.chmod", "tempfile.mkdtemp"):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = args[0] if isinstance(args[0], (str, os.PathLike)) else ""
        if not os.fspath(path).startswith(self.below):
            return
        self.count += 1
        if self.count == self.at:
            self.said = event
            raise OSError(self.number, os.strerror(self.number), os.fspath(path))

    @contextmanager
    def raised(self, at: int, number: int, below: Path) -> Iterator[None]:
        self.at, self.number, self.below, self.count, self.said = at, number, str(below), 0, ""
        try:
            yield
        finally:
            self.below = ""


FAULTS = _Faults()
sys.addaudithook(FAULTS)


def message_of(write: Callable[[], Any]) -> str:
    """What its WriteError says; nothing where it did not fail, as where what failed was no more than tidying up."""
    try:
        write()
    except WriteError as error:
        return str(error)
    return ""


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but what is not finished."""
    found = (path for path in folder.rglob("*") if path.is_file() and partial.MARK not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("kind", EVERY)
def test_whichever_call_fails_the_error_names_the_path_and_the_old_content_stays(
    kind: str, number: int, tmp_path: Path
) -> None:
    target = tmp_path / "below" / "target"
    if kind != "new folder":
        EVERY[kind](target)
    before, failed = content(tmp_path), []
    for at in range(1, 50):
        with FAULTS.raised(at, number, tmp_path):
            said = message_of(lambda: EVERY[kind](target))
        if not FAULTS.said:
            break
        assert not said or said.startswith(str(target.parent))
        assert not said or os.strerror(number) in said
        assert partial.MARK not in said
        failed.append(FAULTS.said)
        if not said and kind == "new folder":
            shutil.rmtree(target)
        found = content(tmp_path)
        if kind == "filled folder":  # its files take their places one after the other, each whole
            found = {name: data for name, data in found.items() if name in before}
        assert found == before, f"{FAULTS.said}, call {at}"
    assert {"os.mkdir", "os.rename"} <= set(failed)
    assert len(failed) >= 4
    assert not list(target.parent.glob(f".*{partial.MARK}*"))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", "file/below"])
def test_names_that_can_not_be_written(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match=r"can't be written: .+\. .+"):
        EVERY[kind](tmp_path / name)
    with pytest.raises(WriteError):
        check_writable(tmp_path / name)
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_in_the_way_of_a_file(kind: str, tmp_path: Path) -> None:
    for name in ("target", "target.png"):
        fill(tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(WriteError, match="folder is in the way"):
        FILES[kind](tmp_path / "target")
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_file_in_the_way_of_a_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(WriteError, match="in the way"):
        FOLDERS[kind](tmp_path / "target")
    assert content(tmp_path) == {"target": b"mine"}


def test_a_new_folder_does_not_take_the_place_of_a_full_one(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    fill(tmp_path / "target")
    before = content(tmp_path)
    with pytest.raises(WriteError, match="not empty"):
        fill(tmp_path / "target")
    assert content(tmp_path) == before


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device (os error 28)"),
                                   RuntimeError("PytorchStreamWriter failed writing file data/0")])  # fmt: skip
@pytest.mark.parametrize("kind", ["tensors", "tensors for others", "torch"])
def test_libraries_report_errors_of_the_system_as_theirs(
    kind: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILES[kind](tmp_path / "target")
    before = content(tmp_path)

    def fails(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise error

    monkeypatch.setattr(stored, "save_file", fails)
    monkeypatch.setattr(stored.torch, "save", fails)
    with pytest.raises(WriteError, match=r"target can't be written: (No space left|Pytorch)"):
        FILES[kind](tmp_path / "target")
    assert content(tmp_path) == before


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from easyedit_moe.errors import WriteError
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.tensors import write_safetensors, write_torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
big, path = torch.ones(10000), Path(sys.argv[1])
for write in (lambda: write_text(path, "x" * 100000), lambda: write_torch(path, big),
              lambda: write_safetensors(path, {"a": big}, {})):
    try:
        write()
    except WriteError as error:
        print(error)
"""


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "target"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 3
    assert all(line.startswith(f"{tmp_path}/target can't be written") for line in lines), lines
    assert content(tmp_path) == {"target": b"old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_that_are_not_the_systems_pass(tmp_path: Path) -> None:
    for raised in (KeyboardInterrupt(), ValueError("x"), DataError("y")):
        for at in (replacing, new_folder, filled_folder):
            with pytest.raises(type(raised)) as caught, at(tmp_path / "target"):
                raise raised
            assert caught.value is raised
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is written


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        for name, write in EVERY.items():
            write(tmp_path / name)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop("new folder") == modes.pop("filled folder") == 0o750
    modes.pop("two")
    one = {name: mode for name, mode in modes.items() if name in ("one", "three")}
    assert {mode for name, mode in modes.items() if name not in one} == {0o640}


def test_folders_that_are_filled(tmp_path: Path) -> None:
    fill_more(tmp_path / "target")
    (tmp_path / "target" / "other").write_text("stays")
    (tmp_path / "target" / "one").write_text("old")
    fill_more(tmp_path / "target")
    assert content(tmp_path / "target") == {"one": b"1", "two/three": b"3", "other": b"stays"}
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    assert content(tmp_path / "empty") == {"one": b"1", "two/three": b"3"}


def test_places_are_checked_beforehand_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b" / "c")
    check_writable("relative")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # as for a user who is not root
    with pytest.raises(WriteError, match="Permission denied"):
        check_writable(tmp_path / "a")


def test_temporary_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_folder() as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", full)
    with pytest.raises(WriteError, match="TMPDIR"), temporary_folder():
        pass


def test_what_is_of_no_more_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_text(tmp_path / "file", "")
    discard(tmp_path / "file")
    discard(tmp_path / "file")
    make_folder(tmp_path / "folder")
    with caplog.at_level("INFO"):
        discard(tmp_path / "folder")
    assert "could not be deleted" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["none", "folder", "x" * 300, "a\0b", "fifo", "file/below"])
def test_what_is_no_file_to_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    check_readable(tmp_path / "file", DataError)
    with pytest.raises(DataError, match=r"does not exist|can't be read: "):
        check_readable(tmp_path / name, DataError)


# ---------------------------------------------------------------- what killed processes left

WRITER = """
import sys, time
from pathlib import Path
from easyedit_moe.storage.files import new_folder, replacing
with {"file": replacing, "folder": new_folder}[sys.argv[2]](Path(sys.argv[1])) as partial:
    (partial / "file" if sys.argv[2] == "folder" else partial).write_text("half")
    (partial.parent / ".tmpAbCdEf").write_text("as safetensors writes")
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing."""
    command = [sys.executable, "-c", WRITER, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_and_a_living_ones_stays(kind: str, tmp_path: Path) -> None:
    with writer(tmp_path / "target", kind) as killed, writer(tmp_path / "target", kind) as living:
        assert len(list(tmp_path.iterdir())) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        write_text(tmp_path / "other", "new")  # a later write in the same folder
        (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert (left / ".tmpAbCdEf").is_file()
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target"]
    assert content(tmp_path)["target/file" if kind == "folder" else "target"] == b"half"


def test_folders_of_others_and_links_stay(tmp_path: Path) -> None:
    theirs = tmp_path / f".x{partial.MARK}y"
    theirs.mkdir()
    (theirs / "file").write_text("mine")
    link = tmp_path / f".l{partial.MARK}z"
    link.symlink_to(theirs, target_is_directory=True)
    bare = tmp_path / f".b{partial.MARK}z"  # its process ended before it had a lock
    bare.mkdir()
    write_text(tmp_path / "target", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [link.name, theirs.name, "target"]
    assert content(tmp_path / theirs.name) == {} or (theirs / "file").read_text() == "mine"


def test_a_folder_that_was_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    locks: list[Any] = []
    real = partial.tempfile.mkdtemp

    def taken(**options: Any) -> str:
        made.append(Path(real(**options)))
        if len(made) < 3:
            locks.append(partial.FileLock(made[-1] / partial.LOCK))
            locks[-1].acquire()
        return str(made[-1])

    monkeypatch.setattr(partial.tempfile, "mkdtemp", taken)
    write_text(tmp_path / "target", "new")
    assert len(made) == 3
    assert not made[-1].exists()
    assert content(tmp_path) == {"target": b"new"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLock(partial.FileLock):  # type: ignore[misc]
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("no flock")

    write_text(tmp_path / "left" / "file", "")
    left = tmp_path / f".x{partial.MARK}y"
    left.mkdir()
    monkeypatch.setattr(partial, "FileLock", NoLock)
    write_text(tmp_path / "target", "new")
    assert (tmp_path / "target").read_text() == "new"
    assert left.is_dir(), "nobody can say whose it is"


def test_writing_costs_little(tmp_path: Path) -> None:
    began = time.perf_counter()
    for number in range(50):
        write_text(tmp_path / f"{number}", "x")
    assert (time.perf_counter() - began) / 50 < 0.05
