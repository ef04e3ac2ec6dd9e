"""Trajectories that were won, or scored enough (`strip.min_score`) → chats to learn from, without the hints shown.

Hints are never rendered (the field is emptied before rendering), and the result is proved: a scan of the thoughts for
references to hints, and `assert_hint_free` over the finished chats. A thought such as "clean it with the sinkbasin"
*is* the skill; overlap with the hints is measured, not deleted. Knows no chat format: the agent renders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from ragdistill.agents.hint_block import HEADER
from ragdistill.errors import DataError, EmptyResultError
from ragdistill.hints.templates import (
    ENTITY,
    OBJECT,
    PLACEHOLDER,
    ROLES,
    TARGET,
    Roles,
    entity_names,
    lift,
    normalise,
    placeholders,
    roles_of,
)  # fmt: skip
from ragdistill.params import StripParams
from ragdistill.records import Message, Record, SftExample, StopReason, Trajectory, digest

Render = Callable[[Trajectory], tuple[Message, ...]]
"""The agent room's rendering of an episode from its fields (thought, action, observation)."""

_REFERENCE = re.compile(r"\b(hint(?:s|ed|ing)?|tips?|advice|advised)\b", re.IGNORECASE)


class StripReport(Record, frozen=True, kw_only=True):
    """What went in, what came out, and how much of the hints lives on in the behaviour."""

    trajectories: int
    kept: int
    """Examples written, one a trajectory."""
    dropped: dict[str, int]
    """Trajectories left out, per reason."""
    thoughts: int
    """Non-empty thoughts in the kept trajectories, before dropping."""
    thoughts_dropped: int
    state_dropped: int
    """Fields of the stated state that were dropped for the same reason as a thought."""
    placeholder_actions: int
    """Actions with a verbatim `{placeholder}`; kept, since no turn is ever dropped."""
    per_bucket: dict[str, int]
    hinted: int
    """Examples whose episode was played with hints; the shares below are over these (None if there are none)."""
    instantiating: float | None
    """Share whose accepted actions instantiate a command that stands in a hint and names a tool (`{sinkbasin}`).

    Over the examples whose hints name one: "go to {place}" or "move {object} to {target}" is done without any hint.
    """
    trigrams_in_thoughts: float | None
    """Mean share of the hints' word 3-grams (object and target filled in) that occur in the thoughts."""
    trigrams_in_actions: float | None


def strip(
    trajectories: Iterable[Trajectory], params: StripParams, render: Render
) -> tuple[list[SftExample], StripReport]:
    """Filter, render without hints, prove it. The order of the input does not matter.

    Raises `EmptyResultError` when nothing is left, `DataError` when a rendered chat holds a hint or a dropped thought.
    """
    by_score = params.min_score is not None
    all_of = sorted(trajectories, key=lambda t: (t.task_id, -t.reward if by_score else 0.0, len(t.steps), t.id))
    names = entity_names(all_of)
    dropped: Counter[str] = Counter()
    kept: list[tuple[Trajectory, Trajectory]] = []
    taken: Counter[str] = Counter()
    for t in all_of:
        clean = _drop_thoughts(t)
        reason = _reason(t, clean, params, taken[t.task_id])
        if reason:
            dropped[reason] += 1
            continue
        taken[t.task_id] += 1
        kept.append((t, clean))
    if not kept:
        raise EmptyResultError(
            f"None of {len(all_of)} trajectories is fit to learn from ({dict(dropped)}); "
            "raise teach.attempts, or loosen strip.max_invalid or strip.min_score."
        )
    examples = [_example(t, clean, render) for t, clean in kept]
    assert_hint_free(examples, {h for t in all_of for h in t.hints})
    return examples, _report(len(all_of), kept, dropped, names)


def _reason(t: Trajectory, clean: Trajectory, params: StripParams, taken: int) -> str:
    """Why `t` is left out; empty when it is kept."""
    if t.stop is StopReason.INFRA_ERROR:
        return "infra_error"
    if not t.success and params.min_score is None:
        return "no_success"
    if not t.success and (t.stop is not StopReason.FAILURE or t.reward < (params.min_score or 0.0)):
        return "low_score"  # also of an episode that was cut off: what it earned on the way is no result
    if params.max_invalid is not None and t.invalid > params.max_invalid:
        return "too_many_invalid"
    if params.on_hint_reference == "drop_trajectory" and clean.steps != t.steps:
        return "hint_reference"
    return "more_than_per_task" if taken >= params.per_task else ""


def refers_to_hint(thought: str, hints: Sequence[str], seen: str = "") -> bool:
    """Whether `thought` quotes a hint, holds a verbatim placeholder, or speaks of hints or tips.

    `seen` is the environment's text so far: a word it uses itself ("felt tip pen") is no reference.
    """
    said = normalise(thought)
    if PLACEHOLDER.search(said) or any(normalise(h) in said for h in hints if h.strip()):
        return True
    if not (found := _REFERENCE.findall(said)):
        return False
    return not set(found) <= set(re.findall(r"\w+", seen.lower()))


def _drop_thoughts(t: Trajectory) -> Trajectory:
    """Drop thoughts and stated fields that refer to hints; their turns stay. The verbatim reply goes with them."""
    seen, steps = f"{t.goal} {t.first_observation}", []
    for s in t.steps:
        thought = "" if refers_to_hint(s.thought, t.hints, seen) else s.thought
        state = {k: v for k, v in s.state.items() if not refers_to_hint(f"{k}: {v}", t.hints, seen)}
        kept = thought == s.thought and state == s.state
        steps.append(s if kept else msgspec.structs.replace(s, thought=thought, state=state, reply=""))
        seen = f"{seen} {s.observation}"
    return msgspec.structs.replace(t, steps=tuple(steps))


def _example(t: Trajectory, clean: Trajectory, render: Render) -> SftExample:
    messages = render(msgspec.structs.replace(clean, hints=(), hint_ids=()))
    said = [m.content for m in messages if m.role == "assistant"]
    own = [part for s in clean.steps for part in (s.thought, s.action, *s.state.values())]
    told = [part for s in t.steps for part in (s.thought, *s.state.values())]
    gone = [part for part in told if not any(part in kept for kept in own)]
    if any(not text.strip() for text in said) or any(g in text for g in gone for text in said):
        raise DataError(
            f"Trajectory {t.id}: the agent renders replies verbatim, so a dropped thought shows or leaves an empty "
            "turn; render training chats from thought and action."
        )
    return SftExample(
        id=digest("sft", t.id), messages=tuple(messages), task_id=t.task_id, trajectory_id=t.id, source=t.policy,
        bucket=t.bucket,
    )  # fmt: skip


def assert_hint_free(examples: Iterable[SftExample], hint_texts: Iterable[str]) -> None:
    """Prove that no message holds a hint's text or the hint block's header (case and spacing aside).

    Raises `DataError` naming the example and the hint.
    """
    needles = sorted({normalise(h) for h in hint_texts if h.strip()} | {normalise(HEADER)})
    for e in examples:
        for m in e.messages:
            content = normalise(m.content)
            for needle in needles:
                if needle in content:
                    raise DataError(
                        f"Example {e.id} (trajectory {e.trajectory_id}) shows the hint {needle!r}; "
                        "render training chats without hints and run strip again."
                    )


def _report(
    total: int, kept: Sequence[tuple[Trajectory, Trajectory]], dropped: Counter[str], names: frozenset[str]
) -> StripReport:
    played = [t for t, _ in kept]
    overlaps = [_overlap(t, roles_of(t, names)) for t in played if t.hints]
    before, after = (sum(bool(s.thought) for pair in kept for s in pair[i].steps) for i in (0, 1))
    stated, left = (sum(len(s.state) for pair in kept for s in pair[i].steps) for i in (0, 1))
    return StripReport(
        trajectories=total,
        kept=len(kept),
        dropped=dict(sorted(dropped.items())),
        thoughts=before,
        thoughts_dropped=before - after,
        state_dropped=stated - left,
        placeholder_actions=sum(bool(PLACEHOLDER.search(s.action.lower())) for t in played for s in t.steps),
        per_bucket=dict(sorted(Counter(t.bucket for t in played).items())),
        hinted=len(overlaps),
        instantiating=_mean([o[0] for o in overlaps]),
        trigrams_in_thoughts=_mean([o[1] for o in overlaps]),
        trigrams_in_actions=_mean([o[2] for o in overlaps]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _overlap(t: Trajectory, roles: Roles) -> tuple[float | None, float, float]:
    """(an action instantiates a hint's command, share of hint 3-grams in thoughts, … in actions)."""
    played = {lift(s.action, roles).template for s in t.steps if s.valid and s.action}
    commands = {p for p in played if set(placeholders(p)) - ROLES}
    texts = [normalise(h) for h in t.hints]
    used = any(re.search(rf"(?<!\w){re.escape(p)}", h) for p in commands for h in texts)
    named = any(set(placeholders(h)) - ROLES for h in texts)
    fill_in = {OBJECT: roles.object or OBJECT, TARGET: min(roles.targets, default=TARGET)}
    wanted = _trigrams([PLACEHOLDER.sub(lambda m: fill_in.get(m[0], m[0]), h) for h in texts])
    thoughts, actions = _trigrams([s.thought for s in t.steps]), _trigrams([s.action for s in t.steps])
    return float(used) if named else None, _part(wanted, thoughts), _part(wanted, actions)


def _part(wanted: set[tuple[str, ...]], found: set[tuple[str, ...]]) -> float:
    return len(wanted & found) / len(wanted) if wanted else 0.0


def _trigrams(texts: Sequence[str]) -> set[tuple[str, ...]]:
    """Word 3-grams with object numbers left out, so that "sinkbasin 2" meets "{sinkbasin}"."""
    grams: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"[a-z]+", ENTITY.sub(r"\1", normalise(text)))
        grams.update(zip(words, words[1:], words[2:], strict=False))
    return grams
