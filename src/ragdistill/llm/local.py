"""The local engine: a `ChatModel` that batches conversations continuously and keeps their KV cache between turns.

Calls come from asyncio; one background thread owns the model. Each step mixes one token of every conversation that
decodes with prompt chunks of those that have just come back from their environment. This module knows no task.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm import Engine, cpu_env
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.llm.choice import best_device
from ragdistill.llm.front import Call, ThreadedEngine
from ragdistill.llm.slots import Slot, SlotTable
from ragdistill.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

cpu_env.apply()

import torch  # noqa: E402  (the environment above is read when torch is loaded)

from ragdistill.llm.kv_cache import Blocks, Chunk  # noqa: E402
from ragdistill.llm.runner import HuggingFaceRunner  # noqa: E402
from ragdistill.llm.sampling import next_tokens  # noqa: E402
from ragdistill.llm.weights import MAX_CONTEXT, adapter_fingerprint, load_merged, model_fingerprint  # noqa: E402

ENGINE_VERSION = 1
"""Part of the fingerprint; bumped when a change alters outputs."""
CHUNK = 256
"""Most prompt tokens of one conversation in one step."""
STEP_TOKENS = 1024
"""Most tokens in one step; more gains no speed per token."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_dtype(device: str = "cpu") -> str:
    """bfloat16 where the processor, or the GPU, multiplies it natively (on a CPU about 4x float32), else float32."""
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _load(model_dir: Path, adapter: Path | None, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The merged model on `device`, weights in `dtype`; `ConfigError` when there is no such device."""
    if device == "cpu":
        return load_merged(model_dir, adapter, dtype)
    if not torch.cuda.is_available():
        raise ConfigError(f"There is no device {device} here; set it to auto.")
    return place(load_merged(model_dir, adapter, torch.float32), dtype, device)


def place(model: PreTrainedModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Move a float32 model to `device`, each parameter already in `dtype`; for inference only.

    Buffers keep their precision: of rotary frequencies in bfloat16 far positions would be wrong by whole radians.
    """
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # a parameter that two modules share stays one
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old not in moved:
                moved[old] = torch.nn.Parameter(old.detach().to(device, dtype), requires_grad=False)
            module._parameters[name] = moved[old]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


class LocalEngine(ThreadedEngine):
    """A model directory, with an adapter merged in if given, as a `ChatModel`."""

    label = "local"

    def __init__(
        self,
        model_dir: Path,
        adapter: Path | None = None,
        dtype: str = "auto",
        max_batch: int = 32,
        reference: bool = False,
        max_context: int = MAX_CONTEXT,
        device: str = "auto",
    ) -> None:
        """Load the model and start the engine's thread.

        `max_batch` conversations run, and stay cached, at once (fewer where a GPU's memory holds fewer). `reference`
        computes in float32, one conversation at a time, so that replies are bit-equal whatever the concurrency.
        `device` auto is cuda where there is one. Raises `IdentityError` for a model or adapter that is not what it
        should be, `ConfigError` for an architecture or a device the engine cannot run on.
        """
        where = best_device() if device == "auto" else device
        name = "float32" if reference else best_dtype(where) if dtype == "auto" else dtype
        model = _load(model_dir, adapter, _DTYPES[name], where)
        most = int(getattr(model.config, "max_position_embeddings", max(max_context, MAX_CONTEXT)))
        context, filed = min(max_context, most), min(MAX_CONTEXT, most)
        kind = ["reference" if reference else "batched", name, str(ENGINE_VERSION), str(filed)]
        kind += [] if where == "cpu" else [where]
        parts = [model_fingerprint(model_dir), adapter_fingerprint(adapter) if adapter else ""]
        super().__init__(ChatFormat(load_tokenizer(model_dir)), context, digest("local", *parts, *kind))
        way = "one at a time" if reference else "batched"
        self.engine = Engine(name=f"transformers, {way}", precision=name, device="GPU" if where == "cuda" else "CPU")
        self._runner = HuggingFaceRunner(model, max_batch, context)
        self.slots = self._runner.conversations
        self._together = 1 if reference else self.slots
        self._table = SlotTable(self.slots)
        self._blocks = [Blocks() for _ in range(self.slots)]
        self._waiting: list[Call] = []
        self._running: list[tuple[Call, Slot]] = []
        self._start()

    def _serve(self) -> None:
        # attention weights of far tokens are denormal numbers, on which kernels are several times slower; set here,
        # in the thread that computes, because its OpenMP workers inherit it
        torch.set_flush_denormal(True)
        while self._receive():
            try:
                self._admit()
                self._step()
            except Exception as e:  # noqa: BLE001  (boundary: every caller is told, the thread lives on)
                self._fail(self._broken(e))
        self._fail(self._gone())

    def _receive(self) -> bool:
        """Take in what has arrived, waiting if there is nothing to do; False when told to stop."""
        idle = not self._waiting and not self._running
        while idle or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return False
            if isinstance(item, str):
                self._return_blocks(self._table.forget(item))
            else:
                self._waiting.append(item)
                idle = False
        return True

    def _return_blocks(self, slot: Slot | None) -> None:
        """Free the cache of a slot that keeps nothing, so that the blocks in use stay close together."""
        if slot is not None and not slot.busy and not slot.owner:
            self._runner.cache.resize(self._blocks[slot.index], 0)

    def _admit(self) -> None:
        """Start waiting calls, first come first served, as far as slots go."""
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if call.future.cancelled():
                continue
            room = len(self._running) < self._together
            slot = self._table.acquire(call.conversation, call.prompt) if room else None
            if slot is None:
                self._waiting.append(call)
            else:
                call.reused = len(slot.tokens)
                self._running.append((call, slot))

    def _step(self) -> None:
        """One forward pass: a token of each decoding conversation plus prompt chunks of the others."""
        for call, slot in [(c, s) for c, s in self._running if c.future.cancelled()]:  # nobody waits for it any more
            self._finish(call, slot, "", "stop")
        work, budget = [], STEP_TOKENS
        for call, slot in self._running:
            pending = len(call.prompt) + len(call.generated) - len(slot.tokens)
            count = min(pending, CHUNK, budget)
            if count > 0:
                budget -= count
                blocks = self._blocks[slot.index]
                self._runner.cache.resize(blocks, len(slot.tokens) + count)
                work.append((call, slot, Chunk(blocks, len(slot.tokens), count), pending == count))
        if not work:
            return
        work.sort(key=lambda w: (w[2].count > 1, w[1].index))
        ids: list[int] = []
        ends: list[int] = []
        for call, _, chunk, last in work:
            ids += _fed(call, chunk.length)[chunk.start :]
            ends += [len(ids) - 1] if last else []
        logits = self._forward(ids, [w[2] for w in work], ends)
        for call, slot, chunk, _ in work:
            slot.tokens += _fed(call, chunk.length)[chunk.start :]
        done = [(call, slot) for call, slot, _, last in work if last]
        if not done:
            return
        tokens = next_tokens(logits, [(call.sampling, len(call.generated)) for call, _ in done])
        for (call, slot), token in zip(done, tokens, strict=True):
            self._extend(call, slot, token)

    def _forward(self, ids: list[int], chunks: list[Chunk], ends: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            plan = self._runner.cache.plan(chunks, exact=self._together == 1)
            here = self._runner.device
            flat = torch.tensor(ids + [0] * (len(plan.positions) - len(ids)), device=here)
            return self._runner.step(flat, plan, torch.tensor(ends or [0], device=here))

    def _extend(self, call: Call, slot: Slot, token: int) -> None:
        """Append `token` to the reply, and end the call if it was the last."""
        call.generated.append(token)
        if token in self._format.stop_ids:
            self._finish(call, slot, self._format.decode(call.generated[:-1]), "stop")
            return
        text = self._format.decode(call.generated) if call.sampling.stop else ""
        cut = min((at for at in map(text.find, call.sampling.stop) if at >= 0), default=-1)
        if cut >= 0:
            self._finish(call, slot, text[:cut], "stop")
        elif len(call.generated) >= call.sampling.max_tokens:
            self._finish(call, slot, self._format.decode(call.generated), "length")
        elif len(call.prompt) + len(call.generated) >= self.context:
            self._finish(call, slot, self._format.decode(call.generated), "context")

    def _finish(self, call: Call, slot: Slot, text: str, finish: str) -> None:
        self._running = [(c, s) for c, s in self._running if c is not call]
        self._table.release(slot)
        self._return_blocks(slot)
        call.answer(text, finish)

    def _fail(self, fault: EnvironmentFault) -> None:
        """Hand `fault` to every caller and start afresh: the cache's content is unknown."""
        calls = self._waiting + [call for call, _ in self._running]
        self._waiting, self._running = [], []
        self._table.clear()
        self._refuse(calls, fault)


def _fed(call: Call, count: int) -> list[int]:
    """The first `count` ids of prompt and reply."""
    missing = count - len(call.prompt)
    return call.prompt[:count] if missing <= 0 else call.prompt + call.generated[:missing]
