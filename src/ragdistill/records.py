"""The vocabulary: Task → Step → Trajectory → Hint → SftExample → EvalEpisode, and their JSONL round-trip.

Small frozen records that everything else speaks. This module knows no model, environment or file layout.
Unknown fields and wrong types are refused on reading (msgspec), so a file of another schema never loads silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ragdistill.errors import DataError
from ragdistill.files import write_atomic

SCHEMA = 1
"""Version of all records below; bumped when a field changes its meaning."""
Schema = Annotated[int, msgspec.Meta(ge=SCHEMA, le=SCHEMA)]  # a record of another schema is refused on reading

Role = Literal["system", "user", "assistant"]
Parts = dict[str, float] | msgspec.UnsetType
"""Parts of a reward by name, each in [0, 1], for reports only; unset, and not written, where there are none."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records, strict. Say both flags again: msgspec does not inherit `kw_only`, pyright not `frozen`."""


class Message(Record, frozen=True, kw_only=True):
    """One chat message; `content` is untrusted text and never holds control tokens with meaning."""

    role: Role
    content: str


class Task(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One playable game or goal."""

    id: str
    """Unique over all splits, stable over machines."""
    env: str
    """Environment name, as in `params.yaml: env.name`."""
    split: str
    """train, dev, test, valid_seen, …"""
    kind: str
    """Gold task type, used to draw balanced samples; never shown to a policy and never used for retrieval."""
    group: str
    """Room (floor plan) or product family: the unit of the cluster bootstrap."""
    data: str
    """Environment-private locator, relative to the environment's data root."""
    sha256: str
    """Content hash of the game; the contamination check compares it."""
    feasible: bool = True
    """False where the environment itself cannot give the full reward; results are reported with and without."""


class Observation(Record, frozen=True, kw_only=True):
    """What the environment answers. Gymnasium-shaped: text, reward, done, info."""

    text: str
    reward: float = 0.0
    """In [0, 1]; 1.0 is full success."""
    done: bool = False
    valid: bool = True
    """False when the environment refused the action (ALFWorld: "Nothing happens.")."""
    goal: str = ""
    """The task sentence; set by `reset` only."""
    bucket: str = ""
    """Task type *inferred from the goal text*; set by `reset` only. Hints are retrieved inside it."""
    admissible: tuple[str, ...] = ()
    """The engine's list of commands. Never rendered to a policy; recorded only for affordance mining."""
    parts: Parts = msgspec.UNSET


class Usage(Record, frozen=True, kw_only=True):
    """Token counts of one call or, summed, of one episode."""

    prompt_tokens: int = 0
    """As billed by an endpoint: each call counts its whole prompt."""
    completion_tokens: int = 0
    computed_tokens: int = 0
    """Prompt tokens actually prefilled (not reused from a KV cache) + completion tokens."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            computed_tokens=self.computed_tokens + other.computed_tokens,
        )

    @property
    def billed(self) -> int:
        """Prompt + completion tokens, the paper's "tokens per episode"."""
        return self.prompt_tokens + self.completion_tokens


class StopReason(StrEnum):
    """Why an episode ended."""

    SUCCESS = "success"
    """The environment said done with full reward."""
    FAILURE = "failure"
    """The environment said done without full reward (e.g. the wrong purchase)."""
    MAX_STEPS = "max_steps"
    """The step budget ran out."""
    LOOP = "loop"
    """The agent repeated itself without effect (`agent.loop_limit`)."""
    CONTEXT_FULL = "context_full"
    """System text, task and hints alone exceed the context budget, or nothing is left to drop."""
    NO_ACTION = "no_action"
    """Too many replies in a row held no action (`agent.no_action_limit`)."""
    BAD_REPLY = "bad_reply"
    """The model's server answered without a reply to play: a refusal, no choice, a malformed or broken-off one."""
    INFRA_ERROR = "infra_error"
    """Engine, worker or endpoint failed. Never counted as the agent's failure; replayed by the next run."""


class Step(Record, frozen=True, kw_only=True):
    """One turn: what the model said, what was played, what came back."""

    reply: str
    """The model's text, verbatim."""
    thought: str
    action: str
    """Parsed command; empty when the reply held none."""
    observation: str
    valid: bool = True
    reward: float = 0.0
    state: dict[str, str] = msgspec.field(default_factory=dict)
    """What the reply said of goal and state, by label; only in styles that have such fields (StateAct)."""
    admissible: tuple[str, ...] = ()
    """Filled only with `rollouts.record_admissible` (affordance mining)."""


class Trajectory(Record, frozen=True, kw_only=True):
    """One finished episode. Hints are a field, so that stripping them is *not rendering* it."""

    id: str
    task_id: str
    policy: str
    agent: str
    attempt: int
    seed: int
    goal: str
    bucket: str
    group: str
    kind: str
    hints: tuple[str, ...] = ()
    """Texts shown at episode start, in order."""
    hint_ids: tuple[str, ...] = ()
    first_observation: str = ""
    """Whole text of the reset, goal included."""
    steps: tuple[Step, ...] = ()
    stop: StopReason
    reward: float = 0.0
    usage: Usage = Usage()
    seconds: float = 0.0
    """Wall time of the episode; latency under the load it ran in."""
    model: str = ""
    """Fingerprint of the weights that played."""
    environment: str = ""
    """Fingerprint of the environment."""
    error: str = ""
    """Set for `infra_error` and `bad_reply` only."""
    parts: Parts = msgspec.UNSET
    schema: Schema = SCHEMA

    @property
    def success(self) -> bool:
        return self.stop is StopReason.SUCCESS

    @property
    def invalid(self) -> int:
        """Number of actions the environment refused."""
        return sum(not s.valid for s in self.steps)


HintKind = Literal["contrast", "precondition", "redundancy", "affordance", "llm", "manual"]


class Hint(Record, frozen=True, kw_only=True):
    """A compact, reusable, imperative sentence with `{placeholders}`, never an object's number."""

    id: str
    bucket: str
    text: str
    kind: HintKind
    evidence: tuple[str, ...] = ()
    """Ids of the trajectories it was mined from."""
    mentions: int = 1
    """In how many trajectories (or duplicate hints) it was found; the default rank."""
    score: float = 0.0
    """Extractor's own strength, higher is better (contrast: success rate with − without the template)."""
    lift: float | None = None
    """Measured success with − without it on training tasks; None = not measured."""
    schema: Schema = SCHEMA


class SftExample(Record, frozen=True, kw_only=True):
    """A chat to learn from. It has no hint field, on purpose."""

    id: str
    messages: tuple[Message, ...]
    task_id: str
    trajectory_id: str
    source: str
    """Policy that played it."""
    bucket: str
    schema: Schema = SCHEMA


class EvalEpisode(Record, frozen=True, kw_only=True):
    """One row of the evaluation: a trajectory reduced to what statistics need."""

    policy: str
    seed: int
    task_id: str
    kind: str
    bucket: str
    group: str
    success: bool
    score: float
    steps: int
    invalid: int
    tokens_billed: int
    tokens_computed: int
    tokens_completion: int
    seconds: float
    stop: StopReason
    parts: Parts = msgspec.UNSET
    schema: Schema = SCHEMA

    @classmethod
    def of(cls, t: Trajectory, policy: str, seed: int) -> EvalEpisode:
        """Reduce `t`, played by training seed `seed` of `policy`."""
        return cls(
            policy=policy, seed=seed, task_id=t.task_id, kind=t.kind, bucket=t.bucket, group=t.group, success=t.success,
            score=t.reward, steps=len(t.steps), invalid=t.invalid, tokens_billed=t.usage.billed, seconds=t.seconds,
            tokens_computed=t.usage.computed_tokens, tokens_completion=t.usage.completion_tokens, stop=t.stop,
            parts=t.parts,
        )  # fmt: skip


R = TypeVar("R", bound=Record)


def utf8(text: str) -> str:
    """`text` without lone surrogates: JSON of an endpoint may hold them, no file and no tokenizer takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def digest(*parts: object) -> str:
    """Hex sha256 (first 16 bytes) of the parts' JSON; the project's one way to make ids and keys."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:32]


def seed_of(*parts: object) -> int:
    """A 31-bit seed derived from names (run, task, attempt), never from order."""
    return int(digest("seed", *parts)[:8], 16) & 0x7FFFFFFF


def write_json(path: Path, value: Any) -> None:
    """Pretty, key-sorted JSON, atomically."""
    raw = msgspec.json.encode(value, order="sorted")
    write_atomic(path, msgspec.json.format(raw, indent=2) + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; `DataError` when it is missing or damaged."""
    try:
        return msgspec.json.decode(_read(path))
    except msgspec.DecodeError as e:
        raise DataError(f"{path} is not valid JSON ({e}); delete it and rerun its stage.") from None


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """One record a line, atomically."""
    write_atomic(path, b"".join(msgspec.json.encode(r) + b"\n" for r in records))


def read_jsonl(path: Path, cls: type[R]) -> list[R]:
    """Read records of type `cls`; `DataError` names the file, the line and the reason."""
    out: list[R] = []
    for i, line in enumerate(_read(path).splitlines(), 1):
        try:
            out.append(msgspec.json.decode(line, type=cls))
        except msgspec.DecodeError as e:
            raise DataError(f"{path}:{i} is not a valid {cls.__name__}: {e}.") from None
    return out


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run the stage that writes it (`dvc repro`).") from None
