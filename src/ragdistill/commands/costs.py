"""What each stage of a run would cost in tokens, money and time: arithmetic over parameters and a typical episode.

What an episode is like comes from measurements of the same agent and model, or else from the paper's. Whatever is
assumed is a constant here. Reads no file of the project, asks no server.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ragdistill.envs import defaults_of, make_domain
from ragdistill.params import LoraParams, Params
from ragdistill.report.paper import published
from ragdistill.stages.defaults import attempts, max_steps, reply_tokens
from ragdistill.stages.spending import SERVED

WHOLE = {"valid_seen": 140, "valid_unseen": 134}
"""Tasks of ALFWorld's official evaluation splits, which are played whole."""
OFFICIAL = {"official_test": 500, "official_eval": 1000}
"""Goals of WebShop's, of which the first `tasks.test` are played."""
REPLY_TOKENS = 40
"""Of a reply, where none was measured."""
GROWN = 1.5
"""A prompt's length in the last turn over its mean: it grows linearly from half of the mean."""
HINT_TOKENS = 30
"""Of one hint in the prompt; it has 120 characters at most."""
INSTRUCTIONS, WRITTEN_HINTS = 600, 150
"""Tokens of an extractor's instructions and of its answer."""
REPAIRED = 0.1
"""Share of an extractor's replies that are asked for once more."""
QUESTION, CHOICE_TOKENS = 200, 15
"""Tokens of a ranker's question, its hints aside, and of its answer."""
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
    work: float = 0.0
    """Episodes or optimiser steps, as `timing` counts them; 0: not known."""


def cell(p: Params) -> str:
    """The paper's cell that is nearest to these parameters: its 14B ReAct agent where it has none."""
    paper, agent = published(), "react" if p.agent.name == "act" else p.agent.name
    env = p.env.name if p.env.name in paper.episodes else "alfworld"
    nearest = f"{env}/{paper.models.get(p.model.base.partition('@')[0], '14B')}/{agent}"
    return nearest if nearest in paper.results and p.model.teacher is None else f"{env}/14B/react"


def buckets(p: Params) -> int:
    """Task types that have hints of their own."""
    return defaults_of(make_domain(p.env)).buckets


def episode(p: Params, metrics: Mapping[str, Any] | None, policy: str) -> Play:
    """What one episode of `policy` (base or rag) is like."""
    found = (metrics or {}).get("policies", {}).get(policy)
    if found:
        prompt = found["tokens_billed"] - found["tokens_completion"]
        computed = found["tokens_computed"] - found["tokens_completion"]
        return Play(found["steps"], prompt, computed, found["tokens_completion"], found["success"])
    paper, like = published(), cell(p)
    prior = paper.episodes[like.partition("/")[0]]
    steps = min(prior.steps, max_steps(p))
    hints = p.hints.k * HINT_TOKENS if policy == "rag" else 0
    room = p.agent.context_tokens - reply_tokens(p)
    mean = min(prior.tokens / prior.steps - REPLY_TOKENS + hints, room)
    reply = min(REPLY_TOKENS, reply_tokens(p))
    return Play(steps, mean * steps, mean * GROWN, reply * steps, paper.results[like][policy][0] / 100)


def stages(p: Params, metrics: Mapping[str, Any] | None, speeds: Speeds) -> Iterator[Row]:
    """The stages that cost something, in the order they run; what a model that only writes or chooses hints does of
    a stage is a row of its own.
    """
    base, hinted = episode(p, metrics, "base"), episode(p, metrics, "rag")
    player, teacher = asked(p, None), asked(p, p.model.teacher)
    example = base.computed + base.completion
    if p.coldstart.enabled:
        yield training("coldstart", p.coldstart.demos, example, p.coldstart.lora, p, speeds)
    each_task = attempts(p)
    tried = p.tasks.train * each_task
    yield playing("rollouts", tried, base, teacher, p, speeds)
    if p.hints.extractor == "llm":
        yield extracting(tried * (1 - base.success), example, asked(p, p.hints.llm.model or teacher), p, speeds)
    if p.lift.hints:
        types = buckets(p)
        each = types * min(p.lift.tasks, p.tasks.train / types) * p.lift.attempts
        yield playing("lift", each * (1 + p.lift.hints), base, teacher, p, speeds)
    taught = p.tasks.train if p.teach.tasks == "all" else p.tasks.train * (1 - base.success**each_task)
    for variant in p.teach.variants:
        play = base if variant == "retry" else hinted
        episodes = taught * p.teach.attempts
        yield playing(f"teach@{variant}", episodes, play, teacher, p, speeds)
        yield from choosing(f"teach@{variant}", episodes if variant == "hints" else 0, teacher, p, speeds)
    for variant in p.sft.variants:
        won = examples(variant, taught, base, hinted, p)
        for seed in p.sft.seeds:
            yield training(f"sft@{variant}-{seed}", won, example, p.sft.lora, p, speeds)
    yield from evaluating(p, base, hinted, player, speeds)


def examples(variant: str, taught: float, base: Play, hinted: Play, p: Params) -> float:
    """How many examples a student learns from, as `strip` takes them: `strip.per_task` at most of each task.

    A task that some attempt wins is taken to be won by all: chances differ between tasks, hardly between attempts.
    `taught`: tasks that are played again.
    """
    each, again, tasks = attempts(p), p.teach.attempts, p.tasks.train

    def kept(tries: int) -> int:
        return min(p.strip.per_task, tries)

    if variant in ("sft", "sft_retry"):
        return tasks * base.success * kept(each + (again if variant == "sft_retry" else 0))
    own = each if p.sft.include_base_successes else 0
    return taught * hinted.success * kept(again + own) + (tasks - taught) * kept(own)


def asked(p: Params, model: str | None) -> str:
    """Which model answers where `model` is named (None: the base): the endpoint's for all, if it is the engine."""
    return SERVED if p.model.engine == SERVED else model or p.model.base


def evaluated(p: Params) -> int:
    """How many tasks each policy is evaluated on."""
    split, asked_for = p.tasks.eval_split, p.tasks.dev if p.tasks.eval_split == "dev" else p.tasks.test
    return WHOLE.get(split) or min(asked_for, OFFICIAL.get(split, asked_for))


def evaluating(p: Params, base: Play, hinted: Play, player: str, speeds: Speeds) -> Iterator[Row]:
    """The evaluations of policies and students."""
    tasks = evaluated(p)
    for policy in p.evaluate.policies:
        play = hinted if policy.startswith("rag") else base
        yield playing(f"evaluate@{policy}-0", tasks, play, player, p, speeds)
        yield from choosing(f"evaluate@{policy}-0", tasks if policy == "rag" else 0, player, p, speeds)
    for variant in p.sft.variants:
        for seed in p.sft.seeds:
            yield playing(f"evaluate@{variant}-{seed}", tasks, base, player, p, speeds)


def extracting(failed: float, example: float, model: str, p: Params, speeds: Speeds) -> Row:
    """A model reads failures, each beside a success in pairwise mode: no more of a type than `hints.llm.cases`."""
    llm = p.hints.llm
    calls = min(failed, buckets(p) * llm.cases) * (1 + REPAIRED)
    records = example * (2 if llm.mode == "pairwise" else 1)
    read = min(records + INSTRUCTIONS, llm.context_tokens - 2 * llm.max_reply_tokens) * calls
    written = min(WRITTEN_HINTS, llm.max_reply_tokens) * calls
    return computed_by(model, Row("hints", "", calls, read, read, written), p, speeds)


def choosing(stage: str, episodes: float, model: str, p: Params, speeds: Speeds) -> Iterator[Row]:
    """`hints.ranker: llm` asks once an episode, with all hints of the task's type; taken to be as many as may be."""
    if p.hints.ranker != "llm" or not episodes or p.hints.per_bucket <= p.hints.k or not p.hints.k:
        return
    read = (QUESTION + p.hints.per_bucket * HINT_TOKENS) * episodes
    row = Row(f"{stage}, ranker", "", episodes, read, read, CHOICE_TOKENS * episodes)
    yield computed_by(asked(p, p.hints.ranker_model or model), row, p, speeds)


def playing(stage: str, episodes: float, play: Play, model: str, p: Params, speeds: Speeds) -> Row:
    """A stage of `episodes` episodes, on an endpoint or on the local engine."""
    row = Row(
        stage, "", episodes * play.steps, episodes * play.prompt, episodes * play.computed, episodes * play.completion,
        work=episodes,
    )  # fmt: skip
    return computed_by(model, row, p, speeds)


def computed_by(model: str, row: Row, p: Params, speeds: Speeds) -> Row:
    """`row` with time and money, as calls to the endpoint or on a GPU with the model of that name."""
    if model == SERVED:
        return served(row, p, speeds)
    hours = size(model) / STATED_SIZE * (row.computed / speeds.prefill + row.completion / speeds.decode) / 3600
    money = hours * speeds.gpu_price
    return replace(row, where="GPU", hours=hours, gpu_hours=hours, most=money, least=money)


def served(row: Row, p: Params, speeds: Speeds) -> Row:
    """`row` as calls to the endpoint."""
    prices = p.endpoint.prices
    written = row.completion * prices.completion
    most = (row.prompt * max(prices.prompt, prices.cached) + written) / 1e6
    least = (row.computed * prices.prompt + (row.prompt - row.computed) * prices.cached + written) / 1e6
    hours = row.calls * speeds.latency / min(p.endpoint.max_concurrency, max(row.calls, 1)) / 3600
    return replace(row, where=SERVED, most=most, least=least, hours=hours)


def training(stage: str, count: float, tokens: float, lora: LoraParams, p: Params, speeds: Speeds) -> Row:
    """A stage that trains on `count` examples of `tokens` tokens."""
    trained, steps = count * tokens * lora.epochs, math.ceil(count / lora.batch) * lora.epochs
    hours = size(p.model.base) / STATED_SIZE * trained / speeds.train / 3600
    money = hours * speeds.gpu_price
    return Row(stage, "GPU", trained=trained, hours=hours, gpu_hours=hours, most=money, least=money, work=steps)


def size(name: str) -> float:
    """Billions of parameters, read from the model's name ("7B", "135m"); `STATED_SIZE` where it has none."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name.lower().replace("_", "-"))
    return STATED_SIZE if found is None else float(found[1]) / (1000 if found[2] == "m" else 1)
