"""One self-contained HTML page: answer, figures, tables, hints, a browser of played games, method.

No network. Every text that a model, an environment or a file wrote is escaped by the template engine, or stands as
JSON data that the page's one script (named by its hash in the content security policy) shows as text, never as HTML.
Knows how numbers are worded and placed, not how they are computed (`metrics`, `hintuse`, `payback`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ragdistill.files import write_atomic
from ragdistill.hints.lift import LiftRow
from ragdistill.llm.ledger import Spent
from ragdistill.params import ReportParams
from ragdistill.progress import duration
from ragdistill.records import EvalEpisode, Hint, Trajectory
from ragdistill.report import figures, words
from ragdistill.report.browser import GameSet, browser_data, pick_games, script_json, training_sources
from ragdistill.report.csvs import LossPoint
from ragdistill.report.hintuse import hint_use
from ragdistill.report.metrics import has_scores, order, order_pairs
from ragdistill.report.paper import Comparison
from ragdistill.report.payback import paybacks
from ragdistill.report.table import difference, part_names, task_sets
from ragdistill.timing import Timing

_HINTS, _ROOMS, _EVIDENCE = 4, 12, 24
"""Unfolded: hints a bucket, rooms. Evidence links a hint; the rest is counted."""


@dataclass(frozen=True)
class Page:
    """What the page is made of; only `metrics` is necessary."""

    metrics: Mapping[str, Any]
    hints: Sequence[Hint] = ()
    measured: Sequence[LiftRow] = ()
    """What hints do alone, where that was played."""
    trajectories: Mapping[str, Sequence[Trajectory]] = field(default_factory=dict)
    """Policy → its trajectories, of one training seed."""
    rollouts: Sequence[Trajectory] = ()
    """The base agent's attempts on training tasks."""
    taught: Sequence[Trajectory] = ()
    """The hinted teacher's attempts on training tasks."""
    episodes: Sequence[EvalEpisode] = ()
    """All evaluation episodes; the payback is computed from them."""
    losses: Mapping[str, Sequence[LossPoint]] = field(default_factory=dict)
    """Adapter → its curve."""
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Adapter → its training.json."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Training variant → what stripping kept and dropped."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """`rollouts` and `teach` → sampling temperature."""
    timings: Mapping[str, Timing] = field(default_factory=dict)
    """Stage → wall time."""
    spending: Sequence[Spent] = ()
    """What calls to served models have cost."""
    engines: Mapping[str, str] = field(default_factory=dict)
    """Policy and seed → engine, precision and device that played it."""
    at_once: int | None = None
    """Most episodes that were played at the same time."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Name → fingerprint or version."""
    coldstart: bool = True
    """Whether the base model learned the interface first, with the skill under test withheld."""
    group: str = "room"
    """What tasks of one group share, in the environment's word."""
    paper: Comparison | None = None
    """The paper's own numbers, where these are of its environment, split and model."""
    bootstrap: int = 4000
    """Resamples of the intervals that the page computes itself."""


def write_page(path: Path, page: Page) -> None:
    """Render `page` and write it atomically."""
    write_atomic(path, render(page).encode())


def render(page: Page) -> str:
    """The whole page as HTML."""
    here, m = Path(__file__).parent, page.metrics
    env = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"count": words.count, "points": lambda share, digits=1: words.signed(100 * share, digits)}
    script = (here / "page.js").read_text(encoding="utf-8")
    params = ReportParams(bootstrap=page.bootstrap, confidence=m["confidence"])
    uses = hint_use(page.hints, page.taught, page.rollouts, page.trajectories.get("rag", ()), params, page.measured)
    student = next((t for n, t in page.trainings.items() if n.startswith("distilled-")), {})
    costs = paybacks(page.rollouts, page.taught, student, page.episodes, params)
    room_names, rooms = figures.room_table(m)
    data = browser_data(game_sets(page))
    return env.get_template("page.html.j2").render(
        page=page,
        m=m,
        level=f"{100 * m['confidence']:g} %",
        policies=order(m["policies"]),
        pairs=order_pairs(m["paired"]),
        describe=words.DESCRIPTIONS,
        kind_name=words.kind_name,
        answer=words.answer(m),
        facts=words.facts(m, costs),
        infra=sum(p["infra"] for p in m["policies"].values()),
        success=figures.success_chart(m),
        differences=figures.difference_chart(m),
        **_rewards(m),
        kinds=figures.kind_charts(m),
        rooms=rooms,
        room_names=room_names,
        rooms_shown=_ROOMS,
        costs=figures.cost_charts(m),
        endings=(endings := figures.endings(page.trajectories)),
        stops=figures.stops(endings),
        paybacks=costs,
        losses=figures.loss_charts(page.losses),
        buckets=figures.by_bucket(uses),
        hints_shown=_HINTS,
        evidence_shown=_EVIDENCE,
        partial=bool({t.task_id for t in page.rollouts} - {t.task_id for t in page.taught}),
        games=pick_games(page.trajectories, m["primary"]["kinds"]),
        sets=data["sets"] if any(s["tasks"] for s in data["sets"]) else [],
        known={e["id"] for s in data["sets"] for e in s["episodes"]},
        trainings={name: figures.scalars(t) for name, t in page.trainings.items()},
        **_circumstances(page),
        data=Markup(script_json(data)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _circumstances(page: Page) -> dict[str, Any]:
    """What played, how long that took, what was paid for it, and what stop reasons mean."""
    times, policies = page.timings.values(), page.metrics["policies"]
    return {
        "stop_words": words.STOPS,
        "paces": [(n, policies[n]) for n in order(policies) if "step_seconds_p50" in policies[n]],
        "engine": words.played_by(page.engines),
        "mixed": words.mixed(page.engines),
        "paid": words.paid(page.spending),
        "times": words.wall_time(page.timings),
        "total": duration(sum(t.best for t in times)),
        "unknown": sum(t.cold is None for t in times),
    }


def _rewards(m: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows beside success, where rewards are more than won or lost, or not all can be earned."""
    scored = has_scores(m)
    return {
        "scored": scored,
        "scores": figures.success_chart(m, "score") if scored else None,
        "score_differences": figures.difference_chart(m, "score") if scored else None,
        "difference_of": difference,
        "part_names": part_names(m.get("parts", {})),
        "feasible": {name: part["policies"] for name, part in task_sets(m).items() if name.startswith("feasible")},
    }


def game_sets(page: Page) -> list[GameSet]:
    """Evaluation games with their policies, then training games with their attempts."""
    evidence = frozenset(e for h in page.hints for e in h.evidence)
    return [
        GameSet("held-out games", {name: page.trajectories[name] for name in order(page.trajectories)}),
        GameSet("training games", training_sources(page.rollouts, page.taught), evidence),
    ]
