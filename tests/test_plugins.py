"""Environments of other packages: found by entry point, refused in one sentence, and played through the whole DAG."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from ragdistill.agents import make_agent
from ragdistill.commands.smoke import copy_project, override
from ragdistill.contamination import check_disjoint
from ragdistill.envs import identity_of, make_domain, plugins
from ragdistill.envs.gymnasium import GymnasiumDomain, GymnasiumEnv
from ragdistill.envs.pool import EnvPool
from ragdistill.errors import ConfigError, DataError
from ragdistill.journal import Journal
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import load_params
from ragdistill.records import Hint, StopReason, Trajectory, read_jsonl
from ragdistill.rollout import Setting, play_all
from ragdistill.stages.defaults import settle
from tests.test_dag import OVERRIDES, ROOT
from tests.test_training import make_base

EXAMPLE = ROOT / "examples/repair_shop"
PARAMS = load_params(ROOT / "params.yaml")
OWN = """
model.script=tests.shop_policy:play
env.name=repair_shop
env.max_steps=4
coldstart.enabled=false
tasks.train=40
tasks.test=20
evaluate.primary=[]
"""


def run(python: Path, where: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "RAGDISTILL_"))}
    env |= {"PATH": f"{python.parent}:{env['PATH']}", "PYTHONPATH": "src"}
    return subprocess.run([str(python), *args], cwd=where, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that sees this one's packages and has the example installed."""
    home = tmp_path_factory.mktemp("plugin")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    python = home / "venv/bin/python"
    site = home / "venv/lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    example = Path(shutil.copytree(EXAMPLE, home / "repair_shop"))  # an installation leaves traces in its source
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    pip = ["-m", "pip", "--python", str(python), "install", "-q", *offline, "-e", str(example)]
    done = subprocess.run([sys.executable, *pip], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def test_the_example_is_as_short_as_promised() -> None:
    assert len((EXAMPLE / "repair_shop.py").read_text().splitlines()) <= 60


def test_an_installed_environment_is_listed_with_its_fingerprint(python: Path, tmp_path: Path) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    done = run(python, tmp_path, "-m", "ragdistill.cli", "envs")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[:1]] == [["*", "alfworld"]]
    assert [*rows[2][:3], rows[2][3]] == ["repair_shop", "ragdistill-repair-shop", "1.0", "repair_shop-1"]
    override(tmp_path / "params.yaml", ["env.name=repair_shop", "env.options={hurry: false}"])
    chosen = run(python, tmp_path, "-m", "ragdistill.cli", "envs").stdout.splitlines()[2]
    assert chosen.startswith("*") and "repair_shop-1/" in chosen, "options are part of the identity"
    override(tmp_path / "params.yaml", ["env.options={hury: false}"])
    wrong = run(python, tmp_path, "-m", "ragdistill.cli", "envs")
    assert wrong.returncode == 1
    assert "does not suit repair_shop" in wrong.stdout and "hurry: 'bool' = True" in wrong.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_dag_runs_on_an_environment_of_another_package(python: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    copy_project(copy)
    make_base(copy / "tiny", 0)
    override(copy / "params.yaml", [line for line in (*OVERRIDES.splitlines(), *OWN.splitlines()) if line])
    done = run(python, copy, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads((copy / "data/identity.json").read_text())["environment"] == "repair_shop-1"
    hints = read_jsonl(copy / "data/hints/bank.jsonl", Hint)
    assert any(h.bucket == "radio" and "mend {object} with {screwdriver}" in h.text for h in hints)
    taught = read_jsonl(copy / "data/teach/hints.jsonl", Trajectory)
    assert sum(t.success for t in taught if t.hints) == sum(bool(t.hints) for t in taught) > 0
    policies = json.loads((copy / "results/metrics.json").read_text())["policies"]
    assert policies["raw"]["success"] == 0
    assert policies["distilled"]["success"] == 1 > policies["base"]["success"]


class Entry:
    """An entry point as `importlib.metadata` gives it."""

    value = "mine:Mine"

    def __init__(self, loaded: object) -> None:
        self.loaded = loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def broken() -> None:
    raise OSError("no licence")


@pytest.mark.parametrize(
    ("loaded", "options", "says"),
    [
        (None, {}, "available are alfworld, webshop, other"),
        (ImportError("no module named x"), {}, "cannot be loaded"),
        ("a text", {}, "must name one"),
        (dict, {}, "the plug-in is made"),
        (lambda level=1: {"level": level}, {"levl": 2}, "its options: level=1"),
        (broken, {}, "no licence"),
    ],
    ids=["unknown", "broken import", "no callable", "fine", "wrong option", "refuses"],
)
def test_a_plugin_that_is_wrong_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, loaded: object, options: dict[str, Any], says: str
) -> None:
    found = {"other": Entry(dict)} if loaded is None else {"mine": Entry(loaded)}
    monkeypatch.setattr(plugins, "installed", lambda: found)
    env = msgspec.structs.replace(PARAMS.env, name="mine", options=options)
    if loaded is dict:
        assert make_domain(env) == {}
        return
    with pytest.raises(ConfigError) as caught:
        make_domain(env)
    assert says in str(caught.value)


def test_a_builtin_environment_takes_no_options() -> None:
    with pytest.raises(ConfigError, match="built in"):
        make_domain(msgspec.structs.replace(PARAMS.env, options={"level": 1}))


class Doors:
    """A Gymnasium-style game without gymnasium: behind which of four doors is the way out?"""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.way, self.moves = (seed or 0) % 4, 0
        house = ((seed or 0) + self.shift) % 400
        return f"House {house}. Four doors, a mark on door {self.way + 1}.", {"goal": "find the way out"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.moves += 1
        if action == f"open door {self.way + 1}":
            return "You are out.", 1.0, True, False, {}
        return "A wall.", 0.0, False, self.moves == 3, {"valid": action.startswith("open")}

    def close(self) -> None: ...


DOORS = GymnasiumDomain("doors", Doors, "doors-1")


def doors_play(messages: Any, _: Any) -> str:
    """Opens the marked door in one house of two, else the wrong one."""
    house, mark = (int(messages[1].content.split(word)[1].split(".")[0]) for word in ("House ", "door "))
    return f"Thought: the mark.\nAction: open door {mark if house % 2 else mark % 4 + 1}"


def test_a_gymnasium_environment_is_played_as_any_other(tmp_path: Path) -> None:
    tasks = DOORS.tasks("test", 12, 0, tmp_path)
    agent = make_agent("react")
    setting = Setting(
        policy="p", run="0", agent=agent, limits=settle(PARAMS).agent, max_steps=9, temperature=0.0,
        environment=identity_of(DOORS, PARAMS.env), model="m",
    )  # fmt: skip

    async def go() -> list[Trajectory]:
        pool = EnvPool(DOORS.env_factory(tmp_path, False), workers=1, slots=4)
        try:
            model = ScriptedModel(doors_play, "doors")
            jobs = [(t, 0) for t in tasks]
            return await play_all(jobs, setting, model, pool, Journal(tmp_path / "j", Trajectory), 4)
        finally:
            await pool.close()

    done = asyncio.run(go())
    for t in done:
        lucky = int(t.first_observation.split("House ")[1].split(".")[0]) % 2 == 1
        assert (t.stop, t.reward) == ((StopReason.SUCCESS, 1.0) if lucky else (StopReason.FAILURE, 0.0))
        assert len(t.steps) == (1 if lucky else 3), "a truncated episode is over"
        assert (t.goal, t.bucket) == ("find the way out", "all")
    assert {t.success for t in done} == {True, False}


def test_games_are_split_by_content_so_that_no_seed_repeats_a_training_game(tmp_path: Path) -> None:
    train, test = DOORS.tasks("train", 100, 0, tmp_path), DOORS.tasks("test", 30, 0, tmp_path)
    check_disjoint(train, test, rooms=True)
    assert len({t.sha256 for t in train}) == 100
    assert train == DOORS.tasks("train", 100, 0, tmp_path) != DOORS.tasks("train", 100, 1, tmp_path)
    with pytest.raises(DataError, match=r"different games for dev; lower tasks\.dev"):
        DOORS.tasks("dev", 200, 0, tmp_path)
    with pytest.raises(ConfigError, match="no split official_train"):
        DOORS.tasks("official_train", 1, 0, tmp_path)


def test_a_seed_that_gives_another_game_than_before_is_refused(tmp_path: Path) -> None:
    task = DOORS.tasks("train", 1, 0, tmp_path)[0]
    assert GymnasiumEnv(Doors()).reset(task).text
    with pytest.raises(DataError, match="another game"):
        GymnasiumEnv(Doors(shift=1)).reset(task)


def test_scores_are_the_sum_of_rewards_unless_the_game_says_success(tmp_path: Path) -> None:
    class Paying(Doors):
        said: ClassVar[dict[str, Any]] = {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            return "ok", 0.75, False, False, self.said

    domain = GymnasiumDomain("paying", Paying, "1")
    env = domain.env_factory(tmp_path, False)()
    env.reset(domain.tasks("train", 1, 0, tmp_path)[0])
    assert [env.step("x").reward for _ in range(2)] == [0.75, 1.0]
    Paying.said = {"success": False}
    assert env.step("x").reward == 0.0


def test_a_real_gymnasium_environment_fits(tmp_path: Path) -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is optional and not installed")

    class Room(gymnasium.Env):
        observation_space = gymnasium.spaces.Text(100)
        action_space = gymnasium.spaces.Text(20)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
            super().reset(seed=seed)
            self.code = int(self.np_random.integers(1000))
            return f"A lock shows {self.code}.", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            return "click", float(action == f"dial {self.code}"), True, False, {}

    domain = GymnasiumDomain("lock", partial(gymnasium.wrappers.TimeLimit, Room(), max_episode_steps=5), "1")
    env = domain.env_factory(tmp_path, False)()
    for task in domain.tasks("train", 3, 0, tmp_path):
        code = env.reset(task).text.split()[-1].rstrip(".")
        seen = env.step(f"dial {code}")
        assert (seen.done, seen.reward) == (True, 1.0)
