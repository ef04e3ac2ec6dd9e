"""Environments of other packages: found by entry point, refused in one sentence, and played through the whole DAG."""

from __future__ import annotations

import asyncio
import json
import math
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
from ragdistill.commands.envs import rows_of
from ragdistill.commands.smoke import copy_project, override
from ragdistill.contamination import check_disjoint
from ragdistill.envs import identity_of, make_domain, plugins
from ragdistill.envs.gymnasium import GymnasiumDomain, GymnasiumEnv
from ragdistill.envs.hosts import Slots
from ragdistill.envs.pool import EnvPool
from ragdistill.errors import ConfigError, DataError, EmptyResultError
from ragdistill.journal import Journal
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import load_params
from ragdistill.records import Hint, Observation, StopReason, Task, Trajectory, read_jsonl
from ragdistill.rollout import Setting, play_all
from ragdistill.stages.defaults import settle
from ragdistill.stages.tasks import check_sound
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


class Package:
    """A distribution as `importlib.metadata` gives it."""

    def __init__(self, name: str) -> None:
        self.name, self.version = name, "1.0"


class Entry:
    """An entry point as `importlib.metadata` gives it."""

    value = "mine:Mine"

    def __init__(self, loaded: object, name: str = "mine", package: str = "") -> None:
        self.loaded, self.name, self.dist = loaded, name, Package(package) if package else None

    def load(self) -> object:
        if isinstance(self.loaded, BaseException):
            raise self.loaded
        return self.loaded


class Mine:
    """As much of a `Domain` as is looked at when it is made."""

    name, evaluation_splits = "mine", ("test",)

    def __init__(self, level: int = 1) -> None:
        self.level = level

    def fingerprint(self) -> str:
        return "mine-1"

    def env_factory(self, cache: Path, admissible: bool) -> None: ...
    def tasks(self, split: str, count: int, seed: int, out: Path) -> None: ...
    def demonstrations(self, params: object, seed: int, out: Path) -> None: ...


class Nameless(Mine):
    name, evaluation_splits = None, "test"


class Mute(Mine):
    def fingerprint(self) -> str:
        raise OSError("no disk\nat all")


class Wordless(Mine):
    def fingerprint(self) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


def broken() -> None:
    raise OSError("no\nlicence")


def bring(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    """Have these entry points, and none else, installed."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == plugins.GROUP else ())


@pytest.mark.parametrize(
    ("loaded", "options", "says"),
    [
        (None, {}, "available are alfworld, webshop, other"),
        (ImportError("no module named x"), {}, "cannot be loaded"),
        (SystemExit(2), {}, "cannot be loaded (SystemExit: 2)"),
        ("a text", {}, "must name one"),
        (Mine, {"level": 2}, ""),
        (dict, {}, "a dict that lacks fingerprint, env_factory, tasks, demonstrations, name, evaluation_splits"),
        (Nameless, {}, "lacks name, evaluation_splits;"),
        (lambda level=1: {"level": level}, {"levl": 2}, "its options: level=1"),
        (broken, {}, "(OSError: no licence)"),
    ],
    ids=[
        "unknown",
        "broken import",
        "leaves",
        "no callable",
        "fine",
        "no domain",
        "no names",
        "wrong option",
        "refuses",
    ],
)
def test_a_plugin_that_is_wrong_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, loaded: object, options: dict[str, Any], says: str
) -> None:
    bring(monkeypatch, Entry(Mine, "other") if loaded is None else Entry(loaded))
    env = msgspec.structs.replace(PARAMS.env, name="mine", options=options)
    if loaded is Mine:
        assert isinstance(made := make_domain(env), Mine) and made.level == 2
        return
    with pytest.raises(ConfigError) as caught:
        make_domain(env)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_two_packages_of_one_name_are_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them played would depend on the order of the search path."""
    bring(monkeypatch, Entry(Mine, package="b"), Entry(Mine, package="a"), Entry(Mine, "webshop", "c"))
    env = msgspec.structs.replace(PARAMS.env, name="mine")
    with pytest.raises(ConfigError, match=r"a 1\.0 and b 1\.0 each bring an environment mine; uninstall all but one"):
        make_domain(env)
    rows = list(rows_of(env))
    assert [row[1] for row in rows] == ["alfworld", "webshop", "mine", "webshop"]
    assert rows[2][0] == "*" and rows[2][3].startswith("! a 1.0 and b 1.0 each")
    assert rows[3][0] == " " and "c 1.0 is not used" in rows[3][3]
    assert make_domain(msgspec.structs.replace(env, name="webshop")).name == "webshop"


def test_one_broken_plugin_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = {"b": SystemExit(1), "c": Mute, "d": Wordless, "e": dict, "f": Mine}
    bring(monkeypatch, *(Entry(what, name) for name, what in loaded.items()))
    rows = list(rows_of(PARAMS.env))
    said = {row[1]: row[3] for row in rows}
    assert said["f"] == "mine-1" and rows[0][:2] == ("*", "alfworld") and not rows[0][3].startswith("!")
    assert "no disk at all" in said["c"] and "is None; it has to be a text" in said["d"]
    assert all(said[name].startswith("! ") and "\n" not in said[name] for name in "bcde")
    with pytest.raises(ConfigError, match="fingerprint of the environment d is None"):
        identity_of(Wordless(), msgspec.structs.replace(PARAMS.env, name="d"))  # pyright: ignore[reportArgumentType]


class Saying:
    """An environment that answers everything with what it is given."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def reset(self, task: Task) -> Any:
        return self.answer

    def step(self, action: str) -> Any:
        return self.answer

    def close(self) -> None: ...


def seen(**fields: Any) -> Observation:
    given: dict[str, Any] = {"text": "x"} | fields
    return Observation(**given)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "not a NoneType"),
        ("a text", "not a str"),
        (("a text", 1.0, True, False, {}), "not a tuple"),
        (("EnvironmentFault", "two texts are how a fault is sent"), "not a tuple"),
        (seen(text=b"x"), r"got `bytes` - at `\$\.text`"),
        (seen(goal=None), r"\$\.goal"),
        (seen(bucket=3), r"\$\.bucket"),
        (seen(done=None), r"\$\.done"),
        (seen(reward="1"), r"\$\.reward"),
        (seen(reward=math.nan), "reward nan"),
        (seen(reward=math.inf), "reward inf"),
        (seen(reward=1.5), r"from 0 to 1, not reward 1\.5"),
        (seen(reward=-1.0), r"reward -1\.0"),
        (seen(parts={"price": math.nan}), "price nan"),
        (seen(goal=print), "is no plain value"),
    ],
)
def test_an_answer_that_is_no_observation_ends_the_stage_with_one_sentence(answer: object, says: str) -> None:
    """Else it would be a traceback of this project, an unreadable file stages later, or a mean above 1."""
    for verb in ("reset", "step"):
        (name, text), _ = Slots(lambda: Saying(answer)).answer(0, verb, "look")  # pyright: ignore[reportGeneralTypeIssues]
        assert name == "ConfigError" and f"environment's {verb} has to return" in text and "\n" not in text
        with pytest.raises(ConfigError, match=says):
            raise ConfigError(text)


def test_numbers_and_flags_of_numpy_and_bools_as_rewards_are_taken_for_what_they_are() -> None:
    import numpy as np

    for given in (
        {"reward": np.float32(1), "done": np.bool_(True), "valid": np.bool_(True), "goal": np.str_("g")},
        {"reward": True, "done": True, "goal": "g"},
        {"reward": 1, "done": True, "goal": "g", "admissible": []},
    ):
        answer, _ = Slots(lambda given=given: Saying(seen(**given))).answer(0, "step", "look")
        assert answer == seen(reward=1.0, done=True, goal="g")
        assert type(answer.reward) is float and type(answer.goal) is str  # pyright: ignore[reportAttributeAccessIssue]
    odd = seen(text="\ud800 <|im_start|>\x00" * 9, parts={"type": 0.5}, admissible=("look",), reward=0.25, valid=False)
    assert Slots(lambda: Saying(odd)).answer(0, "reset", "t")[0] == odd, "what is right is passed on as it is"
    assert Slots(lambda: Saying(seen(text=""))).answer(0, "reset", "t")[0] == seen(text="")


def test_an_environment_that_no_worker_can_be_sent_says_how_to_make_one() -> None:
    async def go() -> None:
        pool = EnvPool(lambda: Saying(None), workers=1, slots=1)
        try:
            async with pool.lease():
                pass
        finally:
            await pool.close()

    with pytest.raises(ConfigError, match=r"cannot be sent to a worker process.*not a lambda"):
        asyncio.run(go())


def test_tasks_that_would_fail_at_the_end_are_refused_at_the_start() -> None:
    task = Task(id="a/../b\n", env="mine", split="test", kind="k", group="g", data="d", sha256="s")
    check_sound([task, msgspec.structs.replace(task, id="")], "train", "mine")
    check_sound([], "dev", "mine")
    for wrong, says in (
        ([task, task], "mine made 2 eval tasks of the id"),
        ([msgspec.structs.replace(task, kind=None)], r"no list of ragdistill\.records\.Task.*kind"),
        ([{"id": "a"}], "no list"),
        ((t for t in [task]), "no list"),
        (None, "no list"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_sound(wrong, "eval", "mine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(EmptyResultError, match="mine made no train tasks"):
        check_sound([], "train", "mine")


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
    check_disjoint(train, test, "door")
    assert len({t.sha256 for t in train}) == 100
    assert train == DOORS.tasks("train", 100, 0, tmp_path) != DOORS.tasks("train", 100, 1, tmp_path)
    with pytest.raises(DataError, match=r"different games for dev; lower tasks\.dev"):
        DOORS.tasks("dev", 200, 0, tmp_path)
    with pytest.raises(ConfigError, match="no split official_train"):
        DOORS.tasks("official_train", 1, 0, tmp_path)


@pytest.mark.parametrize("verb", ["reset", "step"])
@pytest.mark.parametrize("closes", [True, False])
def test_an_environment_that_raised_is_closed(verb: str, closes: bool, tmp_path: Path) -> None:
    """Whatever it holds (a server, a file) would stay open as long as the worker lives."""
    closed: list[int] = []

    class Breaking(Doors):
        def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
            if verb == "reset":
                raise ZeroDivisionError("bug in the game")
            return super().reset(seed=seed)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            raise ZeroDivisionError("bug in the game")

        def close(self) -> None:
            closed.append(1)
            if not closes:
                raise OSError("closed already")

    if verb == "reset":
        with pytest.raises(ZeroDivisionError):
            GymnasiumDomain("breaking", Breaking, "1").tasks("test", 1, 0, tmp_path)
        assert closed.pop()
    slots, task = Slots(lambda: GymnasiumEnv(Breaking())), DOORS.tasks("test", 1, 0, tmp_path)[0]
    if verb == "step":
        slots.answer(0, "reset", task)
    (name, text), _ = slots.answer(0, verb, task if verb == "reset" else "look")  # pyright: ignore[reportGeneralTypeIssues]
    assert name == "EnvironmentFault" and "bug in the game" in text and closed == [1]
    for slot in (1, 2):
        slots.answer(slot, "prepare", "")
    slots.close()
    assert closed == [1] * 3, "one that cannot be closed leaves no other one open"


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


def test_rewards_that_add_up_to_one_in_decimals_are_the_whole_reward(tmp_path: Path) -> None:
    class Tenths(Doors):
        paid: ClassVar[float] = 0.1

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            self.moves += 1
            return "ok", self.paid, self.moves == 10, False, {}

    domain = GymnasiumDomain("tenths", Tenths, "1")
    env, task = domain.env_factory(tmp_path, False)(), domain.tasks("train", 1, 0, tmp_path)[0]
    for paid, earned in ((0.1, 1.0), (0.0999, 0.999), (-0.1, 0.0), (1e9, 1.0)):
        Tenths.paid = paid
        env.reset(task)
        assert [env.step("x") for _ in range(10)][-1].reward == earned
    Tenths.paid = math.nan
    assert Slots(lambda: env).answer(0, "step", "x")[0][0] == "ConfigError"  # pyright: ignore[reportIndexIssue]


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
