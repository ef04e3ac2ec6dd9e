"""Played games in MLflow's trace view: what stands there is the trajectory, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient

from ragdistill import registry
from ragdistill.records import Step, StopReason, Trajectory, Usage
from ragdistill.registry import Projection
from ragdistill.traces import log_traces, sample


def trajectory(policy: str, task: int, won: bool = False, stop: StopReason = StopReason.LOOP) -> Trajectory:
    steps = (
        Step(reply="Thought: t\nAction: go", thought="t", action="go", observation="<b>seen</b>"),
        Step(reply="hm", thought="", action="", observation="No action.", valid=False),
    )
    return Trajectory(
        id=f"{policy}{task}", task_id=f"t{task}", policy=policy, agent="react", attempt=0, seed=0, goal=f"goal {task}",
        bucket="b", group="room", kind=f"kind{task % 2}", hints=("a hint",), steps=steps, seconds=4.0,
        first_observation="start", stop=StopReason.SUCCESS if won else stop, reward=float(won),
        usage=Usage(prompt_tokens=90, completion_tokens=10, computed_tokens=20),
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "store"


def project(store: Path, lineage: str) -> str:
    return registry.project(store, Projection(
        name="run", note="", experiment="e", lineage=lineage,
        params={}, metrics={}, curves={}, datasets=[], artifacts=[], adapter=None,
        registered_model="m", tags={},
    )).run_id  # fmt: skip


def found(store: Path, run_id: str) -> list:
    uri = f"sqlite:///{store}/mlflow.db"
    experiment = MlflowClient(tracking_uri=uri).get_run(run_id).info.experiment_id
    return list(TracingClient(uri).search_traces(locations=[experiment], run_id=run_id))


def test_a_trace_holds_the_whole_episode(store: Path) -> None:
    run = project(store, "whole")
    assert log_traces(store, run, [trajectory("base", 0, won=True)]) == 1
    (trace,) = found(store, run)
    root, first, second = trace.data.spans
    assert root.inputs == {"goal": "goal 0", "hints": ["a hint"], "observation": "start"}
    assert root.outputs["won"] is True and root.outputs["refused"] == 1
    assert (first.parent_id, first.name, first.outputs["observation"]) == (root.span_id, "go", "<b>seen</b>")
    assert (second.name, second.outputs["valid"], second.inputs["reply"]) == ("(no action)", False, "hm")
    assert trace.info.response_preview == "base: won in 2 steps (success)"
    assert first.end_time_ns <= second.start_time_ns and root.end_time_ns - root.start_time_ns == 4_000_000_000
    assert trace.info.token_usage["total_tokens"] == 100
    assert {
        "policy": "base",
        "outcome": "won",
        "room": "room",
        "trajectory": "base0",
    }.items() <= trace.info.tags.items()


def test_logging_again_adds_nothing_and_another_run_links_the_same(store: Path) -> None:
    games = [trajectory("rag", t, stop=StopReason.INFRA_ERROR) for t in range(3)]
    first, second = project(store, "one"), project(store, "two")
    assert [log_traces(store, first, games), log_traces(store, first, games)] == [3, 0]
    assert log_traces(store, second, [*games, trajectory("rag", 9)]) == 1
    assert len(found(store, first)) == 3
    assert {t.info.trace_id for t in found(store, first)} < {t.info.trace_id for t in found(store, second)}
    assert all(t.info.state.value == "ERROR" for t in found(store, first))


def test_a_trace_whose_spans_were_never_written_is_completed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, game = project(store, "killed"), [trajectory("sft", 0)]
    with monkeypatch.context() as patch:
        patch.setattr(TracingClient, "log_spans", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            log_traces(store, run, game)
    assert log_traces(store, run, game) == 1
    assert [len(t.data.spans) for t in found(store, run)] == [3]


def test_the_sample_is_the_same_games_for_every_policy_one_a_kind() -> None:
    played = {p: [trajectory(p, t, won=p == "rag") for t in range(10)] for p in ("base", "rag")}
    got = sample(played)
    assert len(got) == 4
    assert {t.task_id for t in got if t.policy == "base"} == {t.task_id for t in got if t.policy == "rag"}
    assert {t.kind for t in got} == {"kind0", "kind1"}
    assert {t.id for t in sample({p: ts[::-1] for p, ts in played.items()})} == {t.id for t in got}
    assert sample({}) == []
