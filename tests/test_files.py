"""Folders that are there whole or not at all."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddnn.errors import ExportError
from ddnn.files import check_free, hold, new_folder, remove_unused, write_atomic

FILES = 6

WRITER = f"""
import sys, time
from pathlib import Path
from ddnn.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    for i in range({FILES}):
        (folder / f"{{i}}.bin").write_bytes(bytes(100_000))
        print(i, flush=True)
        time.sleep(0.005)
print("written", flush=True)
"""


def writer(target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", [0, 2, FILES - 1, "written"])
def test_a_kill_leaves_all_or_nothing(tmp_path: Path, moment: int | str) -> None:
    target = tmp_path / "folder"
    for _ in range(2):  # a second one finds what the first has left
        with writer(target) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == str(moment):
                    process.send_signal(signal.SIGKILL)
                    break
        if target.exists():
            assert len(list(target.iterdir())) == FILES
            assert all(path.stat().st_size == 100_000 for path in target.iterdir())
            assert moment in (FILES - 1, "written")
            for path in target.iterdir():
                path.unlink()
    with new_folder(target) as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]  # and nothing of the dead is left


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "folder") as folder:
            (folder / "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_another_is_writing_is_left_alone(tmp_path: Path) -> None:
    """By another thread here: also one whose process number is this one's, as in another container."""
    with new_folder(tmp_path / "folder") as theirs:
        (theirs / "theirs").touch()
        with new_folder(tmp_path / "folder") as mine:
            (mine / "mine").touch()
        assert [path.name for path in theirs.iterdir()] == ["theirs"]
        (tmp_path / "folder" / "mine").unlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["theirs"]


def test_only_what_the_same_folder_left_is_swept(tmp_path: Path) -> None:
    others = [tmp_path / f".{name}.{'0' * 16}.tmp" for name in ("folder.v2", "other", "folderx")]
    left = tmp_path / f".folder.{'0' * 16}.tmp"
    for path in [*others, left]:
        path.mkdir()
    with new_folder(tmp_path / "folder"):
        assert not left.exists()
    assert all(path.exists() for path in others)


def test_a_folder_in_use_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    handles = [hold(tmp_path / "folder", alone=False) for _ in range(2)]
    for handle in handles:
        assert handle is not None
        remove_unused(tmp_path / "folder")
        assert (tmp_path / "folder").exists()
        os.close(handle)
    remove_unused(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert hold(tmp_path / "folder", alone=False) is None


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    contents = [bytes([number]) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_atomic(tmp_path / "file", content), contents * 5))
    assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_only_an_empty_folder_is_taken(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        with new_folder(path) as folder:
            (folder / "file").touch()

    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert (tmp_path / "empty" / "file").exists()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(ExportError, match=f"{name} exists already"):
            make(tmp_path / name)
    with pytest.raises(ExportError, match="cannot write "):
        make(tmp_path / "file" / "folder")


def test_what_cannot_be_replaced_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(ExportError, match=r"is the working directory, .*; give a new folder in it, such as .*new$"):
            check_free(path)
    (tmp_path / "volume").mkdir()
    check_free(tmp_path / "volume")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(ExportError, match="volume is a mount point, which cannot be replaced; give a new folder in it"):
        check_free(tmp_path / "volume")


def test_one_that_came_in_between_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "folder") as folder:
            (folder / "mine").touch()
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "theirs").touch()

    with pytest.raises(ExportError, match="Directory not empty"):
        race()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["theirs"]
