"""The model card of an exported student: README.md in Hugging Face's format.

Hints, names and what a base's own card states are untrusted text: they are escaped, so that they become neither
Markdown nor HTML. This module reads no file but the identity of models and the head of their cards.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ragdistill.llm.weights import IDENTITY, model_fingerprint
from ragdistill.records import read_json
from ragdistill.report.metrics import order_pairs
from ragdistill.report.table import p_value, percent, points
from ragdistill.serving.parity import Row, as_markdown

UNKNOWN_LICENCE = "unknown"
_LONGEST = 100
"""Characters of anything that a base's card states."""
_LARGEST_CARD = 1 << 20
"""Bytes of a base's card that is read."""


class Licence(NamedTuple):
    """A licence as the hub's cards state it."""

    id: str = UNKNOWN_LICENCE
    """`apache-2.0`, or `other` for one that only `name` and `link` tell."""
    name: str = ""
    link: str = ""

    def words(self) -> str:
        """`other (qwen-research, https://…)`."""
        more = ", ".join(filter(None, self[1:]))
        return f"{self.id} ({more})" if more else self.id


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the card says."""

    name: str
    base: str
    """As `model.base` names it."""
    coldstart: bool
    licence: Licence
    fingerprints: Mapping[str, str]
    """What (base, adapter, served) → hash of its content."""
    data: Mapping[str, str]
    """Input of the training → sha256."""
    training: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, int] = field(default_factory=dict)
    """Text → number of training games it was shown in."""
    run: str = ""
    """Variant and seed of the student in this project; empty when it is none of its students."""
    metrics: Mapping[str, Any] | None = None
    """`results/metrics.json`; None when it does not speak of this student."""
    measured: str = ""
    """Which weights and engine the metrics were measured with."""
    rows: Sequence[Row] = ()
    no_gguf: str = ""
    quantisation: str = "f16"


def licence_of(*models: Path) -> Licence:
    """Licence that the first of `models` states; a cold-started base has that of what it came from among the others."""
    prints = [(model_fingerprint(m), m) for m in models if m.is_dir()]
    wanted, seen = model_fingerprint(models[0]), set[str]()
    while wanted not in seen:
        seen.add(wanted)
        for place in [m for known, m in prints if known == wanted]:
            identity = read_json(place / IDENTITY) if (place / IDENTITY).is_file() else {}
            found = Licence(str(identity["licence"])) if "licence" in identity else _own_licence(place / "README.md")
            if found.id != UNKNOWN_LICENCE:
                return found
            wanted = str(identity.get("base", wanted))
    return Licence()


def _own_licence(card: Path) -> Licence:
    """What the head of a model's card states: each one short line; of links those that lead somewhere from anywhere."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        head = (card.stat().st_size <= _LARGEST_CARD and metadata_load(card)) or {}
    except (OSError, ValueError, RecursionError, YAMLError):  # none, or not as the hub wants it
        head = {}
    id, name, link = (_line(head.get(key)) for key in ("license", "license_name", "license_link"))
    return Licence(id, name, link if link.startswith(("https://", "http://")) else "") if id else Licence()


def _line(value: object) -> str:
    """A text of a card on one line; empty for anything else, and for what is longer than a name or a link."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if text.isprintable() and len(text) <= _LONGEST else ""


def escape(text: object) -> str:
    """`text` on one line, without meaning as Markdown or HTML."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()|~])", r"\\\1", html.escape(flat, quote=False))


def model_card(facts: Facts) -> str:
    """The card as text: YAML for the hub, then what a person needs to use and judge the model."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    env.filters["text"] = escape
    metrics = facts.metrics
    alone = not metrics or len(metrics["seeds"]) < 2
    policy = facts.run.rpartition("-")[0]
    pairs = [p for p in order_pairs(metrics["paired"]) if p.startswith(f"{policy}-")] if metrics else []
    return env.get_template("card.md.j2").render(
        f=facts,
        header=_header(facts, policy),
        policy=policy,
        policies=[p for p in ("base", "rag", policy) if metrics and p in metrics["policies"]],
        pairs=pairs,
        alone=alone,
        own={} if metrics is None else _own(metrics, facts.run),
        own_primary={} if metrics is None else _own(metrics["primary"], facts.run),
        percent=percent,
        points=points,
        p_value=p_value,
        parity=as_markdown(facts.rows),
    )


def _own(metrics: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Success of `run` alone and its n, where `metrics` hold the mean over trainings beside it; {} without."""
    policy, _, seed = run.rpartition("-")
    row = metrics["policies"].get(policy, {})
    return {"success": row["by_seed"][seed], "n": row["n"]} if seed in row.get("by_seed", {}) else {}


def _header(facts: Facts, policy: str) -> str:
    """The YAML block; huggingface_hub knows the format."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    if facts.metrics and policy in facts.metrics["policies"]:
        m = facts.metrics
        row = _own(m, facts.run)
        results = [
            EvalResult(
                task_type="text-generation", dataset_type=m["env"], dataset_name=f"{m['env']} ({m['split']})",
                metric_type="success", metric_value=row["success"], metric_name=f"success rate, n = {row['n']}",
            )
        ]  # fmt: skip
    licence = facts.licence if facts.licence.id != UNKNOWN_LICENCE else None
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", facts.base)
    data = ModelCardData(
        license=licence and licence.id.lower(), license_name=(licence and licence.name) or None,
        license_link=(licence and licence.link) or None,
        library_name="transformers", pipeline_tag="text-generation", model_name=facts.name,
        base_model=facts.base.split("@")[0] if hub else None, tags=["agent", "lora", "ragdistill"],
        eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml()
