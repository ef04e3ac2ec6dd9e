"""Write a student for use elsewhere: adapter, merged safetensors, GGUF; nothing is left unless all are the same model.

Everything is written beside its destination, compared (`parity`), described, and only then renamed into place. This
module knows no project: directories, chats and the served model come from its caller.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ragdistill.errors import ConfigError
from ragdistill.files import write_atomic
from ragdistill.llm import ChatModel
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.progress import bar
from ragdistill.records import read_json, write_json
from ragdistill.serving import parity
from ragdistill.serving.parity import Chat, Row

import torch  # isort: skip  (after parity, which prepares the process)

from ragdistill.llm.gguf_export import export_gguf
from ragdistill.llm.weights import BASE_IDENTITY, MAX_CONTEXT, check_adapter, context_of, load_merged, save_merged

REPORT = "parity.json"
"""Also the sign that a directory is an export, which may be replaced."""
ADAPTER, MERGED, GGUF, CARD = "adapter", "merged", "gguf", "README.md"
_ADAPTER_FILES = ("adapter_config.json", BASE_IDENTITY, "training.json", "loss.csv")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Student:
    """What is exported."""

    name: str
    base: Path
    adapter: Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """How it is written, and how alike is alike enough."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the merged weights."""
    quantisation: Literal["f16", "q8_0"] = "f16"
    """Of the GGUF file."""
    agreement: float = 0.98
    """Least share of equal tokens where numbers are rounded."""


def export_student(
    student: Student,
    dest: Path,
    options: Options,
    chats: Sequence[Chat],
    serve: Callable[[], ChatModel],
    cache: Path,
    card: Callable[[Sequence[Row], str], str],
) -> tuple[list[Row], str]:
    """Write `dest` and return the comparisons, and why there is no GGUF file (empty when there is one).

    `serve` opens the engine that answers for the student; it is closed again. `card` makes README.md of the
    comparisons and that reason. `cache` keeps GGUF files. Raises `IdentityError` when two forms differ or the adapter
    belongs to another base, `ConfigError` when `dest` holds something else.
    """
    check_adapter(student.base, student.adapter)
    if dest.exists() and any(dest.iterdir()) and not (dest / REPORT).is_file():
        raise ConfigError(f"{dest} holds something that is no export; name another directory with --out.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.", suffix=".tmp") as tmp:
        out = Path(tmp) / "export"
        _copy_adapter(student.adapter, out / ADAPTER)
        with bar("merging the weights"):
            save_merged(student.base, student.adapter, out / MERGED, student.name)
        with bar("writing GGUF"):
            gguf, missing = _write_gguf(student, out / GGUF, options.quantisation, cache)
        with bar("comparing the forms"):
            rows = _compare(student, out / MERGED, gguf, options, chats, serve)
        parity.require(rows, student.name)
        write_json(out / REPORT, {"rows": rows, "no_gguf": missing})
        write_atomic(out / CARD, card(rows, missing).encode())
        shutil.rmtree(dest, ignore_errors=True)
        out.rename(dest)
    return rows, missing


def _copy_adapter(source: Path, dest: Path) -> None:
    dest.mkdir(parents=True)
    weights = sorted(source.glob("*.safetensors"))
    for path in [*(source / name for name in _ADAPTER_FILES), *weights]:
        if path.is_file():
            shutil.copyfile(path, dest / path.name)


def _write_gguf(student: Student, dest: Path, quantisation: str, cache: Path) -> tuple[Path | None, str]:
    """The GGUF file, or None and why this model has none."""
    from gguf.quants import QuantError

    if not _splits_as_gguf_says(student.base):
        return (
            None,
            "its tokenizer splits text in a way that the file could not state, so that engines would misread it.",
        )
    try:
        made = export_gguf(student.base, student.adapter, cache, quantisation)
    except (ConfigError, QuantError) as e:
        return None, str(e)
    dest.mkdir()
    path = dest / f"{student.name}-{quantisation}.gguf"
    shutil.copyfile(made, path)  # no link: whoever edits the export must not change the cache
    return path, ""


def _splits_as_gguf_says(base: Path) -> bool:
    """Whether text is cut as `export_gguf` writes down: GPT-2's way, digits one by one.

    No comparison here would show it, because they all send token ids.
    """
    path = base / "tokenizer.json"
    cut = (read_json(path).get("pre_tokenizer") if path.is_file() else None) or {}
    *first, last = cut.get("pretokenizers") or [cut]
    digits = all(p["type"] == "Digits" and p["individual_digits"] for p in first)
    return digits and last.get("type") == "ByteLevel" and last.get("use_regex", True)


def _compare(
    student: Student,
    merged_dir: Path,
    gguf: Path | None,
    options: Options,
    chats: Sequence[Chat],
    serve: Callable[[], ChatModel],
) -> list[Row]:
    """Each written form against base + adapter in float32; of such models no more than two are in memory at once."""
    form = ChatFormat(load_tokenizer(student.base))
    at = parity.positions(form, chats, context_of(student.base, MAX_CONTEXT))
    wanted = parity.logits(parity.load_adapted(student.base, student.adapter), at)
    merged: Any = load_merged(merged_dir, None, torch.float32)
    rows = [parity.equal("merged float32 ↔ adapter", parity.logits(merged, at), wanted)]
    if options.dtype != "float32":
        load_merged(merged_dir, None, _DTYPES[options.dtype]).save_pretrained(merged_dir)
        written = parity.logits(load_merged(merged_dir, None, torch.float32), at)
        rows.append(parity.alike(f"merged {options.dtype} ↔ adapter", written, wanted, options.agreement))
    model = serve()
    try:
        what = f"served by {type(model).__name__} ↔ adapter"
        base: Any = load_merged(student.base, None, torch.float32)  # after the engine, whose loading takes as much
        rows.append(parity.served(what, model, form, chats, merged, base, options.agreement))
        del base
    finally:
        model.close()
    if gguf is not None:
        read = parity.logits(parity.load_gguf(gguf), at)
        exact = parity.logits(parity.rounded(merged, options.quantisation), at)  # in place, so it comes last
        rows.append(parity.equal(f"GGUF read back ↔ merged, rounded to {options.quantisation}", read, exact))
        rows.append(parity.alike(f"GGUF {options.quantisation} ↔ adapter", read, wanted, options.agreement))
    return rows
