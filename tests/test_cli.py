"""The command line: instant help, designed errors in one sentence, bugs not hidden."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragdistill import __version__, champions, cli
from ragdistill.commands import promote, smoke
from ragdistill.errors import ConfigError, IdentityError
from ragdistill.params import Params, ReportParams
from ragdistill.records import EvalEpisode, StopReason, write_json
from ragdistill.report.metrics import compute_metrics

LAMP = "look_at_obj_in_light"
ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "doctor", "table", "show", "play", "estimate", "promote", "rollback", "export", "serve", "smoke", "envs", "use",
    "memory", "data",
)  # fmt: skip
HEAVY = (
    "torch", "mlflow", "alfworld", "textworld", "transformers", "openai", "dvc", "matplotlib", "numpy", "starlette",
    "uvicorn",
)  # fmt: skip


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory without settings of the machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "RAGDISTILL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ragdistill", *args])
    return cli.main()


def python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def one_sentence(text: str, start: str) -> bool:
    return text.startswith(start) and text.count("\n") == 1 and text.endswith(".\n") and "Traceback" not in text


def test_help_loads_nothing_heavy_and_names_every_command() -> None:
    code = (
        "import sys, runpy\n"
        f"for args in ([], *[[c] for c in {COMMANDS!r}]):\n"
        "    sys.argv = ['ragdistill', *args, '--help']\n"
        "    try: runpy.run_module('ragdistill.cli', run_name='__main__')\n"
        "    except SystemExit as e: assert e.code == 0, e.code\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = python("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    overview = done.stdout.split("usage:")[1]
    assert all(c in overview for c in COMMANDS)


def test_the_installed_command_is_this_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ragdistill": "ragdistill.cli:main"}
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"ragdistill {__version__}\n"


@pytest.mark.parametrize("args", [(), ("evaluate",), ("promote", "--margin", "much"), ("doctor", "extra")])
def test_a_wrong_command_line_exits_2(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *args)


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("command", ["table", "play", "estimate", "promote", "rollback", "serve", "smoke"])
def test_outside_of_a_project_each_command_says_so_in_one_sentence(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command) == 1
    err = capsys.readouterr().err
    assert one_sentence(err, "ragdistill: ") and "does not exist; run " in err, err
    assert os.listdir() == [], "nothing is left behind"


def test_a_damaged_result_file_is_one_sentence(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "results").mkdir()
    (empty / "results/metrics.json").write_text("{")
    assert call(monkeypatch, "table") == 1
    assert one_sentence(capsys.readouterr().err, "ragdistill: results/metrics.json is not valid JSON")


def metrics(env: str) -> dict[str, Any]:
    """Numbers of two policies that win every other of six tasks."""
    rows = [
        EvalEpisode(
            policy=p, seed=0, task_id=f"t{i}", kind="k", bucket="k", group=f"g{i % 3}", success=i % 2 == 0, score=1.0,
            steps=5, invalid=0, tokens_billed=9, tokens_computed=5, tokens_completion=2, seconds=1.0,
            stop=StopReason.SUCCESS,
        )
        for p in ("base", "distilled") for i in range(6)
    ]  # fmt: skip
    params = ReportParams(bootstrap=50, confidence=0.95)
    return compute_metrics(rows, env=env, agent="a", split="test", label="smoke", primary=(), params=params)


def test_several_experiments_stand_in_one_table(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, *args], cwd=empty, check=True, capture_output=True)

    git("init", "-q", "-b", "trunk")
    for env in ("first", "second", "third"):
        write_json(empty / "results/metrics.json", metrics(env))
        if env != "third":
            git("add", "-A")
            git("commit", "-qm", env)
    git("update-ref", f"refs/exps/ab/{'c' * 38}/one-hint", "HEAD~1")
    assert call(monkeypatch, "table", "one-hint", "trunk", "workspace") == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    rows = [cells[:4] for cells in lines if cells[1] in ("one-hint", "trunk", "workspace")]
    cells = [("first / a / test", "one-hint"), ("second / a / test", "trunk"), ("third / a / test", "workspace")]
    assert rows == [
        *([*cell, policy, "6"] for cell in cells for policy in ("base", "distilled")),
        *([*cell, "distilled − base", "6"] for cell in cells),
    ]
    assert "score, points" in out, "it is not success in these"
    assert call(monkeypatch, "table", "nowhere") == 1
    assert one_sentence(capsys.readouterr().err, "ragdistill: 'nowhere' has no results/metrics.json")


def test_the_table_shows_each_policy_with_its_n(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(empty / "results/metrics.json", metrics("e"))
    assert call(monkeypatch, "table") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("base", "distilled", "50", "test", "smoke")), out


def test_ctrl_c_exits_130_and_says_what_is_kept_and_a_bug_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(error: BaseException):
        def run(_: argparse.Namespace) -> int:
            raise error

        return run

    for command, words, says in (
        ("smoke", "", "interrupted; finished work is kept, run again to go on"),
        ("promote", "3 finished episodes are kept", "interrupted; 3 finished episodes are kept, run again to go on"),
        ("play", "", "stopped; nothing is recorded"),
        ("show hints", "", "stopped; nothing is recorded"),
    ):
        monkeypatch.setattr(cli, f"_{command.split()[0]}", raising(KeyboardInterrupt(*[words] if words else [])))
        assert call(monkeypatch, *command.split()) == 130
        assert capsys.readouterr().err == f"ragdistill: {says}.\n"
    monkeypatch.setattr(cli, "_doctor", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, "doctor")


def test_a_stage_too_ends_a_designed_error_in_one_sentence(empty: Path) -> None:
    done = python("-m", "ragdistill.stages.strip", cwd=empty)
    assert done.returncode == 1
    assert one_sentence(done.stderr, "strip: params.yaml does not exist")


def test_overrides_change_values_and_keep_the_comments(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    smoke.override(path, ["hints.k=1", "label=smoke", "sft.lora={r: 4}", "strip.max_invalid=null"])
    now, before = (yaml.safe_load(p.read_text()) for p in (path, ROOT / "params.yaml"))
    before["label"], before["hints"]["k"], before["strip"]["max_invalid"] = "smoke", 1, None
    before["sft"]["lora"] = {"r": 4}
    assert now == before
    assert path.read_text().count("#") >= (ROOT / "params.yaml").read_text().count("#") - 1


def test_a_smoke_copy_takes_the_working_tree_and_leaves_results_and_ignored_files(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("GIT_CEILING_DIRECTORIES", str(empty.parent))
        with pytest.raises(ConfigError, match="git"):
            smoke.copy_project(empty / ".cache/copy")
    subprocess.run(["git", "init", "-q"], check=True)
    for name in ("a.py", "src/b.py", "dvc.lock", "results/metrics.json", ".cache/x", "gone.py"):
        (empty / name).parent.mkdir(parents=True, exist_ok=True)
        (empty / name).write_text(name)
    (empty / ".gitignore").write_text(".cache/\n")
    subprocess.run(["git", "add", "."], check=True)
    (empty / "gone.py").unlink()
    (empty / "src/b.py").write_text("edited")
    copy = empty / ".cache/copy"
    smoke.copy_project(copy)
    assert sorted(os.listdir(copy)) == [".git", ".gitignore", "a.py", "src"]
    assert (copy / "src/b.py").read_text() == "edited"


def test_a_champion_of_another_base_is_named_and_can_be_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def evaluate(params: Params, who: str) -> list[EvalEpisode]:
        asked.append(who)
        if who == "champion":
            raise IdentityError("It was trained on another base.")
        return [
            EvalEpisode(policy=who, seed=0, task_id=f"t{i}", kind=LAMP, bucket=LAMP, group="g", steps=3, invalid=0,
                        success=who == "challenger", score=float(who == "challenger"), tokens_billed=9, seconds=1.0,
                        tokens_computed=9, tokens_completion=9, stop=StopReason.SUCCESS)
            for i in range(40)
        ]  # fmt: skip

    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr(promote, "_evaluate", evaluate)
    moved: list[champions.Aliases] = []
    there = champions.Aliases("1", "2")
    monkeypatch.setattr(champions, "champion_and_challenger", lambda *_: there)
    monkeypatch.setattr(champions, "promote", lambda store, name, played, *_: moved.append(played))
    with pytest.raises(ConfigError, match=r"Version 1 .* another base.*--new-base"):
        promote.promote(0.0)
    assert promote.promote(0.0, new_base=True) == 0
    assert (moved, asked) == ([there], ["challenger", "champion", "challenger", "base"])


def test_who_promotes_has_a_name_even_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyError("uid not found"), OSError("no username set")):

        def nobody(error: Exception = error) -> str:
            raise error

        monkeypatch.setattr("getpass.getuser", nobody)
        assert promote._who() == f"uid {os.getuid()}"
