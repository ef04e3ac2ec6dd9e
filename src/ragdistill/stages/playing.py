"""What the playing stages share: the engine, the environment pool, live progress.

`rollout.play_all` does the work; this module opens what it needs and closes it again.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ragdistill import progress
from ragdistill.agents import Agent, make_agent
from ragdistill.agents.examples import Example, FewShot
from ragdistill.envs import Demo, HasExamples, Turn, make_domain
from ragdistill.envs.pool import EnvPool
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.journal import Journal, cache_dir
from ragdistill.llm import ChatModel, cpu_env, slots_of
from ragdistill.llm.choice import best_device, choose
from ragdistill.llm.weights import check_adapter, check_model_dir, context_of
from ragdistill.params import Params
from ragdistill.records import Step, StopReason, Task, Trajectory, read_json
from ragdistill.rollout import Progress, Retrieve, Setting, play_all
from ragdistill.stages import defaults
from ragdistill.stages.common import BASE, IDENTITY, TEACHER
from ragdistill.stages.spending import SERVED, is_served, ledger_file, stage_name, tell

if TYPE_CHECKING:
    from ragdistill.envs.ray_pool import RayPool

MAX_INFRA_SHARE = 0.05
"""More infrastructure faults than this make a stage fail: its numbers would stand on the rest only."""

Work = tuple[Setting, Sequence[tuple[Task, int]]]
"""A setting and its (task, attempt) jobs."""


@progress.bar("loading the model")
def open_model(params: Params, directory: Path, adapter: Path | None = None, context: int = 0) -> ChatModel:
    """The engine that `params.model` names, with `directory`'s weights (and `adapter` merged into them).

    It holds `agent.context_tokens` a conversation, `context` if that is more, or what the model was made for if that
    is less. Raises `IdentityError` for what an engine of this process cannot load; the others check what they take.
    """
    name = adapter.name if adapter else directory.name
    if params.model.engine == SERVED or (directory / SERVED).exists():
        if adapter:
            raise ConfigError(
                f"The endpoint cannot play the adapter {name}; use model.engine for the students and "
                f"model.teacher: {SERVED} for the served model."
            )
        return open_endpoint(params)
    if params.model.engine == "scripted":
        return _scripted(params.model.script, name)
    context = max(params.agent.context_tokens, context)
    if params.model.engine == "vllm":
        return _vllm(params, directory, adapter, context)
    check_model_dir(directory)
    if adapter:
        check_adapter(directory, adapter)
    cpu_env.apply()
    batch, dtype = params.model.concurrency, params.model.dtype
    choice = choose(params.model.engine, dtype, directory)
    if params.model.engine == "auto":
        print(f"engine for {name}: {choice}", file=sys.stderr, flush=True)
    if choice.engine == "openvino":
        from ragdistill.llm.openvino import OpenVinoEngine

        return OpenVinoEngine(directory, adapter, max_batch=batch, cache=cache_dir("gguf"), max_context=context)
    from ragdistill.llm.local import LocalEngine

    reference = choice.engine == "reference"
    return LocalEngine(directory, adapter, dtype, batch, reference, context, choice.device)


def open_endpoint(params: Params) -> ChatModel:
    """The served model, with the journal of calls and the ledger that all stages and experiments share."""
    from ragdistill.llm.endpoint import EndpointModel

    return EndpointModel(params.endpoint, cache_dir("journal", "calls"), ledger_file(), stage_name())


def _vllm(params: Params, directory: Path, adapter: Path | None, context: int) -> ChatModel:
    """The model on a vLLM server: the one at `vllm.url`, or one that lives as long as the model is open."""
    from ragdistill.serving import vllm
    from ragdistill.serving.vllm_chat import VllmChat

    given, dtype = params.vllm, params.model.dtype
    args = [*(() if dtype == "auto" else ("--dtype", dtype)), *given.args]
    if given.url:
        server, args = vllm.connect(given.url), []
    else:
        python, log = vllm.interpreter(given.python), cache_dir("vllm", "server.log")
        room, adapters = context_of(directory, context), [adapter] if adapter else []
        sure = () if best_device() == "cuda" else vllm.whole_prompts(room)
        server = vllm.start(python, directory, adapters, log, room, given.start_timeout, [*sure, *args])
    try:
        return VllmChat(server, directory, adapter, params.model.concurrency, server.stop, context, args)
    except BaseException:
        server.stop()
        raise


def _scripted(script: str | None, name: str) -> ChatModel:
    from ragdistill.llm.scripted import ScriptedModel

    module, _, function = (script or "").partition(":")
    if not function:
        raise ConfigError("model.engine is scripted, but model.script is not 'module:function'.")
    policy = getattr(import_module(module), function)
    return ScriptedModel(lambda messages, sampling: policy(messages, sampling, name), name)


def teacher_dir() -> Path:
    """The model that plays rollouts and teaches: its own, or the (cold-started) base."""
    pointer = TEACHER / "same_as_base"
    return BASE if pointer.exists() else TEACHER


def play(
    params: Params,
    policy: str,
    run: str,
    jobs: Sequence[tuple[Task, int]],
    model: ChatModel,
    temperature: float,
    retrieve: Retrieve | None = None,
    hints_key: str = "",
) -> list[Trajectory]:
    """Play `jobs` in one setting; see `play_each`."""
    setting = setting_of(params, policy, run, model, temperature, retrieve, hints_key)
    return play_each(params, [(setting, jobs)], model)[0]


def setting_of(
    params: Params,
    policy: str,
    run: str,
    model: ChatModel,
    temperature: float,
    retrieve: Retrieve | None = None,
    hints_key: str = "",
    *,
    student: bool = False,
) -> Setting:
    """All that decides the episodes of `policy`, from this project's parameters and identity."""
    return Setting(
        policy=policy,
        run=f"{params.seed}/{run}",
        agent=agent_of(params, student),
        limits=msgspec.structs.replace(params.agent, max_reply_tokens=defaults.reply_tokens(params)),
        max_steps=defaults.max_steps(params),
        temperature=temperature,
        environment=read_json(IDENTITY)["environment"],
        model=model.fingerprint(),
        retrieve=retrieve,
        hints_key=hints_key,
        record_admissible=params.rollouts.record_admissible,
    )


def agent_of(params: Params, student: bool) -> Agent:
    """The agent as it plays: with `agent.examples` in its prompt, but for a student, which has learnt without them.

    Raises `ConfigError` when the environment has no or too few examples.
    """
    agent, count = make_agent(params.agent.name), params.agent.examples
    if student or not count:
        return agent
    domain = make_domain(params.env)
    if not isinstance(domain, HasExamples):
        raise ConfigError(f"agent.examples is {count}, but the environment {domain.name} has none; set it to 0.")
    library = {kind: [_example(d) for d in demos] for kind, demos in domain.examples().items()}
    return FewShot(agent, library, domain.example_type, count)


def _example(demo: Demo) -> Example:
    def step(t: Turn) -> Step:
        return Step(reply="", thought=t.thought, action=t.action, observation=t.observation, state=t.state)

    return Example(first_observation=demo.first_observation, steps=tuple(map(step, demo.turns)))


def at_once(params: Params, model: ChatModel) -> int:
    """How many episodes, or calls, `model` gets at the same time: no more than it has slots to keep them in."""
    if is_served(model):
        return params.endpoint.max_concurrency
    return min(params.model.concurrency, slots_of(model) or params.model.concurrency)


def play_each(params: Params, work: Sequence[Work], model: ChatModel) -> list[list[Trajectory]]:
    """Play every setting's jobs, one setting after the other, with this project's pool and journal; close `model`.

    Checks the share of infrastructure faults. Ctrl-C raises `KeyboardInterrupt` that says what is kept, once all
    workers and the model have ended.
    """
    journal = _episodes()
    try:
        played = asyncio.run(_play(params, work, model, journal, at_once(params, model)))
    except KeyboardInterrupt:
        now = _episodes()
        kept = sum(now.get(setting.key(*job)) is not None for setting, jobs in work for job in jobs)
        raise KeyboardInterrupt(f"{kept} finished episodes are kept") from None
    finally:
        model.close()
        tell(model)
        if journal.damaged:
            print(
                f"journal: {journal.damaged} of its episodes are played again; their files are unreadable, or their "
                "seals do not fit: they were cut, altered or moved.", file=sys.stderr, flush=True,
            )  # fmt: skip
    done = [t for part in played for t in part]
    infra = [t for t in done if t.stop is StopReason.INFRA_ERROR]
    if len(infra) > MAX_INFRA_SHARE * len(done):
        raise EnvironmentFault(
            f"{len(infra)} of {len(done)} episodes ended in infrastructure faults ({infra[0].error}); "
            "fix the cause and run again, finished episodes are kept."
        )
    return played


def _episodes() -> Journal[Trajectory]:
    return Journal(cache_dir("journal", "episodes"), Trajectory)


async def _play(
    params: Params, work: Sequence[Work], model: ChatModel, journal: Journal[Trajectory], most: int
) -> list[list[Trajectory]]:
    pool = open_pool(params, most)
    played: list[list[Trajectory]] = []
    try:
        for setting, jobs in work:
            with progress.bar("episodes", len(jobs)) as bar:
                played.append(await play_all(jobs, setting, model, pool, journal, most, partial(show, bar)))
    finally:
        await pool.close()
    return played


def open_pool(params: Params, at_once: int) -> EnvPool | RayPool:
    """Environments for `at_once` episodes: here in processes, or on a Ray cluster where `ray.address` names one."""
    admissible, env = params.rollouts.record_admissible, params.env
    if params.ray.address:
        from ragdistill.envs.ray_pool import RayPool

        return RayPool(params.ray, env, admissible, at_once, cache_dir("env"))
    factory, slots = make_domain(env).env_factory(cache_dir("env"), admissible), -(-at_once // env.workers)
    return EnvPool(factory, env.workers, slots, env.recycle_after, env.step_timeout)


def show(bar: progress.Bar, p: Progress) -> None:
    """Live figures: what is done, and how it goes."""
    rate = p.completion_tokens / max(time.monotonic() - p.started, 1e-9)
    faults = f", {p.infra} lost to infrastructure" if p.infra else ""
    bar.at(p.done, p.replayed, f"success {p.success / max(p.done, 1):.0%}, {rate:.0f} tokens/s{faults}")


def summary(trajectories: Sequence[Trajectory]) -> str:
    """n, successes, steps and billed tokens in one phrase; replayed episodes count with what they cost when played."""
    n = max(len(trajectories), 1)
    won = sum(t.success for t in trajectories)
    steps = sum(len(t.steps) for t in trajectories) / n
    billed = sum(t.usage.billed for t in trajectories)
    played = f"{len(trajectories)} episodes, {won} successes ({won / n:.0%}), {steps:.1f} steps each"
    return f"{played}, {billed:,} tokens billed"
