"""`ragdistill show hints` and `show trajectory ID`: what the stages wrote, readable in a terminal.

Reads files only. Texts of models and environments are untrusted: control characters are shown, never sent.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill, indent, wrap
from typing import TYPE_CHECKING

from ragdistill.errors import ConfigError, DataError
from ragdistill.params import load_params
from ragdistill.records import Hint, Step, Trajectory, read_jsonl
from ragdistill.stages.common import BANK, EVAL, LIFT, ROLLOUTS, TEACH

if TYPE_CHECKING:
    from ragdistill.report.hintuse import HintUse

_SHORT = 8
"""Characters of an id that are shown; `show trajectory` takes any unique beginning."""


def show_hints() -> int:
    """Print the bank, bucket by bucket: each hint's provenance, and what was measured when it was shown."""
    from ragdistill.hints.lift import LiftRow
    from ragdistill.report.figures import by_bucket
    from ragdistill.report.hintuse import hint_use

    params = load_params()
    episodes = (_read(TEACH / "hints.jsonl"), _read(ROLLOUTS), _read(EVAL / "rag-0" / "trajectories.jsonl"))
    path = LIFT / "measured.jsonl"
    measured = read_jsonl(path, LiftRow) if path.exists() else []
    uses = hint_use(read_jsonl(BANK, Hint), *episodes, params.report, measured)
    for bucket, found in by_bucket(uses).items():
        print(printable(bucket))
        for use in found:
            print(_indented(printable(use.hint.text), "  "))
            whole = "; ".join(printable(fact).replace(" ", "\0") for fact in _facts(use))  # a fact stays on one line
            print(_indented(whole, "      ").replace("\0", " "))
        print()
    level = f"{100 * params.report.confidence:g} %"
    print(f"Associations with {level} intervals, not effects: hints of a bucket are mostly shown together.")
    if measured:
        print("alone − none: the hint was the only one shown, on training tasks that were also played without any.")
    return 0


def show_trajectory(beginning: str) -> int:
    """Print the one trajectory whose id begins so; `DataError` where there is none, `ConfigError` where several do."""
    if not beginning:
        raise ConfigError("The id is empty; give at least its first characters, as the report shows them.")
    found = {t.id: (path, t) for path in _files() for t in read_jsonl(path, Trajectory) if t.id.startswith(beginning)}
    if not found:
        raise DataError(f"No trajectory's id begins with {beginning!r}; ids stand in results/report.html.")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} trajectories begin with {beginning!r}; give more of the id.")
    ((path, t),) = found.values()
    print(printable(as_text(t, path)))
    return 0


def as_text(t: Trajectory, path: Path) -> str:
    """A trajectory as people read it; still with whatever characters it holds."""
    outcome = verdict("won" if t.success else "lost", t.reward)
    head = [
        f"{t.id}  ({path})",
        f"{t.policy}, attempt {t.attempt + 1}, {t.kind}, {t.group}",
        f"{outcome} in {len(t.steps)} steps, ended by {t.stop.value}, {t.invalid} refused",
        f"{t.usage.billed:,} tokens billed, {t.usage.computed_tokens:,} computed, {t.seconds:.1f} s",
        *([f"error: {t.error}"] if t.error else []),
        *(f"hint: {hint}" for hint in t.hints),
        "",
        t.first_observation or t.goal,
    ]
    return "\n".join([*head, *("\n" + _step(i, s, text_width()) for i, s in enumerate(t.steps, 1))])


def verdict(word: str, reward: float) -> str:
    """`word`, with the reward beside it where that says more: "lost (reward 0.667)"."""
    worth = round(reward, 3)
    return f"{word} (reward {worth:g})" if 0 < worth < 1 else word


def text_width() -> int:
    """Columns of the terminal, at most 100: longer lines are hard to read."""
    return min(shutil.get_terminal_size((100, 0)).columns, 100)


def printable(text: str) -> str:
    """`text` with every control character but line breaks written out, so that it cannot steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _indented(text: str, margin: str) -> str:
    return fill(text, text_width(), initial_indent=margin, subsequent_indent=margin)


def _step(number: int, step: Step, width: int) -> str:
    lines = [*wrap(step.thought, width - 4), f"> {step.action}" if step.action else "(no action)"]
    lines += [] if step.action else step.reply.splitlines()
    lines += [("" if step.valid else "[refused] ") + step.observation]
    return f"{number:>3} " + indent("\n".join(lines), "    ").lstrip()


def _facts(use: HintUse) -> Iterator[str]:
    hint, lift, alone = use.hint, use.lift, use.alone
    first = f" ({hint.evidence[0][:_SHORT]} …)" if hint.evidence else ""
    yield f"{hint.kind}, {hint.mentions} mentions, evidence of {len(hint.evidence)}{first}"
    for who, shown in (("teacher", use.teacher), ("rag", use.retrieved)):
        if s := shown.success:
            yield f"{who} won {100 * s.value:.0f} % [{100 * s.lo:.0f}–{100 * s.hi:.0f}], n {shown.tasks}"
    if lift:
        yield f"with − without {_points(lift.diff.value, lift.diff.lo, lift.diff.hi, lift.tasks)}"
    if alone:
        yield f"alone − none {_points(alone.diff, alone.lo, alone.hi, alone.tasks)}"


def _points(diff: float, lo: float, hi: float, tasks: int) -> str:
    from ragdistill.report.words import signed

    if lo == hi == 0:
        return f"0 on each task, n {tasks}"
    value, low, high = (signed(100 * v, 0) for v in (diff, lo, hi))
    return f"{value} points [{low}, {high}], n {tasks}"


def _files() -> list[Path]:
    """Every file of trajectories that the stages wrote here."""
    lift = LIFT / "trajectories.jsonl"
    found = [ROLLOUTS, lift, *sorted(TEACH.glob("*.jsonl")), *sorted(EVAL.glob("*/trajectories.jsonl"))]
    found = [path for path in found if path.exists()]
    if not found:
        raise DataError(f"{ROLLOUTS} does not exist; run the stage that writes it (`dvc repro`).")
    return found


def _read(path: Path) -> list[Trajectory]:
    return read_jsonl(path, Trajectory) if path.exists() else []
