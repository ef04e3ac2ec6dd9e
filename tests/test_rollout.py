"""The event loop: results do not depend on order, every end has its reason, nothing is played twice."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragdistill.agents import make_agent
from ragdistill.errors import DataError, EnvironmentFault
from ragdistill.journal import Journal
from ragdistill.llm import Reply, Sampling
from ragdistill.params import AgentParams
from ragdistill.records import EvalEpisode, Hint, Message, Observation, Step, StopReason, Task, Trajectory, Usage
from ragdistill.rollout import INFRA_RETRIES, NO_ACTION_TEXT, Progress, Setting, fit, is_loop, play_all

LIMITS = AgentParams(
    name="react", context_tokens=4000, max_reply_tokens=10, loop_limit=3, no_action_limit=3, examples=0
)
Policy = Callable[[Sequence[Message], Sampling], str]


def task(name: str) -> Task:
    return Task(id=name, env="toy", split="train", kind="gold", group=f"room {name}", data="", sha256=f"sha {name}")


TASKS = [task(f"t{i}") for i in range(6)]


class ToyEnv:
    """`win` and `lose` end the game, `crash` breaks the engine, `wait` has no effect, all else a new one each time."""

    def __init__(self) -> None:
        self.played: list[str] = []

    async def reset(self, task: Task) -> Observation:
        await asyncio.sleep(0)
        if task.id == "missing":
            raise DataError("missing.json is missing; generate the games.")
        self.played = []
        text = f"A room. Your task is to: solve {task.id}."
        return Observation(text=text, goal=f"solve {task.id}", bucket="solving", admissible=("win", "lose"))

    async def step(self, action: str) -> Observation:
        await asyncio.sleep(0)
        if action == "crash":
            raise EnvironmentFault("An environment worker died.")
        self.played.append(action)
        if action in ("win", "lose"):
            return Observation(text="The end.", reward=1.0 if action == "win" else 0.4, done=True)
        if action == "wait":
            return Observation(text="Nothing happens.", valid=False)
        return Observation(text=f"You {action}: {len(self.played)}.", admissible=("win", "lose"))


class ToyPool:
    """Counts its leases; `faults` lists, task-blind, the numbers of the leases that fail."""

    def __init__(self, faults: Sequence[int] = ()) -> None:
        self.leases = self.open = self.most = 0
        self.envs: list[ToyEnv] = []
        self.faults = faults

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[ToyEnv]:
        self.leases += 1
        if self.leases in self.faults:
            raise EnvironmentFault("An environment worker died.")
        self.open += 1
        self.most = max(self.most, self.open)
        self.envs.append(ToyEnv())
        try:
            yield self.envs[-1]
        finally:
            self.open -= 1


class ToyModel:
    """Answers with `policy(messages, sampling)` after a random number of turns of the event loop."""

    def __init__(self, policy: Policy, jitter: int = 0) -> None:
        self.policy, self.jitter = policy, random.Random(jitter)
        self.context: int | None = None
        self.seen: list[tuple[str, list[Message], Sampling]] = []
        self.forgotten: list[str] = []

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        for _ in range(self.jitter.randrange(4)):
            await asyncio.sleep(0)
        self.seen.append((conversation, list(messages), sampling))
        text = self.policy(messages, sampling)
        if text == "BROKEN":
            raise EnvironmentFault("The endpoint does not answer.")
        usage = Usage(prompt_tokens=self.count_tokens(messages), completion_tokens=2, computed_tokens=3)
        return Reply(text=text, usage=usage, finish="context" if text == "FULL" else "stop")

    async def forget(self, conversation: str) -> None:
        self.forgotten.append(conversation)

    def close(self) -> None:
        pass

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(m.content.split()) for m in messages)

    def fingerprint(self) -> str:
        return "toy"


def setting(**change) -> Setting:
    basis = {"policy": "base", "run": "0/test", "agent": make_agent("react"), "limits": LIMITS, "max_steps": 12,
             "temperature": 0.7, "environment": "toy", "model": "toy"}  # fmt: skip
    return Setting(**basis | change)


def play(
    tmp: Path, answer: Policy, tasks: Sequence[Task] = TASKS, *, attempts: int = 1, concurrency: int = 4,
    pool: ToyPool | None = None, model: ToyModel | None = None, **change,
) -> list[Trajectory]:  # fmt: skip
    jobs = [(t, a) for t in tasks for a in range(attempts)]
    journal = Journal(tmp / "journal", Trajectory)
    return asyncio.run(
        play_all(jobs, setting(**change), model or ToyModel(answer), pool or ToyPool(), journal, concurrency)
    )


def timeless(done: Sequence[Trajectory]) -> list[Trajectory]:
    return [msgspec.structs.replace(t, seconds=0.0) for t in done]


def say(action: str) -> str:
    return f"Thought: I {action}.\nAction: {action}"


def gamble(_: Sequence[Message], sampling: Sampling) -> str:
    """A policy that is a function of the seed: wins, loses, pokes or says nothing."""
    luck = sampling.seed % 11
    return say("win") if luck == 0 else say("lose") if luck == 1 else "hm" if luck == 2 else say(f"poke {luck}")


def test_a_reply_that_is_none_ends_the_episode_with_its_reason_and_is_not_played_again(tmp_path: Path) -> None:
    class Refusing(ToyModel):
        async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
            reply = await super().chat(messages, sampling, conversation)
            bad = len(messages) > 4
            return msgspec.structs.replace(reply, text="refusal: no", finish="error") if bad else reply

    model = Refusing(lambda messages, _: say(f"poke {len(messages)}"))
    done = play(tmp_path, never, model=model)
    assert {(t.stop, t.error, len(t.steps)) for t in done} == {(StopReason.BAD_REPLY, "refusal: no", 2)}
    assert all(t.usage.completion_tokens == 6 for t in done), "it was paid for"
    assert timeless(play(tmp_path, never)) == timeless(done), "an outcome is kept"


def never(_: Sequence[Message], __: Sampling) -> str:
    raise AssertionError("nothing should be played")


# -- order -------------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_concurrency_or_order(tmp_path: Path) -> None:
    alone = play(tmp_path / "a", gamble, attempts=3, concurrency=1)
    model = ToyModel(gamble, jitter=5)
    crowd = play(tmp_path / "b", gamble, attempts=3, concurrency=16, model=model)
    assert timeless(alone) == timeless(crowd)
    assert len({t.stop for t in alone}) >= 3
    backwards = play(tmp_path / "c", gamble, TASKS[::-1], attempts=3)
    assert sorted(timeless(backwards), key=lambda t: t.id) == sorted(timeless(alone), key=lambda t: t.id)


def test_trajectories_come_back_in_the_order_of_the_jobs(tmp_path: Path) -> None:
    done = play(tmp_path, gamble, attempts=2, concurrency=16)
    assert [(t.task_id, t.attempt) for t in done] == [(t.id, a) for t in TASKS for a in range(2)]


def test_every_turn_of_every_attempt_has_a_seed_of_its_own_that_policies_share(tmp_path: Path) -> None:
    def seeds(tmp: Path, **change) -> list[int]:
        model = ToyModel(lambda m, s: say(f"poke {s.seed % 9}"))
        play(tmp, never, TASKS[:2], attempts=2, model=model, max_steps=3, **change)
        return sorted(s.seed for _, _, s in model.seen)

    own = seeds(tmp_path / "a")
    assert len(set(own)) == 2 * 2 * 3
    assert seeds(tmp_path / "b", policy="rag", hints_key="bank") == own
    assert not set(seeds(tmp_path / "c", run="1/test")) & set(own)


def test_no_more_environments_are_held_than_asked_for(tmp_path: Path) -> None:
    pool = ToyPool()
    play(tmp_path, gamble, attempts=3, concurrency=3, pool=pool)
    assert pool.most == 3 and pool.open == 0


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "stop", "steps", "reward"),
    [
        ([say("poke 1"), say("win")], StopReason.SUCCESS, 2, 1.0),
        ([say("poke 1"), say("lose")], StopReason.FAILURE, 2, 0.4),
        ([say(f"poke {i}") for i in range(20)], StopReason.MAX_STEPS, 12, 0.0),
        ([say("wait")] * 20, StopReason.LOOP, 3, 0.0),
        ([say("wait"), say("jump"), say("wait"), say("poke 1")] * 5, StopReason.MAX_STEPS, 12, 0.0),
        (["hm"] * 20, StopReason.NO_ACTION, 3, 0.0),
        (["hm", "hm", say("poke 1")] * 5, StopReason.MAX_STEPS, 12, 0.0),
        ([say("poke 1"), "FULL"], StopReason.CONTEXT_FULL, 1, 0.0),
    ],
    ids=["win", "lose", "steps", "loop", "no loop", "silent", "not silent", "full"],
)
def test_every_end_has_its_reason(tmp_path: Path, replies: list[str], stop: StopReason, steps: int, reward: float):
    (done,) = play(tmp_path, lambda m, _: replies[sum(x.role == "assistant" for x in m)], TASKS[:1])
    assert (done.stop, len(done.steps), done.reward, done.error) == (stop, steps, reward, "")
    assert done.success == (stop is StopReason.SUCCESS)


def test_a_win_on_the_last_step_is_a_win(tmp_path: Path) -> None:
    (done,) = play(tmp_path, lambda m, _: say("win") if len(m) > 4 else say("poke 1"), TASKS[:1], max_steps=3)
    assert done.success and len(done.steps) == 3


def test_a_reply_without_action_is_not_played_and_told_so(tmp_path: Path) -> None:
    pool = ToyPool()
    (done,) = play(tmp_path, lambda m, _: say("win") if len(m) > 2 else "I wonder.", TASKS[:1], pool=pool)
    assert pool.envs[0].played == ["win"]
    assert (done.steps[0].action, done.steps[0].observation, done.steps[0].valid) == ("", NO_ACTION_TEXT, False)
    assert done.invalid == 1 and done.steps[0].reply == "I wonder."


def test_a_last_turn_without_action_keeps_what_was_earned_before_it(tmp_path: Path) -> None:
    class Paying(ToyEnv):
        async def step(self, action: str) -> Observation:
            return Observation(text="Half way.", reward=0.5, parts={"way": 0.5})

    class PayingPool(ToyPool):
        @asynccontextmanager
        async def lease(self) -> AsyncIterator[ToyEnv]:
            yield Paying()

    replies = [say("walk"), "I wonder."]
    (done,) = play(tmp_path, lambda m, _: replies[len(m) > 2], TASKS[:1], pool=PayingPool(), max_steps=2)
    assert (done.stop, done.reward, done.parts) == (StopReason.MAX_STEPS, 0.5, {"way": 0.5})
    assert [s.reward for s in done.steps] == [0.5, 0.5] and not done.steps[1].valid


def test_a_task_that_alone_exceeds_the_context_is_not_played(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(LIMITS, context_tokens=20)
    (done,) = play(tmp_path, never, TASKS[:1], limits=limits)
    assert (done.stop, done.steps, done.usage) == (StopReason.CONTEXT_FULL, (), Usage())


def test_the_record_says_what_happened(tmp_path: Path) -> None:
    (done,) = play(tmp_path, lambda m, _: say("win") if len(m) > 2 else say("wait"), TASKS[:1])
    assert (done.goal, done.bucket, done.kind, done.group) == ("solve t0", "solving", "gold", "room t0")
    assert (done.policy, done.agent, done.model, done.environment) == ("base", "react", "toy", "toy")
    assert [s.action for s in done.steps] == ["wait", "win"] and [s.valid for s in done.steps] == [False, True]
    assert done.steps[0].thought == "I wait." and done.steps[0].reply == say("wait")
    assert done.usage.completion_tokens == 4 and done.usage.computed_tokens == 6
    assert done.usage.prompt_tokens > 2 * len(done.first_observation.split())


@pytest.mark.parametrize("wanted", [True, False])
def test_admissible_commands_are_kept_only_where_asked_for_and_never_shown(tmp_path: Path, wanted: bool) -> None:
    model = ToyModel(lambda m, _: say("poke 1"))
    (done,) = play(tmp_path, never, TASKS[:1], model=model, max_steps=2, record_admissible=wanted)
    assert [s.admissible for s in done.steps] == [("win", "lose") if wanted else ()] * 2
    assert not any("lose" in m.content for _, chat, _ in model.seen for m in chat)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_after_a_fault_the_episode_starts_afresh(tmp_path: Path) -> None:
    calls = Counter[str]()

    def policy(messages: Sequence[Message], _: Sampling) -> str:
        goal = messages[1].content
        calls[goal] += 1
        return say("crash") if "t2" in goal and calls[goal] == 2 else say("poke 1") if len(messages) < 6 else say("win")

    clean = play(tmp_path / "a", lambda m, _: say("poke 1") if len(m) < 6 else say("win"))
    model = ToyModel(policy)
    done = play(tmp_path / "b", policy, model=model)
    assert timeless(done) == timeless(clean)
    talks = {c for c, chat, _ in model.seen if "t2" in chat[1].content}
    assert len(talks) == 2, "the second episode must not continue the first one's conversation"
    assert sorted(set(model.forgotten)) == sorted({c for c, _, _ in model.seen})


@pytest.mark.parametrize("fault", [say("crash"), "BROKEN"], ids=["environment", "model"])
def test_a_lasting_fault_is_recorded_never_journaled_and_disturbs_nobody(tmp_path: Path, fault: str) -> None:
    def policy(messages: Sequence[Message], sampling: Sampling) -> str:
        return fault if "t2" in messages[1].content else gamble(messages, sampling)

    pool = ToyPool()
    done = play(tmp_path, policy, pool=pool)
    assert pool.leases == len(TASKS) + INFRA_RETRIES and pool.open == 0
    lost = done[2]
    assert lost.stop is StopReason.INFRA_ERROR and not lost.success and lost.error
    others = [t for t in done if t is not lost]
    assert timeless(others) == timeless(play(tmp_path / "other", gamble, [t for t in TASKS if t.id != "t2"]))
    again = ToyModel(gamble)
    mended = play(tmp_path, never, model=again)
    assert {chat[1].content for _, chat, _ in again.seen} == {lost.first_observation}
    assert mended[2].stop is not StopReason.INFRA_ERROR
    assert [t for t in mended if t.task_id != "t2"] == others


def test_a_pool_that_gives_no_environment_is_a_fault_too(tmp_path: Path) -> None:
    (done,) = play(tmp_path / "a", gamble, TASKS[:1], pool=ToyPool(faults=[1]))
    assert done.stop is not StopReason.INFRA_ERROR
    (done,) = play(tmp_path / "b", gamble, TASKS[:1], pool=ToyPool(faults=range(99)))
    assert done.stop is StopReason.INFRA_ERROR and done.first_observation == ""


def test_a_designed_error_stops_all_as_itself_and_keeps_what_was_finished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="generate the games"):
        play(tmp_path, gamble, [*TASKS, task("missing")], concurrency=1)
    assert len(play(tmp_path, never, TASKS)) == len(TASKS)


# -- hints -------------------------------------------------------------------------------------------------------------


def test_hints_are_retrieved_once_and_stand_in_every_prompt_and_in_the_record(tmp_path: Path) -> None:
    asked: list[tuple[str, str, int]] = []

    def retrieve(bucket: str, goal: str, seed: int) -> list[Hint]:
        asked.append((bucket, goal, seed))
        return [Hint(id=f"h{i}", bucket=bucket, text=f"poke {{object}} {i} for {goal}", kind="manual") for i in (1, 2)]

    model = ToyModel(lambda m, _: say("win") if len(m) > 8 else say("poke 1"))
    done = play(tmp_path, never, model=model, retrieve=retrieve, hints_key="bank")
    assert sorted(asked) == sorted(("solving", f"solve {t.task_id}", t.seed) for t in done)
    for t in done:
        assert t.hint_ids == ("h1", "h2")
        assert t.hints == tuple(f"poke {{object}} {i} for {t.goal}" for i in (1, 2))
    for _, chat, _ in model.seen:
        goal = chat[1].content.split("to: ")[1].split(".")[0]
        assert all(f"poke {{object}} {i} for {goal}" in chat[1].content for i in (1, 2))
    bare = play(tmp_path, gamble)
    assert not any(t.hints or t.hint_ids for t in bare)


def test_an_episode_pays_for_the_call_that_chose_its_hints(tmp_path: Path) -> None:
    shown = [Hint(id="h", bucket="solving", text="poke", kind="manual")]
    cost = Usage(prompt_tokens=900, computed_tokens=5)

    async def chosen(bucket: str, goal: str, seed: int) -> tuple[list[Hint], Usage]:
        return shown, cost

    free = play(tmp_path, gamble, retrieve=lambda *_: shown, hints_key="free")
    paid = play(tmp_path, gamble, retrieve=chosen, hints_key="paid")
    assert [(t.hints, t.usage) for t in paid] == [(t.hints, t.usage + cost) for t in free]
    assert EvalEpisode.of(paid[0], "rag", 0).tokens_billed == EvalEpisode.of(free[0], "rag", 0).tokens_billed + 900


# -- journal -----------------------------------------------------------------------------------------------------------


def test_nothing_is_played_twice(tmp_path: Path) -> None:
    done = play(tmp_path, gamble, attempts=2)
    pool = ToyPool()
    assert play(tmp_path, never, attempts=2, pool=pool) == done
    assert pool.leases == 0
    more = ToyModel(gamble)
    longer = play(tmp_path, never, attempts=3, model=more)
    assert [t for t in longer if t.attempt < 2] == done
    assert {s.seed for _, _, s in more.seen}.isdisjoint({t.seed for t in done})


def test_the_same_episode_under_another_name_is_relabelled_not_replayed(tmp_path: Path) -> None:
    done = play(tmp_path, gamble, policy="challenger")
    again = play(tmp_path, never, policy="distilled")
    assert again == [msgspec.structs.replace(t, policy="distilled") for t in done]


def test_an_episode_s_key_is_the_one_its_journal_was_written_with() -> None:
    assert setting().key(TASKS[0], 0) == "4b139fd3fe24924c4922961524e953a7"


@pytest.mark.parametrize(
    "change",
    [
        {"run": "1/test"}, {"temperature": 0.0}, {"max_steps": 11}, {"environment": "other"}, {"model": "other"},
        {"hints_key": "bank"}, {"record_admissible": True},
        {"limits": msgspec.structs.replace(LIMITS, context_tokens=3999)},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_whatever_decides_an_episode_is_in_its_key(change: dict) -> None:
    assert setting(**change).key(TASKS[0], 0) != setting().key(TASKS[0], 0)
    other = msgspec.structs.replace(TASKS[0], sha256="other game")
    assert len({setting().key(t, a) for t in (TASKS[0], TASKS[1], other) for a in (0, 1)}) == 6


def test_an_interrupted_run_keeps_its_finished_episodes(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], sampling: Sampling) -> str:
        if "t4" in messages[1].content:
            raise KeyboardInterrupt
        return gamble(messages, sampling)

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, policy, concurrency=1)
    assert len(play(tmp_path, never, TASKS[:4])) == 4


def test_progress_adds_up(tmp_path: Path) -> None:
    def run(model: ToyModel, tasks: Sequence[Task]) -> list[Progress]:
        shown: list[Progress] = []
        journal = Journal(tmp_path, Trajectory)
        jobs = [(t, 0) for t in tasks]
        asyncio.run(play_all(jobs, setting(), model, ToyPool(), journal, 2, shown.append))
        return shown

    fault = ToyModel(lambda m, s: "BROKEN" if "t1" in m[1].content else say("win"))
    first = run(fault, TASKS[:3])[-1]
    assert (first.total, first.done, first.success, first.infra, first.replayed) == (3, 3, 2, 1, 0)
    assert first.completion_tokens == 4 and first.started <= time.monotonic()
    second = run(ToyModel(lambda m, s: say("lose")), TASKS[:4])
    assert len(second) == 4
    assert (second[-1].done, second[-1].replayed, second[-1].success, second[-1].completion_tokens) == (4, 2, 2, 4)


# -- context -----------------------------------------------------------------------------------------------------------


def words(messages: Sequence[Message]) -> int:
    return sum(len(m.content.split()) for m in messages)


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    """System, task with hints, then turns; each content is unique and has a drawn length."""
    turns = draw(st.integers(0, 40))
    roles = ["system", "user", *["assistant", "user"] * turns]
    sizes = draw(st.lists(st.integers(1, 9), min_size=len(roles), max_size=len(roles)))
    return [
        Message(role=r, content=f"{i} " + "w " * (n - 1))  # pyright: ignore[reportArgumentType]
        for i, (r, n) in enumerate(zip(roles, sizes, strict=True))
    ]


@given(chat=chats(), budget=st.integers(1, 300))
def test_trimming_keeps_task_hints_and_newest_observation_and_drops_whole_blocks(chat: list[Message], budget: int):
    fitted = fit(chat, budget, words)
    if fitted is None:
        assert words([*chat[:2], *chat[2:][-2:]]) > budget
        return
    assert words(fitted) <= budget
    assert fitted[:2] == chat[:2] and fitted[-1] == chat[-1]
    gone, turns = (len(chat) - len(fitted)) // 2, (len(chat) - 2) // 2
    assert fitted[2:] == chat[2 + 2 * gone :]
    assert gone % 8 == 0 or gone == turns - 1
    if gone:
        assert words(chat[:2] + chat[2 + 2 * (8 * ((gone - 1) // 8)) :]) > budget, "no more is dropped than needed"


def test_the_kept_beginning_is_stable_for_several_turns() -> None:
    chat = [Message(role="system", content="s"), Message(role="user", content="task")]
    starts = []
    for i in range(60):
        chat += [Message(role="assistant", content=f"a{i} x"), Message(role="user", content=f"o{i} x")]
        fitted = fit(chat, 80, words)
        assert fitted
        starts.append(fitted[2].content)
    assert len(set(starts)) <= 1 + 60 / 8 and starts[-1] != starts[0]


@pytest.mark.parametrize(("budget", "holds"), [(400, None), (400, 9000), (4000, 400)])
def test_no_prompt_exceeds_the_budget_or_the_model_and_all_end_with_the_newest_observation(
    tmp_path: Path, budget: int, holds: int | None
) -> None:
    model = ToyModel(lambda m, s: say(f"poke {s.seed % 5} " + "very " * 20 + "hard"))
    if holds:
        model.context = holds
    limits = msgspec.structs.replace(LIMITS, context_tokens=budget)
    (done,) = play(tmp_path, never, TASKS[:1], model=model, limits=limits, max_steps=40)
    assert done.stop is StopReason.MAX_STEPS
    prompts = [chat for _, chat, _ in model.seen]
    assert max(map(words, prompts)) <= 400 - LIMITS.reply_tokens
    assert len(prompts[-1]) < 2 + 2 * 39, "something was dropped"
    assert [p[-1].content for p in prompts] == [done.first_observation, *[s.observation for s in done.steps[:-1]]]
    assert all(p[1].content == done.first_observation for p in prompts)


# -- loops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cycle", "repeats", "limit", "loop"),
    [
        ("a", 4, 4, True), ("a", 3, 4, False), ("ab", 4, 4, True), ("ab", 3, 4, False), ("abc", 4, 4, True),
        ("abcd", 4, 4, True), ("abcd", 3, 4, False), ("abcde", 9, 4, False), ("a", 2, 2, True), ("", 0, 2, False),
    ],
)  # fmt: skip
def test_a_loop_is_a_repeated_cycle_of_at_most_four_steps(cycle: str, repeats: int, limit: int, loop: bool) -> None:
    steps = [Step(reply="", thought="", action=c, observation="same") for c in cycle * repeats]
    before = [Step(reply="", thought="", action=f"x{i}", observation="") for i in range(3)]
    assert is_loop([*before, *steps], limit) is loop
    changing = [msgspec.structs.replace(s, observation=str(i)) for i, s in enumerate(steps)]
    assert not is_loop([*before, *changing], limit), "the same command with a new effect is no loop"
