"""`ragdistill play`: an agent or a person on a real game, live, by the evaluation's rules and safe to look at."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ragdistill import champions, cli, progress
from ragdistill.agents import make_agent
from ragdistill.commands import promote
from ragdistill.commands.play import act, find_task, watch, wrapped
from ragdistill.commands.smoke import override
from ragdistill.envs.alfworld.domain import AlfworldDomain
from ragdistill.envs.alfworld.games import read_game
from ragdistill.errors import ConfigError
from ragdistill.llm import Sampling, context_limit
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, load_params
from ragdistill.records import Message, Observation, Task, write_jsonl
from ragdistill.rollout import Episode
from ragdistill.stages import playing
from ragdistill.stages.defaults import settle, student_name
from tests.llm_toys import toy_model

ROOT = Path(__file__).resolve().parents[1]
STEER = "\x1b[2J\x1b]0;owned\x07[red]not markup[/red]\u202e"


def steer(messages: Sequence[Message], sampling: Sampling, name: str) -> str:
    """A script whose first reply holds no action, and whose second one tries to steer the terminal."""
    turn = sum(m.role == "assistant" for m in messages)
    return (STEER, f"Thought: {STEER}\nAction: {STEER}", f"Action: played by {name}")[min(turn, 2)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of one real development game, with a scripted player."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "params.yaml", folder)
    script = ["model.engine=scripted", "model.script=tests.scripted_policy:play", "env.max_steps=40"]
    override(folder / "params.yaml", script)
    before = Path.cwd()
    os.chdir(folder)  # a task's data is relative to the project
    try:
        write_jsonl(Path("data/tasks/dev.jsonl"), AlfworldDomain().tasks("dev", 1, 0, Path("data/games/dev")))
    finally:
        os.chdir(before)
    for name in ("models/base", "models/students/distilled-0"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "project"
    shutil.copytree(template, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(promote, "STORE", copy / "mlruns")  # found at import, beside the tests' own params.yaml
    for name in ("DVC_ROOT", "RAGDISTILL_CACHE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return copy


def play(monkeypatch: pytest.MonkeyPatch, *args: str, typed: str = "") -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setattr(sys, "argv", ["ragdistill", "play", *args])
    return cli.main()


def walkthrough() -> tuple[str, ...]:
    return tuple(read_game(Path(find_task(None).data)).walkthrough)


@pytest.mark.usefixtures("project")
def test_an_agent_is_watched_step_by_step_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert play(monkeypatch, "--adapter", "models/students/distilled-0") == 0
    out = capsys.readouterr().out
    assert "base + models/students/distilled-0 acts" in out and "Your task is to:" in out
    assert out.index("  1 I ") < out.index("    > go to"), "first the thought, then the action"
    assert out.count("    > go to") > 1 and "\nwon in " in out
    assert max(map(len, out.splitlines())) <= 60, "nothing is wider than the terminal"


@pytest.mark.usefixtures("project")
def test_what_a_model_says_cannot_steer_the_terminal(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    override(project / "params.yaml", ["model.script=tests.test_play:steer", "env.max_steps=3"])
    assert play(monkeypatch) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.count("\\x1b[2J\\x1b]0;owned\\x07[red]not markup[/red]\\u202e") == 3, "reply, thought and action"
    parts = ("(no action)", "No action found.", "> played by base", "[refused] Nothing happens.", "ended by max_steps")
    assert all(part in out for part in parts), out


@pytest.mark.usefixtures("project")
def test_a_person_wins_with_the_walkthrough_and_sees_no_list_of_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moves = walkthrough()
    assert play(monkeypatch, "--me", typed="\n".join([*moves, "look"])) == 0
    out = capsys.readouterr().out
    assert f"won in {len(moves)} steps, 0 refused." in out
    assert not any(move in out for move in moves), "the admissible commands stand nowhere"


@pytest.mark.usefixtures("project")
def test_a_person_has_history_quit_and_the_same_help_as_an_agent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(monkeypatch, "--me", typed="history\n\nhelp\nlook\nHistory\nquit\nlook\n") == 0
    out = capsys.readouterr().out
    assert "Nothing was typed yet." in out and "  1 help\n  2 look\n" in out
    assert "[refused] Nothing happens." in out and "not won in 2 steps, 1 refused." in out
    assert play(monkeypatch, "--me", typed="look") == 0
    assert "not won in 1 steps" in capsys.readouterr().out, "the end of input ends the game too"


@pytest.mark.usefixtures("project")
def test_a_person_has_no_more_steps_than_an_agent(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    override(project / "params.yaml", ["env.max_steps=3"])
    assert play(monkeypatch, "--me", typed="look\n" * 9) == 0
    assert "not won in 3 steps, 0 refused." in capsys.readouterr().out


def test_a_champion_is_the_registered_adapter_on_the_base(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def fetched(params: Params, alias: str) -> Path:
        asked.append((student_name(params), alias))
        return project / "models/students/distilled-0"

    monkeypatch.setattr(promote, "fetch_adapter", fetched)
    override(project / "params.yaml", ["model.script=tests.test_play:steer", "env.max_steps=3"])
    assert play(monkeypatch, "--model", "champion") == 0
    assert "> played by distilled-0" in capsys.readouterr().out
    assert asked == [("ragdistill-student", "champion")]


def test_a_watched_model_keeps_its_context_and_is_closed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that is not seen fills up where the evaluation drops old turns; a paid call under way is kept."""
    closed: list[int] = []
    monkeypatch.setattr(ScriptedModel, "context", 7, raising=False)
    monkeypatch.setattr(ScriptedModel, "close", lambda _: closed.append(1))
    monkeypatch.setattr(Episode, "run", lambda _, env, model: (_ for _ in ()).throw(KeyError(context_limit(model))))
    override(project / "params.yaml", ["model.script=tests.test_play:steer"])
    with pytest.raises(KeyError, match="7"):
        play(monkeypatch)
    assert closed


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--task", "nowhere"), "No task's id contains"),
        (("--model", "challenger"), "holds no MLflow store"),
        (("--model", "elsewhere"), "elsewhere does not exist"),
        (("--adapter", "elsewhere"), "elsewhere does not exist"),
        (("--model", "champion", "--adapter", "models/base"), "is an adapter itself"),
        (("--me", "--model", "base"), "plays without a model"),
    ],
)
def test_a_wrong_name_is_one_sentence(
    args: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(monkeypatch, *args) == 1
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--model", "other"), "other holds no config.json"),
        (("--model", "untyped"), "untyped/config.json is of no model that transformers knows"),
        (("--adapter", "other"), "other does not say which base it belongs to"),
    ],
)
def test_a_directory_that_holds_something_else_is_one_sentence(
    args: tuple[str, ...], reason: str, toy: Path, project: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    override(project / "params.yaml", ["model.engine=auto"])
    shutil.copytree(toy, project / "models/base", dirs_exist_ok=True)
    shutil.copytree(toy, project / "untyped")
    (project / "untyped/config.json").write_text("{}")
    (project / "other").mkdir()
    assert play(monkeypatch, *args) == 1
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "name"), [("play", "play"), ("serve --model base", "serve"), ("promote", "challenger")]
)
def test_loading_a_model_is_not_silent(
    command: str, name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(*_: object) -> None:
        time.sleep(0.5)
        raise ConfigError("That is enough.")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(playing, "_scripted", slowly)
    monkeypatch.setattr(champions, "champion_and_challenger", lambda *_: champions.Aliases(None, "1"))
    monkeypatch.setattr(promote, "fetch_adapter", lambda *_: project / "models/students/distilled-0")
    shutil.copy(project / "data/tasks/dev.jsonl", project / "data/tasks/eval.jsonl")
    monkeypatch.setattr(sys, "argv", ["ragdistill", *command.split()])
    assert cli.main() == 1
    assert f"{name}: loading the model, 0 s so far\n" in capsys.readouterr().err


class Shop:
    """An environment whose first step ends it with a reward of two thirds."""

    def reset(self, task: Task) -> Observation:
        return Observation(text="A shop.")

    def step(self, action: str) -> Observation:
        return Observation(text="Sold.", reward=2 / 3, done=True)

    def close(self) -> None: ...


@pytest.mark.usefixtures("project")
def test_what_a_lost_game_was_worth_stands_beside_its_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, model = find_task(None), ScriptedModel(lambda *_: "Action: buy", "m")
    monkeypatch.setattr(sys, "stdin", io.StringIO("buy\n"))
    act(Shop(), task, 3)
    asyncio.run(watch(settle(load_params()), Shop(), task, model, "shop", make_agent("react")))
    assert capsys.readouterr().out.count("lost (reward 0.667) in 1 steps, ") == 2


def test_a_task_is_found_by_a_part_of_its_id_and_development_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(name: str) -> Task:
        return Task(id=name, env="e", split="s", kind="k", group="g", data="", sha256="")

    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("data/tasks/eval.jsonl"), [task("test/mug-1"), task("test/mug-12")])
    assert find_task(None).id == "test/mug-1"
    write_jsonl(Path("data/tasks/dev.jsonl"), [task("dev/mug-3")])
    assert find_task(None).id == "dev/mug-3"
    assert find_task("g-12").id == "test/mug-12"
    assert find_task("test/mug-1").id == "test/mug-1", "a whole id is not ambiguous"
    with pytest.raises(ConfigError, match="3 tasks' ids contain"):
        find_task("mug")


def test_wrapping_keeps_the_lines_of_a_text() -> None:
    assert wrapped("one two\n\nthree\x1b", 10, "  ") == "  one two\n\n  three\\x1\n  b"
    assert wrapped("one two three", 10, "    ", "  1 ") == "  1 one\n    two\n    three"
    assert wrapped("", 10, "    ", "  1 ") == "  1 "
