"""Hostile model outputs and observations through parser, renderer, chat template, journal, strip and hint miner.

Each example is a whole episode: the model says one fuzzed reply after another, the environment answers with fuzzed
observations. Nothing may crash, no control token may get through, and what is journaled must come back. A few hundred
examples in the fast tier, 10,000 in the slow one.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragdistill.agents import make_agent
from ragdistill.agents.hint_block import HEADER, render_hints
from ragdistill.errors import DataError, EmptyResultError
from ragdistill.hints.bank import build_bank, hints_of
from ragdistill.hints.mine import mine
from ragdistill.hints.safety import refusal
from ragdistill.journal import Journal
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.params import AgentParams, HintLlmParams, HintsParams, StripParams
from ragdistill.records import Message, Observation, StopReason, Task, Trajectory, Usage
from ragdistill.rollout import Setting, play_all
from ragdistill.stages.strip import renderer
from ragdistill.strip import strip
from tests.faults.conftest import Figure
from tests.llm_toys import toy_tokenizer

FAST, SLOW = 150, 10_000
LIMITS = AgentParams(name="x", context_tokens=3000, max_reply_tokens=100, loop_limit=3, no_action_limit=3, examples=0)
MINING = HintsParams(
    extractor="offline", kinds=("contrast", "precondition", "redundancy"), k=3, min_support=1, max_chars=120,
    dedup=0.85, per_bucket=20,
    ranker="evidence", ranker_model=None, embedder=None, llm=HintLlmParams(None, "pairwise", 20, 4, 4000, 300, 0.0),
)  # fmt: skip
STRIP = StripParams(max_invalid=None, min_score=None, on_hint_reference="drop_thought", per_task=9)
HINT = "To finish, clean {object} with {sinkbasin}."
TASK = Task(id="t", env="toy", split="train", kind="k", group="g", data="", sha256="")
FORM = ChatFormat(toy_tokenizer())
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
CONTROL = set(toy_tokenizer().all_special_ids)

FRAGMENTS = st.sampled_from([
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<|im_start|>system\n", "Action: ", "\nAction: look",
    "Thought: ", "\nThought: ", "Goal: ", "Current location: ", "Observation: ", HEADER, HINT, "{object}", "{{", "}",
    "the hint says", "Nothing happens.", "You see a mug 1, a desk 2.", "go to desk 2", "take mug 1 from desk 2", "\x00",
    "clean mug 1 with sinkbasin 1", "\ud800", "\udfff", "\u2028", "\x85", "\r", "\u202e", "\u200b", "🜁", "  ", ": ",
    "\ue0000\ue001", "9" * 30, "a" * 300, "system: obey", "[/INST]", "\\", "%s", "$(x)", "<script>", "../../etc",
])  # fmt: skip
TEXT = st.lists(FRAGMENTS | st.text(st.characters(), max_size=12), max_size=6).map("".join)
COMMAND = st.sampled_from([
    "go to desk 2", "take mug 1 from desk 2", "clean mug 1 with sinkbasin 1", "move mug 1 to shelf 3", "open drawer 4",
])  # fmt: skip
SANE = st.builds(
    lambda thought, command, rest: f"Thought: {thought}\nAction: {command}{rest}", TEXT, COMMAND, st.just("") | TEXT
)
TURN = st.tuples(TEXT, TEXT, st.booleans()) | st.tuples(SANE, TEXT, st.just(True))
"""Noise, or a command that works with noise around it: of noise alone nothing is ever learnt."""
EPISODE = st.tuples(
    st.sampled_from(["act", "react", "stateact"]), TEXT, st.lists(TURN, min_size=1, max_size=6), st.booleans()
)


class Script:
    """Model and environment that say what the example says; the model also tokenises every prompt it gets."""

    def __init__(self, opening: str, turns: Sequence[tuple[str, str, bool]], wins: bool) -> None:
        self.opening, self.turns, self.wins, self.at, self.asked = opening, turns, wins, 0, 0

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Script]:
        yield self

    async def reset(self, task: Task) -> Observation:
        return Observation(text=self.opening, goal=self.opening, bucket="b")

    async def step(self, action: str) -> Observation:
        assert "\n" not in action and len(action) <= 200
        _, text, valid = self.turns[min(self.at, len(self.turns)) - 1]
        done = self.at >= len(self.turns)
        return Observation(text=text, valid=valid, done=done, reward=float(done and self.wins))

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        ids = FORM.prompt_ids(messages)
        plain = FORM.prompt_ids([Message(role=m.role, content="x") for m in messages])
        assert [i for i in ids if i in CONTROL] == [i for i in plain if i in CONTROL], "a control token got through"
        text = self.turns[self.at % len(self.turns)][0]
        self.at += 1
        return Reply(text=text, usage=Usage(prompt_tokens=len(ids)))

    async def forget(self, conversation: str) -> None:
        pass

    def close(self) -> None:
        pass

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return len(FORM.prompt_ids(messages))

    def fingerprint(self) -> str:
        return "script"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield place
    shutil.rmtree(place)


def through_everything(root: Path, example: tuple[str, str, list[tuple[str, str, bool]], bool]) -> Counter[str]:
    """Play, journal, read back, strip, mine; which of the last two it reached."""
    style, opening, turns, wins = example
    agent, script = make_agent(style), Script(opening, turns, wins)
    setting = Setting(
        policy="base", run="0", agent=agent, limits=LIMITS, max_steps=8, temperature=0.0, environment="e", model="m"
    )
    shutil.rmtree(root / "j", ignore_errors=True)
    journal = Journal(root / "j", Trajectory)
    (played,) = asyncio.run(play_all([(TASK, 0)], setting, script, script, journal, 1))
    assert played.stop is not StopReason.INFRA_ERROR
    assert journal.get(setting.key(TASK, 0)) == played
    for step in played.steps:
        canonical = agent.reply(step.thought, step.action, step.state)
        again = agent.parse(canonical)
        assert (again.thought.split(), again.state) == (step.thought.split(), step.state)
        assert again.action.split() == step.action.split()
    return learn(played)


def learn(played: Trajectory) -> Counter[str]:
    """Strip and mine `played` as a success beside its own failure; only designed refusals are allowed.

    Counts the example as `stripped` when it became training text, as `mined` when a hint was let into the bank.
    """
    reached = Counter[str]()
    won = msgspec.structs.replace(played, id="won", stop=StopReason.SUCCESS, hints=(HINT,))
    lost = msgspec.structs.replace(played, id="lost", stop=StopReason.MAX_STEPS, steps=played.steps[:1])
    try:
        examples, _ = strip([won], STRIP, renderer(make_agent(played.agent)))
        shown = [m.content for e in examples for m in e.messages]
        assert not any(HINT in text or HEADER in text for text in shown)
        ids, mask = FORM.training_ids(examples[0].messages)
        assert len(ids) == len(mask)
        assert sum(i in CONTROL for i in ids) == 2 * len(shown), "a control token got through"
        reached["stripped"] += 1
    except DataError as e:
        if "shows the hint" not in str(e) and "a dropped thought shows" not in str(e):
            raise
    try:
        bank, _ = build_bank(mine([won, lost], MINING), MINING)
    except EmptyResultError:
        return reached
    block = render_hints([h.text for h in hints_of(bank)])
    assert len(block.splitlines()) == 1 + len(hints_of(bank))
    assert not any(refusal(h.text, MINING.max_chars) for h in hints_of(bank))
    reached["mined"] += bool(hints_of(bank))
    return reached


def fuzz(count: int, root: Path) -> str:
    """`count` examples; says how far they went. Texts that never get to the end of the pipeline would prove little."""
    reached = Counter[str]()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=QUIET)
    @given(EPISODE)
    def each(example: tuple[str, str, list[tuple[str, str, bool]], bool]) -> None:
        reached["ran"] += 1
        reached.update(through_everything(root, example))

    each()
    ran, stripped, mined = (reached[name] for name in ("ran", "stripped", "mined"))
    assert stripped > ran / 4 and mined > ran / 20, reached
    return f"{ran} examples ({stripped} became training text, {mined} gave a hint): 0 crashes, 0 control tokens through"


def test_hostile_texts_go_through_everything(root: Path, figure: Figure) -> None:
    figure("hostile episodes", fuzz(FAST, root))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_hostile_texts_go_through_everything(root: Path, figure: Figure) -> None:
    figure("hostile episodes (slow)", fuzz(SLOW, root))
