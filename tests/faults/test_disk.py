"""A disk that is full, read-only or out of quota: one sentence, exit 1, nothing finished is lost, and then it goes on.

The full disk is a real one: a tmpfs of a few hundred kilobytes in a mount namespace of the test's own (skips where
mounting is not permitted). Read-only is a bind mount, because root, as which tests may run, ignores mode bits.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Figure
from tests.faults.project import environment, fresh, journaled, plain_lines

STAGE = f"{sys.executable} -m ragdistill.stages.rollouts"


def in_namespace(where: Path, script: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in mounts of its own; they vanish with it."""
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=where, env=environment(**extra), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("mount")
    try:
        tried = in_namespace(place, "mount -t tmpfs -o size=64k tmpfs .")
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here")
    if tried.returncode:
        pytest.skip(f"mounting is not permitted here ({tried.stderr.strip()})")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("mounting")
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_room(
    small: Path, tmp_path: Path, figure: Figure
) -> None:
    project = fresh(small, tmp_path / "project")
    (project / ".cache/journal").mkdir()
    done = in_namespace(
        project,
        f"""mount -t tmpfs -o size=64k tmpfs .cache/journal
        {STAGE}; echo status $?
        find .cache/journal -name '*.json' | wc -l; find .cache/journal -name '*.tmp' | wc -l
        mount -o remount,size=64m .cache/journal
        {STAGE}; echo status $?
        cp -r .cache/journal .cache/kept""",
    )
    first, kept, torn, second = re.findall(r"^(?:status )?(\d+)$", done.stdout, re.MULTILINE)
    assert (first, torn, second) == ("1", "0", "0"), done.stderr
    assert 0 < int(kept) < 24
    (line,) = [x for x in plain_lines(done.stderr) if x.startswith("rollouts:")]
    assert re.search(r"cannot be written \(No space left on device\); free some space and run again, finished", line)
    assert f"{kept} of 24 episodes from the cache)" in done.stdout and "Traceback" not in done.stderr
    (project / ".cache/journal").rmdir()
    (project / ".cache/kept").rename(project / ".cache/journal")
    assert len(journaled(project)) == 24
    figure("disk full (tmpfs 64 KiB)", f"exit 1, 1 sentence, 0 torn files; {kept} of 24 kept, goes on after remount")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("mounting")
@pytest.mark.parametrize("place", [".cache/journal", "data"])
def test_a_read_only_directory_is_one_sentence(small: Path, tmp_path: Path, figure: Figure, place: str) -> None:
    project = fresh(small, tmp_path / "project")
    (project / place).mkdir(exist_ok=True)
    done = in_namespace(
        project, f"mount --bind {place} {place} && mount -o remount,ro,bind {place} && {STAGE}; echo status $?"
    )
    assert "status 1" in done.stdout and "Traceback" not in done.stderr, done.stderr
    (line,) = [x for x in plain_lines(done.stderr) if x.startswith("rollouts:")]
    assert re.search(rf"{place}.* cannot be written \(Read-only file system\); mount it writable and run again", line)
    figure(f"read-only {place}", "exit 1, 1 sentence")


LIMITED = """
import resource, sys
from pathlib import Path
from ragdistill.errors import StorageError
from ragdistill.journal import Journal
from ragdistill.records import Message
journal = Journal(Path(sys.argv[1]), Message)
journal.put("ab", Message(role="user", content="old"))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    journal.put("ab", Message(role="user", content="x" * 5000))
except StorageError as e:
    print(e)
print(journal.get("ab").content, len(list(Path(sys.argv[1]).rglob("*.tmp"))))
"""


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_torn_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    source = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run(command, env=environment(PYTHONPATH=source), capture_output=True, text=True, check=False)
    sentence, left = done.stdout.splitlines()
    assert "cannot be written (File too large); raise the file size limit (ulimit -f) and run again" in sentence
    assert left == "old 0"
