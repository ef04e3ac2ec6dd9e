"""`ragdistill estimate [PROFILE]`: tokens, money and time of each stage, before anything is spent.

Prints what `costs` computes, and every assumption behind it. What an episode is like comes from `results/metrics.json`
where the same agent and model were measured: dvc.lock says what ran, params.yaml what is to run next. Asks no server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ragdistill import profiles
from ragdistill.commands.costs import (
    CHOICE_TOKENS,
    GROWN,
    HINT_TOKENS,
    INSTRUCTIONS,
    QUESTION,
    REPAIRED,
    REPLY_TOKENS,
    STATED_SIZE,
    WRITTEN_HINTS,
    Row,
    Speeds,
    buckets,
    cell,
    episode,
    size,
    stages,
)
from ragdistill.errors import ConfigError
from ragdistill.llm.ledger import spending
from ragdistill.params import AgentParams, EnvParams, ModelParams, Params, load_params
from ragdistill.records import read_json
from ragdistill.stages.common import RESULTS
from ragdistill.stages.defaults import max_steps
from ragdistill.stages.spending import SERVED, ledger_file
from ragdistill.timing import Timing, read_timings

LOCK, METRICS, TIMING = Path("dvc.lock"), RESULTS / "metrics.json", RESULTS / "timing.json"


def measured(p: Params, metrics: Path = METRICS, lock: Path = LOCK) -> Mapping[str, Any] | None:
    """The project's metrics, if they are those of the same environment, agent and model."""
    ran = _ran(p, lock)
    if ran is None or not metrics.exists():
        return None
    found, names = read_json(metrics), (p.env.name, p.agent.name)
    same = names == (found.get("env"), found.get("agent")) == (ran.env.name, ran.agent.name)
    return found if same and _played_by(p) == _played_by(ran) else None


def _ran(p: Params, lock: Path) -> Params | None:
    """`p` with what played the episodes that were reported last; None where DVC has no record of it."""
    try:
        stages = msgspec.yaml.decode(lock.read_bytes())["stages"]
        rollouts, report = stages["rollouts"], stages["report"]
        read = rollouts["params"]["params.yaml"]
        ran = msgspec.structs.replace(
            p,
            env=msgspec.convert(read["env"], EnvParams),
            agent=msgspec.convert(read["agent"], AgentParams),
            model=msgspec.convert(read["model"], ModelParams),
            endpoint=msgspec.structs.replace(p.endpoint, model=read["endpoint.model"]),
        )
        reported = {d["path"]: d["md5"] for d in report["deps"]}
        return ran if all(reported[o["path"]] == o["md5"] for o in rollouts["outs"]) else None
    except (OSError, LookupError, TypeError, msgspec.DecodeError):
        return None


def _played_by(p: Params) -> tuple[object, ...]:
    """What an episode's length and success depend on most, beside environment and agent."""
    return p.model.base, p.model.teacher, p.model.engine, max_steps(p), p.endpoint.model, p.agent.examples


def here(rows: list[Row], timing: Mapping[str, Timing]) -> list[Row]:
    """`rows` with the times of cold runs where there are some: a replay says nothing about the work.

    In proportion to the work, so that a run of few tasks is no time for many.
    """
    hours = {stage: t.cold / t.work / 3600 for stage, t in timing.items() if t.cold is not None and t.work}
    return [
        replace(r, where="here", hours=hours[r.stage] * r.work, gpu_hours=0.0, most=0.0, least=0.0)
        if r.stage in hours and r.where == "GPU" and r.work
        else r
        for r in rows
    ]


def assumptions(p: Params, metrics: Mapping[str, Any] | None, timed: bool, speeds: Speeds) -> Iterator[str]:
    """Every assumption, a line each."""
    e, found = p.endpoint, (metrics or {}).get("policies", {})
    prior = f"not measured: length of the paper's 14B ReAct agent, {REPLY_TOKENS} tokens a reply, success of {cell(p)}"
    for name, policy in (("an episode", "base"), ("with hints", "rag")):
        play, source = episode(p, metrics, policy), f"measured, {METRICS}" if policy in found else prior
        yield (
            f"{name}: {play.steps:.1f} steps, {play.prompt:,.0f} prompt tokens, {play.computed:,.0f} with reuse, "
            f"{play.completion:,.0f} completion, {play.success:.0%} won ({source})"
        )
    if not {"base", "rag"} <= found.keys():
        yield f"prompts: grow linearly to {GROWN} times their mean, {p.agent.context_tokens:,} tokens at most"
    yield "students: taken to play like the base"
    yield from _advice(p)
    yield (
        f"endpoint: {e.model}, {e.prices.prompt} / {e.prices.cached} / {e.prices.completion} {e.currency} per million "
        f"prompt / cached / completion tokens, {speeds.latency:g} s a reply, {e.max_concurrency} at once"
    )
    yield (
        f"GPU: {speeds.prefill:,.0f} prefill, {speeds.decode:,.0f} decoded, {speeds.train:,.0f} trained tokens/s on "
        f"one for {STATED_SIZE:g} B parameters, stated and not measured (--prefill, --decode, --train), scaled to "
        f"{size(p.model.base):g} B; {speeds.gpu_price:g} {e.currency} an hour (--gpu-price)"
    )
    if timed:
        yield (
            f"here: wall time of the same stage's last run that replayed nothing, on the machine of {TIMING}, in "
            "proportion to its episodes or optimiser steps"
        )
    yield "a call that is journaled already costs nothing again; failed attempts are not counted"


def _advice(p: Params) -> Iterator[str]:
    """What is assumed of the models that write and choose hints."""
    types, llm = buckets(p), p.hints.llm
    if p.hints.extractor == "llm":
        yield (
            f"hints: one call a failure, {llm.cases} of each of {types} task types at most, {INSTRUCTIONS} tokens of "
            f"instructions, {WRITTEN_HINTS} of an answer, {REPAIRED:.0%} of the answers asked for again; records and "
            f"instructions within {llm.context_tokens:,} tokens (hints.llm.context_tokens)"
        )
    if p.hints.ranker == "llm":
        yield (
            f"ranker: one call a hinted episode, {QUESTION} tokens and {p.hints.per_bucket} hints (hints.per_bucket) "
            f"of {HINT_TOKENS}, {CHOICE_TOKENS} of an answer"
        )
    if p.lift.hints:
        yield f"lift: each hint alone is taken to change no episode's length, {types} task types"


HEAD = ("stage", "where", "calls", "prompt", "with reuse", "completion", "trained", "money", "hours", "GPU-hours")


def cells(r: Row) -> list[str]:
    """A row of the table; money as "cached – uncached"."""
    money = f"{r.most:.2f}" if r.most == r.least else f"{r.least:.2f} – {r.most:.2f}"
    tokens = (f"{x:,.0f}" if x else "" for x in (r.calls, r.prompt, r.computed, r.completion, r.trained))
    return [r.stage, r.where, *tokens, money if r.most else "", f"{r.hours:.2f}", f"{r.gpu_hours:.2f}"]


def total(rows: list[Row]) -> Row:
    """The sum of all stages."""
    names = ("calls", "prompt", "computed", "completion", "trained", "most", "least", "hours", "gpu_hours")
    return Row("all", "", *(sum(getattr(r, n) for r in rows) for n in names))


def estimate(profile: str | None, path: Path, speeds: Speeds) -> int:
    """Print the table and its assumptions for `path`, or as `profile` changes params.yaml; 0.

    Raises `ConfigError` for parameters or speeds that make no sense.
    """
    if min(speeds.prefill, speeds.decode, speeds.train, speeds.latency) <= 0 or speeds.gpu_price < 0:
        raise ConfigError("speeds and latency must be positive, the price of a GPU-hour not negative.")
    p = profiles.overlaid(profile) if profile else load_params(path)
    metrics = measured(p)
    timing = read_timings(TIMING) if metrics and TIMING.exists() else {}
    rows = here(list(stages(p, metrics, speeds)), timing)
    everything = total(rows)
    table = [HEAD, *(cells(r) for r in [*rows, everything])]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    money = f"Money in {p.endpoint.currency}, with – without caching."
    print(f"Estimate for {profile or path}; nothing was asked or spent. {money}\n")
    for line in table:
        sides = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(sides).rstrip())
    print("\nAssumptions")
    for text in assumptions(p, metrics, any(r.where == "here" for r in rows), speeds):
        print(f"- {text}")
    paid = sum(r.most for r in rows if r.where == SERVED)
    spent = sum(s.money for s in spending(ledger_file()) if s.currency == p.endpoint.currency)
    if p.endpoint.budget is not None and paid and paid + spent > p.endpoint.budget:
        before = f" and {spent:.2f} are spent already" if spent else ""
        print(f"\nendpoint.budget of {p.endpoint.budget:.2f} may stop this: up to {paid:.2f} without caching{before}.")
    return 0
