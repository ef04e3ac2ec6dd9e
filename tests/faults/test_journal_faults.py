"""A journal whose files were cut, altered, emptied, swapped or made unreadable: absent then, never another episode."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ragdistill.journal import Journal
from ragdistill.llm import Reply
from ragdistill.records import Step, StopReason, Trajectory, Usage
from tests.faults.conftest import Figure

KEY, OTHER = "ab12" * 8, "cd34" * 8


def episode(name: str, text: str = "You see a mug 1.") -> Trajectory:
    steps = (Step(reply="Action: look", thought="", action="look", observation=text),) * 3
    return Trajectory(
        id=name, task_id="t", policy="base", agent="react", attempt=0, seed=1, goal="g", bucket="b", group="g",
        kind="k", steps=steps, stop=StopReason.SUCCESS, reward=1.0,
    )  # fmt: skip


def written(root: Path) -> tuple[Journal[Trajectory], Path, bytes]:
    shutil.rmtree(root, ignore_errors=True)
    journal = Journal(root, Trajectory)
    journal.put(KEY, episode(KEY))
    (path,) = root.rglob("*.json")
    return journal, path, path.read_bytes()


def test_an_entry_cut_anywhere_is_whole_or_absent(tmp_path: Path, figure: Figure) -> None:
    journal, path, whole = written(tmp_path / "j")
    absent = 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        absent += journal.get(KEY) is None
    assert absent == len(whole), "what lost its seal could have lost more"
    figure("journal entry cut", f"at each of {len(whole)} bytes: 0 read, 0 as another episode")


def test_an_altered_byte_never_passes_for_an_episode(tmp_path: Path, figure: Figure) -> None:
    journal, path, whole = written(tmp_path / "j")
    rng = random.Random(0)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(flipped))
        assert journal.get(KEY) is None, (at, bytes(flipped))
    assert journal.damaged == len(whole)
    figure("journal entry, one bit flipped", f"in each of {len(whole)} bytes: 0 accepted")


def test_an_entry_under_another_s_name_is_not_taken_for_it(tmp_path: Path) -> None:
    journal, path, _ = written(tmp_path / "j")
    stranger = tmp_path / "j" / OTHER[:2] / f"{OTHER}.json"
    stranger.parent.mkdir()
    shutil.copy(path, stranger)
    assert journal.get(OTHER) is None and journal.damaged == 1
    assert journal.get(KEY) == episode(KEY)


def as_in_0_1_0(t: Trajectory) -> bytes:
    """No seal, and steps that do not know `state`."""
    row = msgspec.to_builtins(t)
    return msgspec.json.encode(row | {"steps": [{k: v for k, v in s.items() if k != "state"} for s in row["steps"]]})


def test_an_entry_of_version_0_1_0_is_read_under_its_own_name_only(tmp_path: Path) -> None:
    journal, path, _ = written(tmp_path / "j")
    text = 'A note says "state": {}.'  # an observation may well name the field
    path.write_bytes(as_in_0_1_0(episode(KEY, text)))
    assert journal.get(KEY) == episode(KEY, text) and journal.damaged == 0
    path.write_bytes(as_in_0_1_0(episode(OTHER)))
    assert journal.get(KEY) is None and journal.damaged == 1


def test_a_newer_entry_without_its_seal_is_absent_altered_or_not(tmp_path: Path, figure: Figure) -> None:
    journal, path, whole = written(tmp_path / "j")
    content, _, seal = whole.partition(b"\n")
    altered = content.replace(b"mug", b"cup")
    broken = [content, altered, content + b"\n", altered + b"\n", altered + b"\n" + seal, content + b"\n" + seal[:-1]]
    for entry in broken:
        path.write_bytes(entry)
        assert journal.get(KEY) is None, entry
    assert journal.damaged == len(broken)
    call = Journal(tmp_path / "calls", Reply)
    call.put(KEY, Reply(text="yes", usage=Usage()))
    (path,) = call.root.rglob("*.json")
    path.write_bytes(path.read_bytes().partition(b"\n")[0])
    assert call.get(KEY) is None, "version 0.1.0 journaled no calls"
    figure("journal entry without seal", f"{len(broken)} of {len(broken)} refused; 0.1.0's are read, under their name")


def test_an_entry_that_cannot_be_read_is_absent(tmp_path: Path) -> None:
    journal, path, _ = written(tmp_path / "j")
    path.unlink()
    path.mkdir()
    assert journal.get(KEY) is None and journal.damaged == 1


def test_leftovers_of_a_kill_are_no_entries(tmp_path: Path) -> None:
    journal, path, whole = written(tmp_path / "j")
    path.with_name(f".{path.name}.x1.tmp").write_bytes(whole[:40])
    assert journal.get(KEY) == episode(KEY)
    assert [p.name for p in (tmp_path / "j").glob("*/*.json")] == [path.name]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.text(max_size=60))
def test_any_bytes_are_absent_and_any_text_comes_back(raw: bytes, text: str) -> None:
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path()
    journal = Journal(root / f"ragdistill-journal-{id(raw)}", Trajectory)
    try:
        journal.put(KEY, episode(KEY, text))
        assert journal.get(KEY) == episode(KEY, text)
        next(journal.root.rglob("*.json")).write_bytes(raw)
        assert journal.get(KEY) is None
    finally:
        shutil.rmtree(journal.root)
