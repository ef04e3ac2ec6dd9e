"""Hints by a language model: it reads a failure, beside a success of the same type in pairwise mode, and writes hints.

What comes back is untrusted: read strictly, repaired once by the model itself, then quarantined hint by hint with a
reason (`quarantine`). Calls run at once and are journaled (`ask`). Knows no engine; the order of the input does not
matter. Source: arXiv 2510.01375 §3 (single mode); pairs of failure and success as in its successors.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from ragdistill.errors import DataError, EmptyResultError, EnvironmentFault, designed
from ragdistill.hints.ask import Asker, read_object
from ragdistill.hints.prompts import render
from ragdistill.hints.quarantine import Ground, concrete_names, objection, survey
from ragdistill.hints.transcript import clip, transcript
from ragdistill.hints.views import hint_id
from ragdistill.llm import Sampling
from ragdistill.params import HintsParams
from ragdistill.records import Hint, Message, Record, StopReason, Trajectory, Usage, seed_of

FORM = '{"hints": ["…"]}'
_QUOTED = 2000
"""Characters of a bad reply that go back to the model, or into the quarantine file."""


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """A reply as it must be."""

    hints: list[str]


class Case(Record, frozen=True, kw_only=True):
    """One call: a failure, and the success it is compared with in pairwise mode."""

    failure: Trajectory
    success: Trajectory | None = None


class Quarantined(Record, frozen=True, kw_only=True):
    """One hint, or one whole reply, that was not let in."""

    bucket: str
    evidence: tuple[str, ...]
    """Ids of the trajectories that were read."""
    text: str
    reason: str


class Extraction(Record, frozen=True, kw_only=True):
    """What one extraction did; a function of its inputs, whether its calls were paid now or replayed."""

    model: str
    """Fingerprint."""
    mode: str
    cases: int
    paired: int
    """Cases that had a success to compare with."""
    repaired: int
    """Replies that were usable at the second attempt only."""
    unusable: int
    """Cases without any usable reply."""
    proposed: int
    """Hints in usable replies."""
    usage: Usage


class Extracted(msgspec.Struct, frozen=True):
    """Hints for `bank.build_bank`, what was kept out, and the account."""

    hints: list[Hint]
    quarantined: list[Quarantined]
    account: Extraction


class _Read(msgspec.Struct, frozen=True):
    texts: list[str]
    attempts: int
    trouble: str = ""
    reply: str = ""


def cases_of(trajectories: Iterable[Trajectory], mode: str, per_bucket: int) -> list[Case]:
    """The failures to read: at most `per_bucket` a bucket, each of another task as far as there are.

    In pairwise mode a failure stands beside a success at the same task, else the bucket's shortest, else alone.
    Raises `EmptyResultError` when nothing failed.
    """
    failures: dict[str, dict[str, list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    wins: dict[str, list[Trajectory]] = defaultdict(list)
    for t in sorted(trajectories, key=lambda t: (t.bucket, t.task_id, t.attempt, t.id)):
        if t.stop is not StopReason.INFRA_ERROR:
            wins[t.bucket].append(t) if t.success else failures[t.bucket][t.task_id].append(t)
    cases: list[Case] = []
    for bucket, tasks in failures.items():
        rounds = [(i, t) for attempts in tasks.values() for i, t in enumerate(attempts)]
        for _, t in sorted(rounds, key=lambda r: (r[0], r[1].task_id))[:per_bucket]:
            partner = min(wins[bucket], key=lambda w: (w.task_id != t.task_id, len(w.steps), w.id), default=None)
            cases.append(Case(failure=t, success=partner if mode == "pairwise" else None))
    if not cases:
        raise EmptyResultError("No rollout failed, so there is nothing to write hints about; give harder tasks.")
    return cases


def schema(most: int) -> str:
    """The form of a reply as JSON schema, only with what constrained decoders know; all else is checked here."""
    array = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": most}
    form = {"type": "object", "properties": {"hints": array}, "required": ["hints"], "additionalProperties": False}
    return json.dumps(form)


async def extract(trajectories: Sequence[Trajectory], asker: Asker, params: HintsParams, seed: int) -> Extracted:
    """Ask about every case and check every hint.

    Raises `EmptyResultError` without failures, and, once all other calls are journaled, `EnvironmentFault` when one
    could not be answered; another designed error of the model (a spent budget) is raised at once as itself.
    """
    cases = cases_of(trajectories, params.llm.mode, params.llm.cases)
    ground = survey(trajectories)
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(_read_or_fault(case, asker, params, seed)) for case in cases]
    except ExceptionGroup as failed:
        if error := designed(failed):
            raise error from None
        raise
    reads = [task.result() for task in running]
    faults = [r for r in reads if isinstance(r, EnvironmentFault)]
    if faults:
        raise EnvironmentFault(
            f"{len(faults)} of {len(cases)} calls for hints failed ({faults[0]}); fix the cause and run again, "
            "finished calls are kept."
        )
    done = [(c, r) for c, r in zip(cases, reads, strict=True) if isinstance(r, _Read)]
    hints: list[Hint] = []
    quarantined: list[Quarantined] = []
    for case, read in done:
        _sort_out(case, read, params, ground, hints, quarantined)
    return Extracted(hints, quarantined, _account(cases, [r for _, r in done], asker, params))


def _account(cases: Sequence[Case], reads: Sequence[_Read], asker: Asker, params: HintsParams) -> Extraction:
    return Extraction(
        model=asker.model.fingerprint(),
        mode=params.llm.mode,
        cases=len(cases),
        paired=sum(c.success is not None for c in cases),
        repaired=sum(r.attempts == 2 and not r.trouble for r in reads),
        unusable=sum(bool(r.trouble) for r in reads),
        proposed=sum(len(r.texts) for r in reads),
        usage=asker.usage,
    )


async def _read_or_fault(case: Case, asker: Asker, params: HintsParams, seed: int) -> _Read | EnvironmentFault:
    """A fault of one call must not cancel the others, which may be paid already."""
    try:
        return await _read(case, asker, params, seed)
    except EnvironmentFault as e:
        return e


async def _read(case: Case, asker: Asker, params: HintsParams, seed: int) -> _Read:
    """Ask once, and once more if the reply was of another form."""
    chat = prompt(case, asker, params)
    if chat is None:
        return _Read([], 0, "its records do not fit into hints.llm.context_tokens")
    sampling = Sampling(
        temperature=params.llm.temperature, max_tokens=params.llm.max_reply_tokens,
        schema=schema(params.llm.max_hints), seed=seed_of("hints", seed, case.failure.id),
    )  # fmt: skip
    reply, trouble = None, ""
    for attempt in (1, 2):
        reply = await asker.ask(chat, sampling)
        try:
            return _Read(_usable(reply.text, reply.finish), attempt)
        except DataError as e:
            trouble = str(e)
        text = "" if reply.finish == "error" else clip(reply.text, _QUOTED)
        said = Message(role="assistant", content=text or "(nothing)")
        wish = Message(role="user", content=render("repair", reason=clip(trouble, 300), form=FORM))
        chat = [*chat, said, wish]
    return _Read([], 2, trouble, reply.text if reply else "")


def prompt(case: Case, asker: Asker, params: HintsParams) -> list[Message] | None:
    """The chat about one case within the context budget; None when not even the records' frames fit."""

    def chat(failure: str, success: str) -> list[Message]:
        values = {"most": params.llm.max_hints, "max_chars": params.max_chars, "failure": failure}
        text = render("pair", success=success, **values) if case.success else render("single", **values)
        return [Message(role="system", content=render("system")), Message(role="user", content=text)]

    def count(text: str) -> int:
        return asker.model.count_tokens([Message(role="user", content=text)])

    # room for the reply, and for it to come back with a repair
    room = params.llm.context_tokens - 2 * params.llm.max_reply_tokens - asker.model.count_tokens(chat("", ""))
    share = room // 2 if case.success else room
    failure = transcript(case.failure, share, count)
    success = transcript(case.success, share, count) if case.success else ""
    return None if failure is None or success is None else chat(failure, success)


def _usable(text: str, finish: str) -> list[str]:
    if finish == "context":
        raise DataError("it had no room: the prompt filled the model's context")
    if finish == "error":  # refused, empty or cut short by a server; the text says why
        raise DataError(f"it could not be given ({text[:200]})")
    hints = read_object(text, Answer).hints
    if not hints:
        raise DataError("it held no hint")
    return hints


def _sort_out(
    case: Case, read: _Read, params: HintsParams, ground: Ground, hints: list[Hint], quarantined: list[Quarantined]
) -> None:
    """Append what `read` gave to `hints` or to `quarantined`."""
    episodes = [t for t in (case.failure, case.success) if t]
    evidence, bucket = tuple(t.id for t in episodes), case.failure.bucket

    def refuse(text: str, reason: str) -> None:
        quarantined.append(Quarantined(bucket=bucket, evidence=evidence, text=text[:_QUOTED], reason=reason))

    if read.trouble:
        refuse(read.reply, f"unusable reply: {read.trouble}")
    names = concrete_names(episodes, ground)
    for i, given in enumerate(read.texts):
        text = given.strip()
        reason = objection(text, params.max_chars, names, ground)
        if i >= params.llm.max_hints:
            reason = f"beyond {params.llm.max_hints} hints of one reply"
        if reason:
            refuse(given, reason)
        else:
            hints.append(Hint(id=hint_id(bucket, text), bucket=bucket, text=text, kind="llm", evidence=evidence))
