"""`ragdistill export`: a student as adapter, merged weights and GGUF, proved to be one model, with a model card."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ragdistill import progress
from ragdistill.commands.play import ALIASES, resolve
from ragdistill.errors import ConfigError
from ragdistill.files import tree_sha256
from ragdistill.journal import cache_dir
from ragdistill.llm import ChatModel, cpu_env, engine_of
from ragdistill.llm.weights import BASE_IDENTITY, adapter_fingerprint, model_fingerprint
from ragdistill.params import Params, load_params
from ragdistill.records import Message, SftExample, StopReason, Trajectory, read_json, read_jsonl
from ragdistill.stages.common import (
    BANK,
    ENGINE,
    EVAL,
    RAW,
    RESULTS,
    ROLLOUTS,
    SFT,
    STUDENTS,
    TASKS,
    TEACH,
    quiet_libraries,
)
from ragdistill.stages.defaults import student_name
from ragdistill.stages.playing import open_model
from ragdistill.stages.strip import TAUGHT

EXPORTS = Path("exports")
_ROUNDING = 1e-4
"""Of a share in `results/metrics.json`."""


def export(student: str, out: Path | None, chats: int, dtype: str, quantisation: str, agreement: float) -> int:
    """Export `student` (champion, challenger or an adapter directory) to `out`, and print the comparisons.

    Raises `IdentityError` when two of its forms differ: then nothing is written.
    """
    params, started = load_params(), time.monotonic()
    quiet_libraries()
    cpu_env.apply()
    base, adapter = student_dirs(params, student)
    run = run_of(adapter)
    name = f"{student_name(params)}-{student}" if student in ALIASES else adapter.name
    dest = out or EXPORTS / name
    from ragdistill.serving.card import Facts, model_card
    from ragdistill.serving.export import Options, Student, export_student
    from ragdistill.serving.parity import Row, as_markdown

    served: list[tuple[str, Any]] = []

    def serve() -> ChatModel:
        model = open_model(params, base, adapter)
        served.append((model.fingerprint(), to_builtins(engine_of(model))))
        return model

    def card(rows: Sequence[Row], no_gguf: str) -> str:
        found = _facts(params, base, adapter, run, *served[-1])
        return model_card(Facts(name=name, rows=rows, no_gguf=no_gguf, quantisation=quantisation, **found))

    options = Options(dtype=dtype, quantisation=quantisation, agreement=agreement)  # type: ignore[arg-type]
    wanted = Student(name=name, base=base, adapter=adapter)
    with progress.display("export"):
        rows, no_gguf = export_student(wanted, dest, options, _chats(run, chats), serve, cache_dir("gguf"), card)
    print(as_markdown(rows))
    took = progress.duration(time.monotonic() - started)
    print(f"\n{name}: one model in every form, in {dest} ({took})" + (f"\nno GGUF file: {no_gguf}" if no_gguf else ""))
    return 0


def student_dirs(params: Params, student: str) -> tuple[Path, Path]:
    """Directories of base and adapter; `ConfigError` when `student` names neither an alias nor an adapter."""
    if student not in ALIASES and not (Path(student) / BASE_IDENTITY).is_file():
        raise ConfigError(
            f"{student} is no student; name champion, challenger or an adapter such as models/students/distilled-0."
        )
    base, adapter = resolve(params, *((student, None) if student in ALIASES else ("base", Path(student))))
    if adapter is None:
        raise ConfigError(f"{student} has no adapter; name champion, challenger or an adapter directory.")
    return base, adapter


def run_of(adapter: Path) -> str:
    """Variant and seed of the project's student that has these very weights; empty when none has."""
    wanted = adapter_fingerprint(adapter)
    known = sorted(p.parent for p in STUDENTS.glob(f"*/{BASE_IDENTITY}"))
    return next((p.name for p in known if adapter_fingerprint(p) == wanted), "")


def _chats(run: str, count: int) -> list[tuple[Message, ...]]:
    """Chats of real games: what this student learned from, or else what any did."""
    own = SFT / f"{run.rpartition('-')[0]}.jsonl"
    path = own if own.is_file() else SFT / "distilled.jsonl"
    return [e.messages for e in read_jsonl(path, SftExample)[:count]]


def _facts(params: Params, base: Path, adapter: Path, run: str, served: str, engine: Any) -> dict[str, Any]:
    """What the card says of origin and quality. Metrics and data are stated only of a student of these very files."""
    from ragdistill.serving.card import licence_of

    training = adapter / "training.json"
    prints = {
        "base fingerprint": model_fingerprint(base),
        "adapter fingerprint": adapter_fingerprint(adapter),
        "served fingerprint": served,
    }
    found: dict[str, Any] = {
        "base": params.model.base if params.model.base.count("/") < 2 else Path(params.model.base).name,
        "coldstart": params.coldstart.enabled, "licence": licence_of(base, RAW), "fingerprints": prints,
        "training": read_json(training) if training.is_file() else {}, "run": run, "data": {},
    }  # fmt: skip
    if not run:
        return found | {"measured": "this student is none of the project's present ones, so their numbers are not its."}
    inputs = {"tasks": TASKS, "hints": BANK.parent, "training": SFT, "evaluation": EVAL / run}
    found["data"] = {name: tree_sha256(path) for name, path in inputs.items() if path.is_dir()}
    found["hints"] = dict(Counter(_hints(run.rpartition("-")[0])).most_common())
    return found | _metrics(run, served, engine)


def _metrics(run: str, served: str, engine: Any) -> dict[str, Any]:
    """The metrics of `run`, if they are those of its episodes and these of its present weights, and how measured."""
    folder, file = EVAL / run, RESULTS / "metrics.json"
    episodes = folder / "trajectories.jsonl"
    if not episodes.is_file() or not file.is_file():
        return {"measured": "it was not evaluated here."}
    variant, _, seed = run.rpartition("-")
    played, metrics = list(read_jsonl(episodes, Trajectory)), read_json(file)
    won = [t.success for t in played if t.stop is not StopReason.INFRA_ERROR]
    stated = metrics["policies"].get(variant, {}).get("by_seed", {}).get(seed)
    if not won or stated is None or abs(stated - sum(won) / len(won)) > _ROUNDING:
        return {"measured": f"{file} is not of its present evaluation; run `dvc repro report` first."}
    if {t.model for t in played} == {served}:
        return {"metrics": metrics, "measured": "Measured with the weights and engine of this export."}
    if read_json(folder / ENGINE) == engine:
        return {"measured": "it was trained again since its evaluation; run `dvc repro` first."}
    return {"metrics": metrics, "measured": "Measured with another engine or build than this export's."}


def _hints(variant: str) -> Iterator[str]:
    """Each hint text, once a training game that it was shown in."""
    source = TEACH / f"{TAUGHT.get(variant) or ''}.jsonl"
    files = [path for path in (source, ROLLOUTS) if path.is_file()]
    shown = {t.id: t.hints for path in files for t in read_jsonl(path, Trajectory)}
    for example in read_jsonl(SFT / f"{variant}.jsonl", SftExample):
        yield from shown.get(example.trajectory_id, ())
