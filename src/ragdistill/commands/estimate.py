"""`ragdistill estimate`: tokens, money and time of each stage, before anything is spent.

Arithmetic over the parameters and a few assumptions, all of which are printed. What an episode is like comes from
`results/metrics.json` where the same agent and model were measured, from the paper otherwise. Asks no server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.errors import ConfigError
from ragdistill.params import LoraParams, Params, convert_params, load_params
from ragdistill.records import read_json
from ragdistill.stages.defaults import max_steps, reply_tokens
from ragdistill.timing import Timing, read_timings

PROJECT, METRICS, TIMING = Path("params.yaml"), Path("results/metrics.json"), Path("results/timing.json")
OFFICIAL = {"valid_seen": 140, "valid_unseen": 134, "official_test": 500}
"""Tasks of the official evaluation splits."""
GROWN = 1.5
"""A prompt's length in the last turn over its mean: it grows linearly from half of the mean."""
HINT_TOKENS = 30
"""Of one hint in the prompt; it has 120 characters at most."""
INSTRUCTIONS, WRITTEN_HINTS = 600, 150
"""Tokens of an extractor's instructions and of its answer."""
STATED_SIZE = 14.0
"""Billion parameters that the speeds are stated for."""


@dataclass(frozen=True)
class Speeds:
    """Stated, not measured; tokens a second on one GPU for a model of `STATED_SIZE`."""

    prefill: float
    decode: float
    train: float
    latency: float
    """Seconds an endpoint takes for a reply."""
    gpu_price: float
    """Money per GPU-hour."""


@dataclass(frozen=True)
class Play:
    """A typical episode."""

    steps: float
    prompt: float
    """Prompt tokens as billed: each call counts its whole prompt."""
    computed: float
    """Prompt tokens with prefix reuse."""
    completion: float
    success: float


PRIORS = {
    "alfworld": Play(18.9, 50_100 - 18.9 * 40, 0.0, 18.9 * 40, 0.776),
    "webshop": Play(7.2, 8_000 - 7.2 * 40, 0.0, 7.2 * 40, 0.37),
}
"""The paper's 14B ReAct agent: steps, tokens and success an episode; 40 tokens a reply are a guess."""


@dataclass(frozen=True)
class Row:
    """One stage."""

    stage: str
    where: str
    """endpoint | GPU | here"""
    calls: float = 0.0
    prompt: float = 0.0
    computed: float = 0.0
    completion: float = 0.0
    trained: float = 0.0
    most: float = 0.0
    """Money without any cached prompt token."""
    least: float = 0.0
    """Money when every repeated prefix is cached."""
    hours: float = 0.0
    gpu_hours: float = 0.0


def episode(p: Params, metrics: Mapping[str, Any] | None, policy: str) -> Play:
    """What one episode of `policy` (base or rag) is like."""
    found = (metrics or {}).get("policies", {}).get(policy)
    if found:
        prompt = found["tokens_billed"] - found["tokens_completion"]
        computed = found["tokens_computed"] - found["tokens_completion"]
        return Play(found["steps"], prompt, computed, found["tokens_completion"], found["success"])
    prior = PRIORS.get(p.env.name, PRIORS["alfworld"])
    steps = min(prior.steps, max_steps(p))
    hints = p.hints.k * HINT_TOKENS if policy == "rag" else 0
    mean = min(prior.prompt / prior.steps + hints, p.agent.context_tokens - reply_tokens(p))
    reply = min(prior.completion / prior.steps, reply_tokens(p))
    return Play(steps, mean * steps, mean * GROWN, reply * steps, prior.success)


def stages(p: Params, metrics: Mapping[str, Any] | None, speeds: Speeds) -> Iterator[Row]:
    """The stages that cost something, in the order they run."""
    base, hinted = episode(p, metrics, "base"), episode(p, metrics, "rag")
    everywhere, teacher = p.model.engine == "endpoint", "endpoint" in (p.model.engine, p.model.teacher)
    example = base.computed + base.completion
    if p.coldstart.enabled:
        yield training("coldstart", p.coldstart.demos * example, p.coldstart.lora, p, speeds)
    attempts = p.tasks.train * p.rollouts.attempts
    yield playing("rollouts", attempts, base, teacher, p, speeds)
    if str(p.hints.extractor) != "offline":
        failed = attempts * (1 - base.success)
        read = failed * (example + INSTRUCTIONS)
        yield served("hints", Row("hints", "", failed, read, read, failed * WRITTEN_HINTS), p, speeds)
    taught = p.tasks.train if p.teach.tasks == "all" else p.tasks.train * (1 - base.success) ** p.rollouts.attempts
    for variant in p.teach.variants:
        play = hinted if variant == "hints" else base
        yield playing(f"teach@{variant}", taught * p.teach.attempts, play, teacher, p, speeds)
    for variant in p.sft.variants:
        won = min(p.strip.per_task, p.rollouts.attempts) * p.tasks.train * (base.success + hinted.success) / 2
        for seed in p.sft.seeds:
            yield training(f"sft@{variant}-{seed}", won * example, p.sft.lora, p, speeds)
    tasks = OFFICIAL.get(p.tasks.eval_split, p.tasks.dev if p.tasks.eval_split == "dev" else p.tasks.test)
    for policy in p.evaluate.policies:
        play = hinted if policy.startswith("rag") else base
        yield playing(f"evaluate@{policy}-0", tasks, play, everywhere, p, speeds)
    for variant in p.sft.variants:
        for seed in p.sft.seeds:
            yield playing(f"evaluate@{variant}-{seed}", tasks, base, everywhere, p, speeds)


def playing(stage: str, episodes: float, play: Play, is_served: bool, p: Params, speeds: Speeds) -> Row:
    """A stage of `episodes` episodes, on an endpoint or on the local engine."""
    row = Row(
        stage, "GPU", episodes * play.steps, episodes * play.prompt, episodes * play.computed,
        episodes * play.completion,
    )  # fmt: skip
    if is_served:
        return served(stage, row, p, speeds)
    slower = size(p) / STATED_SIZE
    hours = slower * (row.computed / speeds.prefill + row.completion / speeds.decode) / 3600
    money = hours * speeds.gpu_price
    return replace(row, hours=hours, gpu_hours=hours, most=money, least=money)


def served(stage: str, row: Row, p: Params, speeds: Speeds) -> Row:
    """`row` as calls to the endpoint."""
    prices = p.endpoint.prices
    written = row.completion * prices.completion
    most = (row.prompt * max(prices.prompt, prices.cached) + written) / 1e6
    least = (row.computed * prices.prompt + (row.prompt - row.computed) * prices.cached + written) / 1e6
    hours = row.calls * speeds.latency / min(p.endpoint.max_concurrency, max(row.calls, 1)) / 3600
    return replace(row, stage=stage, where="endpoint", most=most, least=least, hours=hours)


def training(stage: str, tokens: float, lora: LoraParams, p: Params, speeds: Speeds) -> Row:
    """A stage that trains `tokens` tokens an epoch."""
    trained = tokens * lora.epochs
    hours = size(p) / STATED_SIZE * trained / speeds.train / 3600
    money = hours * speeds.gpu_price
    return Row(stage, "GPU", trained=trained, hours=hours, gpu_hours=hours, most=money, least=money)


def size(p: Params) -> float:
    """Billions of parameters, read from the model's name ("7B", "135m"); `STATED_SIZE` where it has none."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])", p.model.base.lower().replace("_", "-"))
    return STATED_SIZE if found is None else float(found[1]) / (1000 if found[2] == "m" else 1)


def read_profile(path: Path, project: Path = PROJECT) -> Params:
    """The parameters in `path`; what it leaves out is as in the project's own file."""
    if path == project or not project.exists() or not path.exists():
        return load_params(path)
    try:
        over, under = (msgspec.yaml.decode(f.read_bytes(), type=dict[str, Any]) for f in (path, project))
    except msgspec.DecodeError as e:
        raise ConfigError(f"{path} is no YAML mapping: {e}.") from None
    return convert_params(_merged(under, over), str(path))


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(under[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return {**under, **over, **both}


def measured(p: Params, metrics: Path = METRICS, project: Path = PROJECT) -> Mapping[str, Any] | None:
    """The project's metrics, if they are those of the same environment, agent and model."""
    if not metrics.exists() or not project.exists():
        return None
    found, own = read_json(metrics), load_params(project)
    same = _played_by(p) == _played_by(own) and (found.get("env"), found.get("agent")) == (p.env.name, p.agent.name)
    return found if same else None


def _played_by(p: Params) -> tuple[object, ...]:
    """What an episode's length and success depend on most, beside environment and agent."""
    return p.model.base, p.model.teacher, p.model.engine, max_steps(p), p.endpoint.model, p.agent.examples


def here(rows: list[Row], timing: Mapping[str, Timing]) -> list[Row]:
    """`rows` with the times of cold runs on this machine where there are some: a replay says nothing about the work."""
    cold = {stage: t.cold for stage, t in timing.items() if t.cold is not None}
    return [
        replace(r, where="here", hours=cold[r.stage] / 3600, gpu_hours=0.0, most=0.0, least=0.0)
        if r.stage in cold and r.where == "GPU"
        else r
        for r in rows
    ]


def assumptions(p: Params, metrics: Mapping[str, Any] | None, timed: bool, speeds: Speeds) -> Iterator[str]:
    """Every assumption, a line each."""
    base, hinted, e = episode(p, metrics, "base"), episode(p, metrics, "rag"), p.endpoint
    source = f"measured, {METRICS}" if metrics else "not measured: the paper's 14B ReAct agent, 40 tokens a reply"
    for name, play in (("an episode", base), ("with hints", hinted)):
        yield (
            f"{name}: {play.steps:.1f} steps, {play.prompt:,.0f} prompt tokens, {play.computed:,.0f} with reuse, "
            f"{play.completion:,.0f} completion, {play.success:.0%} won ({source})"
        )
    if metrics is None:
        yield f"prompts: grow linearly to {GROWN} times their mean, {p.agent.context_tokens:,} tokens at most"
    yield "students: taken to play like the base"
    yield (
        f"endpoint: {e.model}, {e.prices.prompt} / {e.prices.cached} / {e.prices.completion} {e.currency} per million "
        f"prompt / cached / completion tokens, {speeds.latency:g} s a reply, {e.max_concurrency} at once"
    )
    yield (
        f"GPU: {speeds.prefill:,.0f} prefill, {speeds.decode:,.0f} decoded, {speeds.train:,.0f} trained tokens/s on "
        f"one for {STATED_SIZE:g} B parameters, stated and not measured (--prefill, --decode, --train), scaled to "
        f"{size(p):g} B; {speeds.gpu_price:g} {e.currency} an hour (--gpu-price)"
    )
    if timed:
        yield f"here: wall time of the last run on this machine that replayed nothing ({TIMING}), same stage"
    yield "a call that is journaled already costs nothing again; failed attempts are not counted"


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


def estimate(path: Path, speeds: Speeds) -> int:
    """Print the table and its assumptions; 0. Raises `ConfigError` for parameters or speeds that make no sense."""
    if min(speeds.prefill, speeds.decode, speeds.train, speeds.latency) <= 0 or speeds.gpu_price < 0:
        raise ConfigError("speeds and latency must be positive, the price of a GPU-hour not negative.")
    p = read_profile(path)
    metrics = measured(p)
    timing = read_timings(TIMING) if metrics and TIMING.exists() else {}
    rows = here(list(stages(p, metrics, speeds)), timing)
    everything = total(rows)
    table = [HEAD, *(cells(r) for r in [*rows, everything])]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    print(f"Estimate for {path}; nothing was asked or spent. Money in {p.endpoint.currency}, with – without caching.\n")
    for line in table:
        sides = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(sides).rstrip())
    print("\nAssumptions")
    for text in assumptions(p, metrics, any(r.where == "here" for r in rows), speeds):
        print(f"- {text}")
    paid = sum(r.most for r in rows if r.where == "endpoint")
    if p.endpoint.budget is not None and paid > p.endpoint.budget:
        print(f"\nendpoint.budget of {p.endpoint.budget:.2f} may stop this: up to {paid:.2f} without caching.")
    return 0
