"""Is it still the same model? Adapter, merged weights, GGUF file and server, compared by numbers on real chats.

Two rules. What claims float32 must give the same logits (`TOLERANCE`). What rounds (bfloat16, float16, an engine) must
choose the same tokens, and must be nearer to the student than to its base, so that an adapter that was silently left
out is found though base and student mostly agree. A server gives no logits: its own greedy replies are scored by the
student's, token by token, so that one early difference does not count for all that follow.
This module knows no engine and no file but the weights it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.errors import DataError, IdentityError
from ragdistill.llm import ChatModel, Sampling, cpu_env
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.records import Message, Record

cpu_env.apply()

import torch  # noqa: E402  (the environment above is read when torch is loaded)

from ragdistill.llm.weights import check_adapter, load_merged  # noqa: E402

TOLERANCE = 1e-3
"""Largest difference of a logit between two float32 computations of the same weights; merging alone makes 1e-4."""
MAX_POSITIONS = 1024
"""Tokens compared; their logits (vocabulary × 4 bytes each) are held in memory."""
MAX_TURNS = 16
"""Replies asked of a server."""
REPLY_TOKENS = 48

Chat = Sequence[Message]


class Row(Record, frozen=True, kw_only=True):
    """One comparison."""

    what: str
    tokens: int
    """Positions compared."""
    max_difference: float
    """Largest |Δlogit|; of a server the most that a chosen token's logit lies below the best one."""
    agreement: float
    """Share of positions with the same most likely token."""
    base_agreement: float | None = None
    """The same with the base in place of the student; None where the logits themselves are compared."""
    rule: str
    ok: bool


class Positions(Record, frozen=True, kw_only=True):
    """One chat as ids, and the places whose next token the model itself has to produce."""

    ids: list[int]
    rows: list[int]
    """Indices into `ids`; the logits there predict the next id."""


def positions(form: ChatFormat, chats: Iterable[Chat], context: int) -> list[Positions]:
    """The assistant tokens of `chats`, at most `MAX_POSITIONS` of them; `DataError` when there are none."""
    found: list[Positions] = []
    left = MAX_POSITIONS
    for chat in chats:
        ids, mask = form.training_ids(chat)
        ids, mask = ids[:context], mask[:context]
        rows = [i - 1 for i, own in enumerate(mask) if own and i > 0][:left]
        if rows:
            found.append(Positions(ids=ids[: rows[-1] + 2], rows=rows))
            left -= len(rows)
    if not found:
        raise DataError("No chat holds an assistant turn to compare models on; name a file of chats with some.")
    return found


def logits(model: Any, at: Sequence[Positions]) -> list[torch.Tensor]:
    """Float32 logits (rows, vocabulary) of each chat."""
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([p.ids]), logits_to_keep=torch.tensor(p.rows), use_cache=False)
            .logits[0].float()
            for p in at
        ]  # fmt: skip


def load_adapted(base_dir: Path, adapter_dir: Path) -> Any:
    """Base and adapter side by side in float32, as they were trained; `IdentityError` for another base's adapter."""
    from peft import PeftModel

    check_adapter(base_dir, adapter_dir)
    return PeftModel.from_pretrained(load_merged(base_dir, None, torch.float32), str(adapter_dir)).eval()


def load_gguf(path: Path) -> Any:
    """A GGUF file's weights in float32, read by transformers (another reader than the engines')."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


def rounded(model: Any, quantisation: str) -> Any:
    """`model` with its matrices rounded as a GGUF file of this quantisation holds them; in place."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[quantisation.upper()]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.from_numpy(dequantize(quantize(parameter.data.numpy(), kind), kind).copy())
    return model


def equal(what: str, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Row:
    """Float32 against float32: the logits are the same."""
    row = _row(what, got, wanted)
    return _ruled(row, f"max difference ≤ {TOLERANCE:g}", row.max_difference <= TOLERANCE)


def alike(what: str, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], least: float) -> Row:
    """Rounded against float32: the same token at a share of at least `least` of the positions."""
    row = _row(what, got, wanted)
    return _ruled(row, f"agreement ≥ {least:g}", row.agreement >= least)


def served(
    what: str, model: ChatModel, form: ChatFormat, chats: Sequence[Chat], student: Any, base: Any, least: float
) -> Row:
    """Greedy replies of `model`, scored by the float32 `student` and, as a control, by its `base`.

    `EnvironmentFault` when the server fails. Raises `DataError` when it said nothing that could be scored.
    """
    at = asyncio.run(_replies(model, form, chats))
    if not at:
        raise DataError(f"{what} answered no chat with text that can be scored; look at the server.")
    chosen = [torch.tensor([p.ids[i + 1] for i in p.rows]) for p in at]
    by_student, deficit = _choices(logits(student, at), chosen)
    by_base, _ = _choices(logits(base, at), chosen)
    count = sum(len(c) for c in chosen)
    row = Row(
        what=what, tokens=count, max_difference=deficit, agreement=by_student / count, base_agreement=by_base / count,
        rule=f"agreement ≥ {least:g} and not below the base's", ok=False,
    )  # fmt: skip
    return _ruled(row, row.rule, row.agreement >= least and by_student >= by_base)


def require(rows: Sequence[Row], what: str) -> None:
    """Raise `IdentityError` that names each comparison of `rows` that failed."""
    bad = [
        f"{r.what}: max difference {r.max_difference:.3g}, agreement {r.agreement:.4f} (rule: {r.rule})"
        for r in rows if not r.ok
    ]  # fmt: skip
    if bad:
        raise IdentityError(f"{what} is not the same model everywhere and was not written: {'; '.join(bad)}.")


def as_markdown(rows: Sequence[Row]) -> str:
    """The comparisons as a table."""
    lines = ["| compared | tokens | max Δ logit | same token | base's | rule | |", "|---|--:|--:|--:|--:|---|---|"]
    for r in rows:
        control = "" if r.base_agreement is None else f"{100 * r.base_agreement:.2f} %"
        lines.append(
            f"| {r.what} | {r.tokens} | {r.max_difference:.2g} | {100 * r.agreement:.2f} % | {control} | {r.rule} | "
            f"{'ok' if r.ok else 'MISMATCH'} |"
        )
    return "\n".join(lines)


async def _replies(model: ChatModel, form: ChatFormat, chats: Sequence[Chat]) -> list[Positions]:
    """Turns spread evenly over all assistant turns, each answered afresh by `model`, as far as they can be scored."""
    turns = [list(chat[:i]) for chat in chats for i, m in enumerate(chat) if m.role == "assistant" and i > 0]
    turns = turns[:: max(1, -(-len(turns) // MAX_TURNS))]
    sampling = Sampling(max_tokens=REPLY_TOKENS)
    replies = await asyncio.gather(*(model.chat(turn, sampling) for turn in turns))
    found = []
    for turn, reply in zip(turns, replies, strict=True):
        ids, mask = form.training_ids([*turn, Message(role="assistant", content=reply.text)])
        start = len(form.prompt_ids(turn))
        own = [i for i, mine in enumerate(mask) if mine and i >= start]
        own = own if reply.finish == "stop" else own[:-1]  # a reply that was cut off has no stop token
        # text that the model spelt with other tokens than the tokenizer does cannot be scored; some servers do not
        # count the stop token
        if own and reply.usage.completion_tokens in (len(own), len(own) - 1):
            found.append(Positions(ids=ids[: own[-1] + 1], rows=[i - 1 for i in own]))
    return found


def _choices(scores: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor]) -> tuple[int, float]:
    """How many of the `chosen` tokens are the most likely, and the largest deficit of one that is not."""
    gaps = [s.max(-1).values - s.gather(1, c[:, None])[:, 0] for s, c in zip(scores, chosen, strict=True)]
    return int(sum((g <= 0).sum() for g in gaps)), max(float(g.max()) for g in gaps)


def _row(what: str, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Row:
    pairs = list(zip(got, wanted, strict=True))
    count = sum(len(w) for w in wanted)
    difference = max(float((g - w).abs().max()) for g, w in pairs)
    same = sum(int((g.argmax(-1) == w.argmax(-1)).sum()) for g, w in pairs)
    return Row(what=what, tokens=count, max_difference=difference, agreement=same / count, rule="", ok=False)


def _ruled(row: Row, rule: str, ok: bool) -> Row:
    return msgspec.structs.replace(row, rule=rule, ok=bool(ok))
