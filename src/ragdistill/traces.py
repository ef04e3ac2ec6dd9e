"""A sample of played games as MLflow traces: one AGENT span a game, under it a TOOL span a turn.

Beside `registry`, `champions` and `tracking` the only room that imports mlflow. The jsonl files stay the source of
truth. A trace's id follows from the trajectory's, so logging again adds nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence

# Usage statistics are sent over the network unless this is set before the import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Span, SpanType, TraceInfo, TraceLocation, TraceState
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient

from ragdistill.records import Step, StopReason, Trajectory, digest
from ragdistill.tracking import Store, recorded, store_uri

_LINKS = 100
"""MLflow's limit of traces in one request."""
PER_KIND = 1
"""Games of each task kind in the sample, the same for every policy."""


def sample(trajectories: Mapping[str, Sequence[Trajectory]]) -> list[Trajectory]:
    """For each task kind the same game of every policy, chosen by the hash of its id, not by its outcome."""
    kinds: dict[str, set[str]] = {}
    for t in (t for played in trajectories.values() for t in played):
        kinds.setdefault(t.kind, set()).add(t.task_id)
    chosen = {task for tasks in kinds.values() for task in sorted(tasks, key=lambda t: digest("trace", t))[:PER_KIND]}
    return [t for played in trajectories.values() for t in played if t.task_id in chosen]


@recorded
def log_traces(store: Store, run_id: str, trajectories: Sequence[Trajectory]) -> int:
    """Write those that the run's experiment does not hold yet and link all to the run; returns how many were new.

    `store` is one that `registry.project` has written to.
    """
    uri = store_uri(store)
    client = MlflowClient(tracking_uri=uri)
    experiment_id = client.get_run(run_id).info.experiment_id
    tracing, ids, spans = TracingClient(uri), [], []
    # the newest stand first: those of one game together, in the order they came
    games = {t.task_id: i for i, t in enumerate(trajectories)}
    latest = time.time_ns() - int(1e9 * max((t.seconds for t in trajectories), default=0.0))
    single = {t.id: t for t in trajectories}.values()  # policies of equal weights share their episodes
    for place, t in enumerate(sorted(single, key=lambda t: games[t.task_id])):
        ids.append(f"tr-{digest('trace', experiment_id, t.id)}")
        if not _complete(tracing, ids[-1]):
            info, own = as_trace(t, ids[-1], experiment_id, latest - place * 1_000_000)
            tracing.start_trace(info)
            spans.append(own)
    if spans:
        tracing.log_spans(experiment_id, [s for own in spans for s in own])
    for i in range(0, len(ids), _LINKS):
        client.link_traces_to_run(ids[i : i + _LINKS], run_id)
    return len(spans)


def as_trace(t: Trajectory, trace_id: str, experiment_id: str, start: int) -> tuple[TraceInfo, list[Span]]:
    """What MLflow stores of a trajectory begun at `start` (ns). Only the whole was timed: turns get equal shares."""
    seconds = max(t.seconds, 0.001)
    end, share = start + int(seconds * 1e9), int(seconds * 1e9 / max(len(t.steps), 1))
    usage = {
        "input_tokens": t.usage.prompt_tokens, "output_tokens": t.usage.completion_tokens,
        "total_tokens": t.usage.billed,
    }  # fmt: skip
    state = TraceState.ERROR if t.stop is StopReason.INFRA_ERROR else TraceState.OK
    info = TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=start // 1_000_000,
        execution_duration=int(1000 * seconds),
        state=state,
        request_preview=t.goal,
        response_preview=f"{t.policy}: {'won' if t.success else 'lost'} in {len(t.steps)} steps ({t.stop.value})",
        trace_metadata={"mlflow.trace.tokenUsage": json.dumps(usage)},
        tags={
            "policy": t.policy, "kind": t.kind, "room": t.group, "outcome": "won" if t.success else "lost",
            "stop": t.stop.value, "trajectory": t.id, "mlflow.traceName": t.policy,
        },
    )  # fmt: skip
    result = {"won": t.success, "stop": t.stop.value, "steps": len(t.steps), "refused": t.invalid, "error": t.error}
    start_state = {"goal": t.goal, "hints": t.hints, "observation": t.first_observation}
    root = _span(trace_id, 1, t.policy, SpanType.AGENT, (start_state, result), (start, end))
    turns = [_turn(trace_id, i, s, (start + (i - 1) * share, start + i * share)) for i, s in enumerate(t.steps, 1)]
    return info, [root, *turns]


def _turn(trace_id: str, number: int, step: Step, when: tuple[int, int]) -> Span:
    said = {"thought": step.thought, "action": step.action, "reply": step.reply}
    seen = {"observation": step.observation, "valid": step.valid, "reward": step.reward}
    return _span(trace_id, number + 1, step.action[:80] or "(no action)", SpanType.TOOL, (said, seen), when)


def _span(trace_id: str, number: int, name: str, kind: str, data: tuple[object, object], when: tuple[int, int]) -> Span:
    """Span `number` of a trace; 1 is the root, all others are its children. `data` is (inputs, outputs)."""
    given, made = data
    values = {"traceRequestId": trace_id, "spanType": kind, "spanInputs": given, "spanOutputs": made}
    return Span.from_dict({
        "trace_id": trace_id, "span_id": f"{number:016x}", "parent_span_id": f"{1:016x}" if number > 1 else None,
        "name": name, "start_time_unix_nano": when[0], "end_time_unix_nano": when[1],
        "status": {"code": "OK", "message": ""},
        "attributes": {f"mlflow.{key}": json.dumps(value) for key, value in values.items()},
    })  # fmt: skip


def _complete(tracing: TracingClient, trace_id: str) -> bool:
    """Whether the trace is there with its spans: they are written last, and leave this tag."""
    try:
        return "mlflow.trace.spansLocation" in tracing.get_trace_info(trace_id).tags
    except MlflowException:
        return False
