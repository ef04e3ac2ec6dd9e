"""Base and students through a vLLM server and through the embedded engine: do they say the same? Prints tables.

    python benchmarks/vllm_parity.py models/base models/students/distilled-0 --chats data/sft/distilled.jsonl

One server holds the base and the students (LoRA, loaded while it runs). Each model answers the same turns of real
games, greedy, through vLLM and through our engine: equal replies, equal actions, and the share of tokens that the
float32 weights choose too (`ragdistill.serving.parity`; the control is the base without the adapter). The turns are
asked twice on vLLM, students in between, so that a prefix cache that mixes students up would show. With `--merged` the
first student is served merged, as a base, too. RAGDISTILL_VLLM_PYTHON names vLLM's interpreter. Speed is not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragdistill.llm import ChatModel, Sampling, cpu_env
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.llm.choice import has_openvino
from ragdistill.records import Message, SftExample, read_jsonl
from ragdistill.serving import parity, vllm
from ragdistill.serving.vllm_chat import VllmChat

cpu_env.apply()

import torch  # noqa: E402

from ragdistill.llm.weights import MAX_CONTEXT, context_of, load_merged, save_merged  # noqa: E402

Turn = Sequence[Message]


def turns_of(chats: Sequence[Turn], count: int) -> list[Turn]:
    """`count` prompts, spread evenly over all assistant turns."""
    turns = [chat[:i] for chat in chats for i, m in enumerate(chat) if m.role == "assistant"]
    return turns[:: max(1, len(turns) // count)][:count]


def replies(model: ChatModel, turns: Sequence[Turn]) -> list[str]:
    """Greedy replies, all asked at once."""

    async def ask() -> list[str]:
        got = await asyncio.gather(*(model.chat(turn, Sampling(max_tokens=64)) for turn in turns))
        return [reply.text for reply in got]

    return asyncio.run(ask())


def embedded(base: Path, adapter: Path | None, cache: Path, batch: int) -> ChatModel:
    """The engine that `auto` takes."""
    if has_openvino():
        from ragdistill.llm.openvino import OpenVinoEngine

        return OpenVinoEngine(base, adapter, max_batch=batch, cache=cache)
    from ragdistill.llm.local import LocalEngine

    return LocalEngine(base, adapter, max_batch=batch)


def action(reply: str) -> str:
    """The last line, which holds the action in every style here."""
    return reply.strip().splitlines()[-1] if reply.strip() else ""


def share(a: Sequence[str], b: Sequence[str]) -> str:
    """How many are equal."""
    return f"{sum(x == y for x, y in zip(a, b, strict=True))}/{len(a)}"


def row(*cells: object) -> None:
    """Print a table row."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse the arguments, start the server, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("students", type=Path, nargs="*")
    parser.add_argument("--chats", type=Path, required=True, help="SftExample records")
    parser.add_argument("--games", type=int, default=12)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16", help="of vLLM's weights")
    parser.add_argument("--cache", type=Path, default=Path(".cache/gguf"))
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("--timeout", type=float, default=900.0)
    args = parser.parse_args()
    chats: list[Turn] = [e.messages for e in read_jsonl(args.chats, SftExample)[: args.games]]
    turns, form = turns_of(chats, args.turns), ChatFormat(load_tokenizer(args.base))
    ours: dict[Path | None, list[str]] = {}
    for adapter in (None, *args.students):
        engine = embedded(args.base, adapter, args.cache, 8)
        ours[adapter] = replies(engine, turns)
        engine.close()
    kind = "OpenVINO" if has_openvino() else "torch"
    print(f"{len(turns)} turns of {len(chats)} games; our engine: {kind}; vLLM in {args.dtype}\n")
    row(
        "served by vLLM", "replies as ours", "actions as ours", "again, cached", "as base's", "float32 tokens", "base's"
    )
    row(*["---"] * 7)
    plain: Any = load_merged(args.base, None, torch.float32)
    with tempfile.TemporaryDirectory() as tmp:
        compare(args, args.base, args.students, ours, turns, chats, form, plain)
        if args.merged and args.students:
            merged = save_merged(args.base, args.students[0], Path(tmp) / "merged", args.students[0].name)
            compare(args, merged, [], {None: ours[args.students[0]]}, turns, chats, form, plain)


def compare(
    args: argparse.Namespace,
    base: Path,
    students: Sequence[Path],
    ours: dict[Path | None, list[str]],
    turns: Sequence[Turn],
    chats: Sequence[Turn],
    form: ChatFormat,
    plain: Any,
) -> None:
    """One server with `base` and `students`: a table row for each."""
    extra = ("--dtype", args.dtype, "--max-loras", str(max(1, len(students))))
    python, log = vllm.interpreter(None), args.cache.parent / "vllm" / "server.log"
    with vllm.start(python, base, students, log, context_of(base, MAX_CONTEXT), args.timeout, extra) as server:
        models = {a: VllmChat(server, base, a, 8, lambda: None) for a in (None, *students)}
        first = {a: replies(m, turns) for a, m in models.items()}
        second = {a: replies(m, turns) for a, m in models.items()}
        for a, model in models.items():
            reference: Any = load_merged(base, a, torch.float32)
            scored = parity.served("vLLM", model, form, chats, reference, plain, 0.98)
            name = f"{a.name} (LoRA)" if a else "base" if base == args.base else f"{args.students[0].name} (merged)"
            row(
                name, share(first[a], ours[a]), share([action(r) for r in first[a]], [action(r) for r in ours[a]]),
                share(first[a], second[a]), share(first[a], first[None]),
                f"{100 * scored.agreement:.2f} % of {scored.tokens}", f"{100 * (scored.base_agreement or 0):.2f} %",
            )  # fmt: skip
            model.close()


if __name__ == "__main__":
    main()
