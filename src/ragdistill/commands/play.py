"""`ragdistill play`: watch an agent act on one task, step by step, or act yourself with `--me`.

The rules are the evaluation's: greedy by its parameters, the same step budget, no list of admissible commands, `help`
refused. Nothing is recorded. Texts of models and environments are untrusted: control characters are shown, never sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import indent, wrap

from ragdistill import progress
from ragdistill.agents import Agent
from ragdistill.commands.show import printable, text_width, verdict
from ragdistill.envs import Checked, Env, make_domain
from ragdistill.errors import ConfigError, DataError
from ragdistill.journal import cache_dir
from ragdistill.llm import ChatModel, Reply, Sampling, context_limit
from ragdistill.params import Params, load_params
from ragdistill.records import Message, Observation, Task, read_jsonl
from ragdistill.rollout import NO_ACTION_TEXT, Episode, Setting
from ragdistill.stages.common import BASE, TASKS, quiet_libraries
from ragdistill.stages.defaults import max_steps, settle
from ragdistill.stages.playing import agent_of, open_model

ALIASES = ("champion", "challenger")
_SPLITS = ("dev", "eval", "train")
"""Task files; without `--task` the first of the first is played: whoever tunes shall not look at the test games."""
_MARGIN = "    "
_NAMED = 5
"""Tasks named in an error."""


def play(model: str | None, adapter: Path | None, task: str | None, me: bool) -> int:
    """Play one task and print it live; the exit status is 0 however the episode ends.

    `model` is base (default), champion, challenger or a model directory, `adapter` an adapter directory for it, `task`
    a part of a task's id. Raises `ConfigError` for names that contradict each other or name several tasks, `DataError`
    for files that are absent.
    """
    params = settle(load_params())
    if me and (model or adapter):
        raise ConfigError("--me plays without a model; leave --model and --adapter out.")
    chosen, domain = find_task(task), make_domain(params.env)
    player = None if me else _open(params, model or "base", adapter)
    who = "You act" if me else f"{model or 'base'}{f' + {adapter}' if adapter else ''} acts"
    keys = "`history` lists your commands, `quit` ends" if me else "Ctrl-C ends"
    _say(f"{chosen.id}\n{who}, {max_steps(params)} steps at most. {keys}.")
    env = Checked(domain.env_factory(cache_dir("env"), False)())
    try:
        if player is None:
            act(env, chosen, max_steps(params))
        else:
            student = model in ALIASES or adapter is not None
            asyncio.run(watch(params, env, chosen, player, domain.fingerprint(), agent_of(params, student)))
    finally:
        env.close()
        if player is not None:
            player.close()  # waits for a call under way, which may be paid, and keeps its answer
    return 0


def find_task(part: str | None) -> Task:
    """The one task whose id is, or else contains, `part`; without it the first development task."""
    files = [path for path in (TASKS / f"{split}.jsonl" for split in _SPLITS) if path.exists()]
    tasks = [t for path in files for t in read_jsonl(path, Task)]
    if not tasks:
        raise DataError(f"{TASKS} holds no tasks; run the stage that writes them (`dvc repro tasks`).")
    if part is None:
        return tasks[0]
    found = [t for t in tasks if t.id == part] or [t for t in tasks if part in t.id]
    if not found:
        raise ConfigError(f"No task's id contains {part!r}; ids stand in {TASKS}, the first is {tasks[0].id}.")
    if len(found) > 1:
        names = ", ".join(t.id for t in found[:_NAMED])
        raise ConfigError(f"{len(found)} tasks' ids contain {part!r}; give more of one: {names}, ….")
    return found[0]


def resolve(params: Params, model: str, adapter: Path | None) -> tuple[Path, Path | None]:
    """Directories of weights and adapter that the command line names; a registered adapter is fetched.

    Raises `ConfigError` for names that contradict each other, `DataError` for what is absent.
    """
    if model in ALIASES:
        if adapter is not None:
            raise ConfigError(f"{model} is an adapter itself; leave --adapter out, or give --model a directory.")
        from ragdistill.commands.promote import fetch_adapter

        directory, adapter = BASE, fetch_adapter(params, model)
    else:
        directory = BASE if model == "base" else Path(model)
    if not directory.is_dir():
        known = ", ".join(("base", *ALIASES))
        raise DataError(f"{directory} does not exist; run `dvc repro`, or name {known} or a model directory.")
    if adapter is not None and not adapter.is_dir():
        raise DataError(f"{adapter} does not exist; --adapter takes a directory such as models/students/distilled-0.")
    return directory, adapter


def act(env: Env, task: Task, limit: int) -> None:
    """A person plays `task` with at most `limit` commands; `history`, `quit` and the end of input are not commands."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing and the arrow keys

    seen = env.reset(task)
    _say(f"\n{seen.text}\n")
    typed: list[str] = []
    refused = 0
    while not seen.done and len(typed) < limit:
        try:
            command = input(f"{len(typed) + 1:>3} > ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if command.lower() == "quit":
            break
        if command.lower() == "history":
            _say("\n".join(f"{i:>3} {line}" for i, line in enumerate(typed, 1)) or "Nothing was typed yet.")
        elif command:
            seen = env.step(command)
            typed.append(command)
            refused += not seen.valid
            _observe(seen)
    _say(f"\n{_outcome(seen.done, seen.reward)} in {len(typed)} steps, {refused} refused.")


async def watch(params: Params, env: Env, task: Task, model: ChatModel, environment: str, agent: Agent) -> None:
    """The agent plays `task` with the seeds of the evaluation; `EnvironmentFault` when the infrastructure fails."""
    setting = Setting(
        policy="play", run=f"{params.seed}/evaluate", agent=agent, limits=params.agent,
        max_steps=max_steps(params), temperature=params.evaluate.temperature, environment=environment,
        model=model.fingerprint(),
    )  # fmt: skip
    episode = Episode(task, 0, setting.key(task, 0), setting, conversation="play")
    await episode.run(_Shown(env), _Heard(model, agent))
    t = episode.trajectory()
    _say(
        f"\n{_outcome(episode.done, t.reward)} in {len(t.steps)} steps, ended by {t.stop.value}, {t.invalid} refused; "
        f"{t.usage.billed:,} tokens billed, {t.usage.computed_tokens:,} computed, {t.seconds:.1f} s."
    )


class _Shown:
    """The one environment as an `AsyncEnv` that prints what it answers. It blocks: nothing else runs meanwhile."""

    def __init__(self, env: Env) -> None:
        self._env = env

    async def reset(self, task: Task) -> Observation:
        seen = self._env.reset(task)
        _say(f"\n{seen.text}\n")
        return seen

    async def step(self, action: str) -> Observation:
        seen = self._env.step(action)
        _observe(seen)
        return seen


class _Heard:
    """A model whose replies are printed as they come, thought and action apart."""

    def __init__(self, model: ChatModel, agent: Agent) -> None:
        self._model, self._agent, self._turn = model, agent, 0
        self.context = context_limit(model)

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        reply = await self._model.chat(messages, sampling, conversation)
        if reply.finish in ("context", "error"):
            return reply
        self._turn += 1
        parsed = self._agent.parse(reply.text)
        _say(parsed.thought, _MARGIN, "italic", first=f"{self._turn:>3} ")
        if parsed.action:
            _say(f"> {parsed.action}", _MARGIN, "bold")
        else:
            _say(f"(no action)\n{reply.text}", _MARGIN)
            _say(f"{NO_ACTION_TEXT}\n", _MARGIN)
        return reply

    async def forget(self, conversation: str) -> None:
        await self._model.forget(conversation)

    def close(self) -> None:
        self._model.close()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self._model.count_tokens(messages)

    def fingerprint(self) -> str:
        return self._model.fingerprint()


def wrapped(text: str, width: int, margin: str = "", first: str = "") -> str:
    """`text` without control characters, each of its lines wrapped to `width` columns, `margin` included.

    `first` stands in place of the first line's margin.
    """
    room = max(width - len(margin), 1)
    lines = [part for line in printable(text).split("\n") for part in wrap(line, room) or [""]]
    return first + indent("\n".join(lines), margin)[len(first) :]


def _open(params: Params, model: str, adapter: Path | None) -> ChatModel:
    quiet_libraries()
    with progress.display("play"):
        return open_model(params, *resolve(params, model, adapter))


def _observe(seen: Observation) -> None:
    _say(f"{'' if seen.valid else '[refused] '}{seen.text}\n", _MARGIN)


def _outcome(done: bool, reward: float) -> str:
    return verdict("won" if done and reward >= 1.0 else "lost" if done else "not won", reward)


def _say(text: str, margin: str = "", style: str = "", first: str = "") -> None:
    """Print `text` safely at the terminal's width; `style` shows on terminals only."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(Text(wrapped(text, text_width(), margin, first), style), soft_wrap=True)
    console.file.flush()
