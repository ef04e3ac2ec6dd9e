"""The OpenVINO engine: a `ChatModel` that runs a merged model with OpenVINO GenAI's continuous batching on the CPU.

Calls come from asyncio; one background thread owns the pipeline and steps it while there is work. OpenVINO keeps KV
blocks by content, so a conversation's next turn finds its prefix without being told. Prompts go in as token ids, so
untrusted text never becomes control tokens. This module knows no task and holds no weights of its own.
"""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm import Engine
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.llm.front import Call, ThreadedEngine
from ragdistill.llm.gguf_export import export_gguf, gguf_fingerprint
from ragdistill.llm.local import best_dtype
from ragdistill.llm.slots import common_prefix
from ragdistill.llm.weights import MAX_CONTEXT, context_of
from ragdistill.records import digest, read_json

ENGINE_VERSION = 1
"""Part of the fingerprint; bumped when a change alters outputs."""
STEP_TOKENS = 1024
"""Most tokens in one step."""
MAX_CACHE_GB = 8
"""Bound of the KV cache; conversations beyond it are computed again."""
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def _openvino() -> tuple[Any, Any]:
    """The `openvino` and `openvino_genai` modules, with their telemetry switched off."""
    # openvino's own fallback when this package cannot be imported is a stub that sends nothing
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
        import openvino_genai
    except ImportError as e:
        raise ConfigError("The OpenVINO engine needs the package openvino-genai; install it or use torch.") from e
    return openvino, openvino_genai


class OpenVinoEngine(ThreadedEngine):
    """A model directory, with an adapter merged in if given, as a `ChatModel`.

    `Usage.computed_tokens` is counted here, not reported by OpenVINO: the prompt without the longest prefix that it
    shares with what this conversation computed before (of the `max_batch` conversations last seen), plus the
    completion. OpenVINO itself reuses whole blocks only, but those of any conversation.
    Replies are seeded each on their own, but bfloat16 sums depend on what runs beside them: near-ties may turn.
    """

    label = "OpenVINO"

    def __init__(
        self,
        model_dir: Path,
        adapter: Path | None,
        max_batch: int,
        cache: Path,
        max_context: int = MAX_CONTEXT,
        quantisation: str = "f16",
    ) -> None:
        """Write the model's GGUF below `cache` unless it is there, load it, and start the engine's thread.

        Raises `IdentityError` for a model or adapter that is not what it should be, `ConfigError` for an
        architecture the engine cannot run or when OpenVINO GenAI is not installed.
        """
        openvino, genai = _openvino()
        self._tensor, self._genai = openvino.Tensor, genai
        self._path = export_gguf(model_dir, adapter, cache, quantisation)
        config = read_json(model_dir / "config.json")
        context = context_of(model_dir, max_context)
        dtype, version = best_dtype(), genai.__version__.split("-")[0]
        self._precision = _PRECISIONS[dtype]
        self.engine = Engine(name="OpenVINO GenAI", version=version, precision=dtype, device="CPU")
        self._max_batch = max_batch
        self._cache_gb = _cache_gb(config, max_batch * context, 4 if self._precision == "f32" else 2)
        filed = context_of(model_dir, MAX_CONTEXT)
        kind = [self._precision, str(filed), str(ENGINE_VERSION), openvino.__version__, genai.__version__]
        fingerprint = digest("openvino", gguf_fingerprint(model_dir, adapter, quantisation), *kind)
        super().__init__(ChatFormat(load_tokenizer(model_dir)), context, fingerprint)
        self._pipeline: Any = None
        self._kept: OrderedDict[str, list[int]] = OrderedDict()
        self._running: list[Call] = []
        self._count = 0
        self._loaded: Future[None] = Future()
        self._start()
        self._loaded.result()

    def _load(self) -> Any:
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.cache_size = self._cache_gb
        scheduler.max_num_seqs = self._max_batch
        scheduler.max_num_batched_tokens = STEP_TOKENS
        properties = {
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "ENABLE_CPU_PINNING": False,  # pinned threads wait for whoever else runs on their core
            "INFERENCE_PRECISION_HINT": self._precision,
            "KV_CACHE_PRECISION": self._precision,  # the default rounds keys and values to 8 bits
        }
        return self._genai.ContinuousBatchingPipeline(str(self._path), scheduler, "CPU", properties, {})

    def _serve(self) -> None:
        try:
            # Here, not by the caller: OpenVINO gives the thread that loads a stack for signals, and takes it from the
            # thread that drops the pipeline. A caller left without it would end in a segmentation fault at Ctrl-C.
            self._pipeline = self._load()
        except Exception as e:  # noqa: BLE001  (boundary: the caller raises it)
            self._loaded.set_exception(e)
            return
        self._loaded.set_result(None)
        while self._receive():
            try:
                if self._pipeline is None:
                    self._pipeline = self._load()
                self._step()
            except Exception as e:  # noqa: BLE001  (boundary: every caller is told, the thread lives on)
                self._fail(self._broken(e))
        self._fail(self._gone())

    def _receive(self) -> bool:
        """Take in what has arrived, waiting if there is nothing to do; False when told to stop."""
        while not self._running or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return False
            if isinstance(item, str):
                self._kept.pop(item, None)
            else:
                self._running.append(item)
        return True

    def _step(self) -> None:
        """Hand new calls to OpenVINO, advance all by a token or a prompt chunk, and end those that are done."""
        for call in self._running:
            if call.handle is None:
                self._count += 1
                ids = self._tensor(np.array([call.prompt], dtype=np.int64))
                call.handle = self._pipeline.add_request(self._count, ids, self._config(call))
        self._pipeline.step()
        self._running = [call for call in self._running if not self._advance(call)]

    def _config(self, call: Call) -> Any:
        sampling, config = call.sampling, self._genai.GenerationConfig()
        config.max_new_tokens = min(sampling.max_tokens, self.context - len(call.prompt))
        config.stop_token_ids = set(self._format.stop_ids)
        config.do_sample = sampling.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
            config.top_k = sys.maxsize  # all of them
            config.rng_seed = sampling.seed
        if sampling.schema:
            form = self._genai.StructuredOutputConfig()
            form.json_schema = sampling.schema
            config.structured_output_config = form
        return config

    def _advance(self, call: Call) -> bool:
        """Take in the call's new tokens; True when it has ended."""
        if call.future.cancelled():
            call.handle.cancel()
            return True
        if call.handle.can_read():
            for output in call.handle.read().values():
                call.generated += output.generated_ids
        status = self._genai.py_openvino_genai.GenerationStatus
        done, text = call.handle.get_status() != status.RUNNING, None
        if call.generated and call.generated[-1] in self._format.stop_ids:
            text = self._format.decode(call.generated[:-1])
        elif call.sampling.stop:
            text = _cut(self._format.decode(call.generated), call.sampling.stop)
        if text is not None:
            if not done:
                call.handle.stop()
            self._finish(call, text, "stop")
        elif done and call.generated:
            full = len(call.prompt) + len(call.generated) >= self.context
            length = len(call.generated) >= call.sampling.max_tokens
            self._finish(call, self._format.decode(call.generated), "context" if full and not length else "length")
        elif done:
            raise EnvironmentFault(f"OpenVINO refused a prompt of {len(call.prompt)} tokens; its cache is too small.")
        return text is not None or done

    def _finish(self, call: Call, text: str, finish: str) -> None:
        if call.conversation:
            fed = call.prompt + call.generated[:-1]  # the last token was drawn but never fed
            kept, self._kept[call.conversation] = self._kept.get(call.conversation, []), fed
            self._kept.move_to_end(call.conversation)
            if len(self._kept) > self._max_batch:
                self._kept.popitem(last=False)
            call.reused = min(common_prefix(kept, call.prompt), len(call.prompt) - 1)
        call.answer(text, finish)

    def _fail(self, fault: EnvironmentFault) -> None:
        """Hand `fault` to every caller and drop the pipeline: its state is unknown, so the next call loads anew."""
        calls, self._running, self._pipeline = self._running, [], None
        self._kept.clear()
        self._refuse(calls, fault)


def _cache_gb(config: dict[str, Any], tokens: int, width: int) -> int:
    """Gigabytes that hold the keys and values of `tokens`, `width` bytes a number, within `MAX_CACHE_GB`."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * width
    return max(1, min(MAX_CACHE_GB, math.ceil(per_token * tokens / 2**30)))


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """`text` before its first stop string; None when it holds none."""
    at = min((at for at in map(text.find, stops) if at >= 0), default=-1)
    return text[:at] if at >= 0 else None
