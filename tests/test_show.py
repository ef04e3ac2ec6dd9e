"""`ragdistill show`: the bank and one episode in a terminal, whatever their texts hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ragdistill import cli
from ragdistill.commands.show import as_text, printable
from ragdistill.hints.lift import LiftRow
from ragdistill.records import Hint, Step, StopReason, Trajectory, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
STEER = "\x1b[2J\x1b]0;owned\x07[red]not markup[/red]\u202e:smile:"


def trajectory(name: str, task: int, won: bool, hint: bool = False) -> Trajectory:
    return Trajectory(
        id=name, task_id=f"t{task}", policy="base", agent="react", attempt=0, seed=0, goal="g", bucket="clean",
        group="room1", kind="clean", hints=("text one",) if hint else (), hint_ids=("h1",) if hint else (),
        first_observation="You are here.",
        steps=(
            Step(reply="", thought="I look.", action="go to sink 1", observation="Nothing happens.", valid=False),
            Step(reply=STEER, thought="", action="", observation="No action found."),
        ),
        stop=StopReason.SUCCESS if won else StopReason.LOOP,
    )  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four training tasks, lost without and won with hint h1; two evaluation episodes with it, one won."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    hints = [
        Hint(id="h1", bucket="clean", text="text one", kind="contrast", evidence=("roll0aaaa", "roll1"), mentions=7),
        Hint(id="h2", bucket="heat", text=STEER, kind="redundancy"),
    ]
    write_jsonl(tmp_path / "data/hints/bank.jsonl", hints)
    write_jsonl(tmp_path / "data/rollouts.jsonl", [trajectory(f"roll{i}aaaa", i, False) for i in range(4)])
    write_jsonl(tmp_path / "data/teach/hints.jsonl", [trajectory(f"teach{i}", i, i < 3, True) for i in range(4)])
    rag = [trajectory(f"rag{i}", 10 + i, i == 0, True) for i in range(2)]
    write_jsonl(tmp_path / "results/eval/rag-0/trajectories.jsonl", rag)
    write_jsonl(tmp_path / "data/lift/trajectories.jsonl", [trajectory("alone1", 1, True, True)])
    return tmp_path


def show(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ragdistill", "show", *args])
    return cli.main()


@pytest.mark.usefixtures("project")
def test_each_hint_stands_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, "hints") == 0
    out = capsys.readouterr().out
    expected = (
        "clean text one contrast, 7 mentions, evidence of 2 (roll0aaa …); teacher won 75 % [30–95], n 4; "
        "rag won 50 % [9–91], n 2; with − without +75 points [+25, +100], n 4 heat"
    )
    assert expected in " ".join(out.split())
    assert "not effects" in out


def test_a_hint_measured_alone_says_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = LiftRow(
        hint_id="h1", bucket="clean", text="text one", tasks=16, attempts=16, shown=0.5, hidden=0.25, diff=0.25,
        lo=0.05, hi=0.45, p=0.1,
    )  # fmt: skip
    write_jsonl(project / "data/lift/measured.jsonl", [row])
    assert show(monkeypatch, "hints") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "alone − none +25 points [+5, +45], n 16" in out and "the only one shown" in out


@pytest.mark.usefixtures("project")
def test_nothing_untrusted_steers_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, "hints") == 0
    assert show(monkeypatch, "trajectory", "roll2") == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.count("[red]not") == 2, "shown as it is, in the table and in the episode"
    assert "\\x1b]0;owned\\x07" in out and ":smile:" in out


@pytest.mark.usefixtures("project")
def test_a_trajectory_is_found_by_the_beginning_of_its_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, "trajectory", "teach3") == 0
    out = capsys.readouterr().out
    parts = ("data/teach/hints.jsonl", "lost in 2 steps, ended by loop, 1 refused", "hint: text one", "You are here.")
    for part in (*parts, "  1 I look.\n    > go to sink 1\n    [refused] Nothing happens.", "(no action)"):
        assert part in out
    assert show(monkeypatch, "trajectory", "rag1") == 0
    assert "results/eval/rag-0" in capsys.readouterr().out
    assert show(monkeypatch, "trajectory", "alone") == 0
    assert "data/lift/trajectories.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "says"), [(0.0, "lost in"), (2 / 3, "lost (reward 0.667) in"), (0.9999, "lost in"), (1.0, "won in")]
)
def test_what_a_lost_game_was_worth_stands_beside_its_verdict(reward: float, says: str) -> None:
    t = msgspec.structs.replace(trajectory("a", 0, reward == 1.0), reward=reward)
    assert f"\n{says} 2 steps" in as_text(t, Path("x.jsonl"))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("beginning", "reason"), [("roll", "4 trajectories begin with"), ("nobody", "No trajectory's id"), ("", "is empty")]
)
def test_an_id_that_names_none_or_several_is_one_sentence(
    beginning: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, "trajectory", beginning) == 1
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_before_anything_was_played_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert show(monkeypatch, "trajectory", "x") == 1
    assert "rollouts.jsonl does not exist; run the stage" in capsys.readouterr().err
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert show(monkeypatch, "hints") == 1
    assert "bank.jsonl does not exist; run the stage" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(project: Path) -> None:
    command = f'"{sys.executable}" -m ragdistill.cli show trajectory roll2 | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=project, capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_printable_keeps_words_and_lines() -> None:
    assert printable("Größe – “ok”\n") == "Größe – “ok”\n"
    assert printable("a\tb\r\x9b") == "a\\tb\\r\\x9b"
