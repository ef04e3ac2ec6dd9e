"""The model card of an exported student: README.md in Hugging Face's format.

Hints and names are untrusted text: they are escaped, so that they become neither Markdown nor HTML. This module reads
no file but the identity of models.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ragdistill.llm.weights import IDENTITY, model_fingerprint
from ragdistill.records import read_json
from ragdistill.report.metrics import order_pairs
from ragdistill.report.table import p_value, percent, points
from ragdistill.serving.parity import Row, as_markdown

UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the card says."""

    name: str
    base: str
    """As `model.base` names it."""
    coldstart: bool
    licence: str
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


def licence_of(*models: Path) -> str:
    """Licence that the first of `models` to know its own states; a cold-started base has that of what it came from."""
    known = {model_fingerprint(m): read_json(m / IDENTITY) for m in models if (m / IDENTITY).is_file()}
    found = known.get(model_fingerprint(models[0]), {})
    while "licence" not in found and found.get("base") in known:
        found = known[found["base"]]
    return str(found.get("licence", UNKNOWN_LICENCE))


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
    licence = facts.licence.lower() if facts.licence != UNKNOWN_LICENCE else None
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", facts.base)
    data = ModelCardData(
        license=licence, library_name="transformers", pipeline_tag="text-generation", model_name=facts.name,
        base_model=facts.base.split("@")[0] if hub else None, tags=["agent", "lora", "ragdistill"],
        eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml()
