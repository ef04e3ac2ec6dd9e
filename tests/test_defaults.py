"""null in params.yaml: two parameters choose a cell, and what was played and named before keeps its identity."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from ragdistill.agents import make_agent
from ragdistill.commands.smoke import override
from ragdistill.envs import Domain, defaults_of, make_domain
from ragdistill.envs.alfworld.goals import CLEAN, COOL, HEAT, LOOK
from ragdistill.errors import ConfigError, EmptyResultError
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, load_params
from ragdistill.records import Task, write_json
from ragdistill.rollout import Setting
from ragdistill.stages import playing
from ragdistill.stages.defaults import settle
from ragdistill.stages.tasks import check_primary

ROOT = Path(__file__).resolve().parents[1]
WITHHELD = (LOOK, CLEAN, HEAT, COOL)
TASK = Task(id="t", env="e", split="test", kind=CLEAN, group="g", data="d", sha256="s")


def chosen(folder: Path, *overrides: str) -> Params:
    """The shipped parameters after `dvc exp run -S … -S …`."""
    shutil.copy(ROOT / "params.yaml", folder)
    override(folder / "params.yaml", list(overrides))
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize(
    ("env", "agent", "steps", "attempts", "reply", "name"),
    [
        ("alfworld", "react", 50, 2, 64, "ragdistill-student"),
        ("alfworld", "stateact", 50, 2, 200, "ragdistill-alfworld-stateact"),
        ("webshop", "react", 15, 6, 112, "ragdistill-webshop-react"),
        ("webshop", "stateact", 15, 6, 200, "ragdistill-webshop-stateact"),
        ("webshop", "act", 15, 6, 112, "ragdistill-webshop-act"),
    ],
)
def test_environment_and_agent_alone_choose_a_cell(
    tmp_path: Path, env: str, agent: str, steps: int, attempts: int, reply: int, name: str
) -> None:
    p = settle(chosen(tmp_path, f"env.name={env}", f"agent.name={agent}"))
    assert (p.env.max_steps, p.agent.reply_tokens, p.track.registered_model) == (steps, reply, name)
    assert p.rollouts.attempts == attempts
    kinds = defaults_of(make_domain(p.env)).kinds
    assert p.evaluate.primary is not None and set(p.evaluate.primary) <= set(kinds)
    assert settle(p) == p


def test_the_default_cell_has_the_values_it_was_measured_with() -> None:
    p = settle(load_params(ROOT / "params.yaml"))
    assert p.evaluate.primary == WITHHELD
    assert defaults_of(make_domain(p.env)).primary == WITHHELD


def test_what_is_said_wins(tmp_path: Path) -> None:
    said = (
        "env.max_steps=7",
        "rollouts.attempts=3",
        "agent.max_reply_tokens=9",
        "evaluate.primary=[]",
        "track.registered_model=mine",
    )
    p = settle(chosen(tmp_path, "env.name=webshop", *said))
    assert (p.env.max_steps, p.agent.reply_tokens, p.evaluate.primary) == (7, 9, ())
    assert (p.rollouts.attempts, p.track.registered_model) == (3, "mine")


def test_null_and_its_value_name_the_same_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "IDENTITY", tmp_path / "identity.json")
    write_json(tmp_path / "identity.json", {"environment": "e"})

    def key(*overrides: str) -> str:
        model = ScriptedModel(lambda *_: "", "m")
        setting = playing.setting_of(chosen(tmp_path, *overrides), "base", "rollouts", model, 0.7)
        assert isinstance(setting, Setting) and setting.limits.reply_tokens
        return setting.key(TASK, 0)

    assert key() == key("env.max_steps=50", "agent.max_reply_tokens=64")
    assert key() != key("agent.max_reply_tokens=65")


def test_an_environment_that_says_nothing_has_the_general_defaults() -> None:
    class Silent:
        name = "silent"

    p = load_params(ROOT / "params.yaml")
    assert defaults_of(msgspec.UNSET) == defaults_of(Silent())  # pyright: ignore[reportArgumentType]
    domain: Domain = make_domain(p.env)
    assert (defaults_of(domain).max_steps, defaults_of(domain).primary) == (50, WITHHELD)


def test_only_a_style_with_a_state_says_so() -> None:
    assert [n for n in ("act", "react", "stateact") if make_agent(n).states] == ["stateact"]


def test_types_that_there_are_not_are_refused_before_anything_is_played() -> None:
    kinds = defaults_of(make_domain(load_params(ROOT / "params.yaml").env)).kinds
    check_primary(WITHHELD, [TASK], kinds)
    check_primary((), [TASK], kinds)
    check_primary((CLEAN, "unheard of"), [TASK], ())
    with pytest.raises(ConfigError, match="names fashion; the types of task are pick"):
        check_primary((CLEAN, "fashion"), [TASK], kinds)
    with pytest.raises(EmptyResultError, match=r"None of 1 evaluation tasks.*evaluate\.primary"):
        check_primary((HEAT,), [TASK], kinds)
    with pytest.raises(EmptyResultError):
        check_primary(("unheard of",), [TASK], ())


def test_tasks_are_drawn_anew_when_what_they_are_drawn_by_changes() -> None:
    stage = msgspec.yaml.decode((ROOT / "dvc.yaml").read_bytes())["stages"]["tasks"]
    assert {"seed", "env.name", "env.webshop", "env.options", "tasks", "evaluate.primary"} <= set(stage["params"])
