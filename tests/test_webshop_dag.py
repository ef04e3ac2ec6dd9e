"""The whole DAG on WebShop with scripted shoppers: nothing downstream of the environment knows which one it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragdistill.agents import make_agent
from ragdistill.commands.smoke import copy_project, override
from ragdistill.envs.webshop.domain import WITH_OPTIONS
from ragdistill.records import Hint, SftExample, Trajectory, read_jsonl
from tests.test_dag import OVERRIDES, run
from tests.test_training import make_base

OWN = [
    "env.name=webshop",
    "env.max_steps=null",
    "model.script=tests.webshop_policy:play",
    "tasks.train=40",
    "tasks.test=20",
    "hints.k=1",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("style", ["react", "stateact"])
def test_the_whole_dag_finds_the_withheld_rule_and_passes_it_on(tmp_path: Path, style: str) -> None:
    copy = tmp_path / "project"
    copy_project(copy)
    make_base(copy / "tiny", 0)
    override(copy / "params.yaml", [o for o in (*OVERRIDES.splitlines(), *OWN, f"agent.name={style}") if o])
    done = run(copy, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    hints = read_jsonl(copy / "data/hints/bank.jsonl", Hint)
    assert any("click[{object}]" in h.text for h in hints)
    assert {h.bucket for h in hints} <= {"beauty", "electronics", "fashion", "garden", "grocery"}
    taught = read_jsonl(copy / "data/teach/hints.jsonl", Trajectory)
    assert any(t.hints and t.success for t in taught)
    examples = read_jsonl(copy / "data/sft/distilled.jsonl", SftExample)
    assert examples
    assert not any(h.text in m.content for e in examples for m in e.messages for h in hints)
    agent, fields = make_agent(style), ["goal", "current selection"] if style == "stateact" else []
    learnt = [*examples, *read_jsonl(copy / "data/demos.jsonl", SftExample)]
    said = [m.content for e in learnt for m in e.messages if m.role == "assistant"]
    assert all(list(agent.parse(text).state) == fields for text in said)
    metrics = json.loads((copy / "results/metrics.json").read_text())
    policies = metrics["policies"]
    assert set(metrics["parts"]["distilled"]) == {"n", "type", "attributes", "options", "price"}
    assert policies["base"]["score"] > policies["base"]["success"]
    assert policies["raw"]["success"] == 0
    assert policies["distilled"]["success"] > policies["base"]["success"]
    assert {kind.split()[0] for kind in metrics["by_kind"]} == {"beauty", "electronics", "fashion", "garden", "grocery"}
    assert metrics["primary"]["kinds"] == list(WITH_OPTIONS) and 0 < metrics["primary"]["tasks"] < metrics["tasks"]
    again = run(copy, "-m", "dvc", "repro")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "rollouts" not in [line.split(":")[0] for line in again.stdout.splitlines()]
