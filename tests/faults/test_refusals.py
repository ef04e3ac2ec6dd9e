"""What the system or a library says when a write or memory is refused: told from bugs, and said in one sentence."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ragdistill.errors import ConfigError, EnvironmentFault, MemoryFault, memory_fault
from ragdistill.files import storage_error
from ragdistill.stages.common import plainly
from tests.faults.conftest import Figure
from tests.faults.project import environment, in_namespace

LIBRARIES = """
import shutil, sqlite3, sys
from pathlib import Path
import safetensors.torch, torch
from tokenizers import Tokenizer, models
from ragdistill.files import storage_error
disk, tree = Path(sys.argv[1]), Path(sys.argv[2])
tensors = {"a": torch.zeros(300, 300)}
def database():
    with sqlite3.connect(disk / "x.db") as db:
        db.execute("create table t (x)")
        for _ in range(1000):
            db.execute("insert into t values (?)", ("x" * 1000,))
            db.commit()
def wrapped():
    try:
        database()
    except sqlite3.Error as e:
        raise RuntimeError("the store failed") from e
def vocabulary():
    Tokenizer(models.WordLevel({str(i): i for i in range(30_000)}, "0")).save(str(disk / "x.json"))
for name, write in {
    "safetensors": lambda: safetensors.torch.save_file(tensors, disk / "x.safetensors"),
    "torch": lambda: torch.save(tensors, disk / "x.pt"),
    "copytree": lambda: shutil.copytree(tree, disk / "tree"),
    "sqlite": database, "sqlite, wrapped": wrapped, "tokenizers": vocabulary,
}.items():
    try:
        write()
    except Exception as e:
        print(f"{name}: {storage_error(e)}")
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
"""


@pytest.mark.timeout(120)
def test_every_library_s_own_words_for_a_full_disk_are_understood(
    tmp_path: Path, figure: Figure, mounting: tuple[str, ...]
) -> None:
    for place in ("disk", "tree"):
        (tmp_path / place).mkdir()
    for name in "ab":
        (tmp_path / "tree" / name).write_bytes(bytes(300_000))
    (tmp_path / "libraries.py").write_text(LIBRARIES)
    source = str(Path(__file__).resolve().parents[2] / "src")
    script = f"mount -t tmpfs -o size=64k tmpfs disk && {sys.executable} libraries.py disk tree"
    done = in_namespace(mounting, tmp_path, script, PYTHONPATH=source)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(said) == {"safetensors", "torch", "copytree", "sqlite", "sqlite, wrapped", "tokenizers"}
    misunderstood = {k: v for k, v in said.items() if "cannot be written (" not in v or "; free some space" not in v}
    assert not misunderstood
    figure("disk full, by library", f"{len(said)} of {len(said)} understood: {', '.join(said)}")


def chained(cause: BaseException, result: BaseException, hidden: bool = False) -> BaseException:
    """As `raise result` does while `cause` is handled; `hidden`: `from None`."""
    result.__context__, result.__suppress_context__ = cause, hidden
    return result


FULL = OSError(28, "No space left on device", "/d/x")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FULL, "/d/x cannot be written (No space left on device); free some space"),
        (chained(FULL, KeyError("x")), "/d/x cannot be written"),
        (ExceptionGroup("tasks", [ValueError("x"), FULL]), "/d/x cannot be written"),
        (OSError(28, "No space left on device", "/from", None, "/to"), "/to cannot be written"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "(Read-only file system); mount it writable"),
        (PermissionError(13, "Permission denied", "/d/x"), "give yourself write permission"),
        (PermissionError(13, "Permission denied"), None),  # a firewall's
        (FileNotFoundError(2, "No such file or directory", "/d/x"), None),
        (RuntimeError("No such file or directory (os error 2)"), None),
        (chained(FULL, KeyError("x"), hidden=True), None),
        (shutil.Error([("/a", "/b", "[Errno 2] No such file or directory: '/a'")]), None),
        (sqlite3.OperationalError("no such table: t"), None),
        (ValueError("database or disk is full"), None),
    ],
)
def test_storage_errors_are_told_from_bugs(error: BaseException, says: str | None) -> None:
    found = storage_error(error)
    assert (found is None) if says is None else says in str(found)


TORCH = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"
)
OPENVINO = (
    "Exception from src/inference/src/cpp/infer_request.cpp:224:\n"
    "Exception from src/plugins/intel_cpu/src/node.cpp:794:\n[CPU] FullyConnected node with name 'MatMul_561' "
    "Check 'ptr' failed at src/plugins/intel_cpu/src/cpu_memory.cpp:257:\nFailed to allocate 4096 bytes of memory\n"
)
"""As it says under a limit of its address space."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError(TORCH), "(can't allocate memory: you tried to allocate 4)"),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried 9"),
            "(not enough memory: you",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "(out of memory. Tried to allocate 2.00 GiB.)",
        ),
        (RuntimeError(OPENVINO), "(Failed to allocate 4096 bytes of memory)"),
        (RuntimeError("[CPU] FullyConnected node with name 'MatMul_30' can't alloc\n\n"), "(can't alloc)"),
        (RuntimeError("Check failed:\nbad allocation"), "(bad allocation)"),
        (MemoryError(), "(the machine gave no number)"),
        (MemoryError("Unable to allocate 7 PiB"), "(Unable to allocate 7 PiB)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (chained(MemoryError("x"), KeyError("y")), "(x)"),
        (ValueError("a text that says: out of memory"), None),
        (RuntimeError("shapes do not fit"), None),
    ],
)
def test_memory_that_is_short_is_told_from_bugs(error: BaseException, says: str | None) -> None:
    found = memory_fault(error, "do less")
    assert (found is None) if says is None else says in str(found) and "; do less and run again" in str(found)


def test_each_stage_names_the_parameter_that_takes_less_memory() -> None:
    short = RuntimeError(TORCH)
    assert "training.checkpointing to true or lower sft.lora.batch and run" in str(plainly(short, "sft@distilled-0"))
    assert "lower coldstart.lora.batch" in str(plainly(MemoryFault("4 bytes"), "coldstart"))
    assert all(
        "lower model.concurrency" in str(plainly(short, s)) for s in ("rollouts", "evaluate@base-0", "teach@hints")
    )
    assert "end other programs and run again" in str(plainly(short, "track"))
    ours = ConfigError("is wrong.")
    assert plainly(ours, "sft@x-0") is ours and plainly(KeyError("a bug"), "sft@x-0") is None
    lost = EnvironmentFault("lost.")
    assert plainly(lost, "rollouts") is lost


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
