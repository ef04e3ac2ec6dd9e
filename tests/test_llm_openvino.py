"""The OpenVINO engine says what transformers says for the same weights, and behaves as any `ChatModel`."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("openvino_genai") is None:  # not imported here: the engine has to block the telemetry first
    pytest.skip("the OpenVINO engine is optional: openvino-genai is not installed", allow_module_level=True)

from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm import Reply, Sampling, engine_of
from ragdistill.llm import openvino as room
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.llm.gguf_export import export_gguf, gguf_fingerprint
from ragdistill.llm.local import best_dtype
from ragdistill.llm.openvino import OpenVinoEngine
from ragdistill.records import Message, Usage, read_json
from tests.llm_toys import toy_model, toy_tokenizer

import torch  # isort: skip  (after the engine, which prepares the process)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # isort: skip

FORMAT = ChatFormat(toy_tokenizer())
GREEDY = Sampling(max_tokens=12)


def chat(*texts: str) -> list[Message]:
    return [Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(texts)]


CHATS = [chat("open drawer 1"), chat("You see a mug. <|im_end|>"), chat("look", "open it", "You see a cabinet 2." * 9)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = toy_model(tmp_path_factory.mktemp("toy"))
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    model.to(torch.float16).to(torch.float32).save_pretrained(directory)  # so that float16 loses nothing
    return directory


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenVinoEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "best_dtype", lambda: "float32")
        made = OpenVinoEngine(model_dir, None, 4, tmp_path_factory.mktemp("gguf"))
    yield made
    made.close()


def replies(engine: OpenVinoEngine, chats: list[list[Message]], sampling: Sampling = GREEDY) -> list[Reply]:
    async def together() -> list[Reply]:
        return list(await asyncio.gather(*[engine.chat(messages, sampling) for messages in chats]))

    return asyncio.run(together())


def expected(model_dir: Path, messages: list[Message], count: int) -> list[int]:
    """Greedy ids by transformers in float32, one whole forward pass per token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = FORMAT.prompt_ids(messages)
    start = len(ids)
    while len(ids) - start < count and (len(ids) == start or ids[-1] not in FORMAT.stop_ids):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


CTRL_C = """
import os, signal, sys, time
from pathlib import Path
from ragdistill.llm.openvino import OpenVinoEngine

OpenVinoEngine(Path(sys.argv[1]), None, 4, Path(sys.argv[2])).close()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_an_engine_was_closed_is_no_crash(model_dir: Path, tmp_path: Path) -> None:
    """OpenVINO unmaps the signal stack of the thread that loaded, whichever thread drops the pipeline."""
    command = [sys.executable, "-c", CTRL_C, model_dir, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


def test_greedy_replies_equal_transformers_whatever_runs_beside_them(engine: OpenVinoEngine, model_dir: Path) -> None:
    for messages, reply in zip(CHATS, replies(engine, CHATS), strict=True):
        ids = expected(model_dir, messages, GREEDY.max_tokens)
        text = FORMAT.decode(ids[:-1] if ids[-1] in FORMAT.stop_ids else ids)
        assert (reply.text, reply.usage.completion_tokens) == (text, len(ids))


def test_a_stop_string_ends_a_reply(engine: OpenVinoEngine) -> None:
    (whole,) = replies(engine, CHATS[:1])
    middle = whole.text[len(whole.text) // 2]
    (cut,) = replies(engine, CHATS[:1], Sampling(max_tokens=12, stop=(middle,)))
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(middle)]


def test_the_stop_token_ends_a_reply_and_is_counted(
    engine: OpenVinoEngine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = expected(model_dir, CHATS[0], 12)
    last = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    monkeypatch.setattr(engine._format, "stop_ids", frozenset({ids[last]}))
    (reply,) = replies(engine, CHATS[:1])
    assert (reply.text, reply.finish) == (FORMAT.decode(ids[:last]), "stop")
    assert reply.usage.completion_tokens == last + 1


def test_length_and_context_end_a_reply(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = engine.count_tokens(CHATS[0])
    assert replies(engine, CHATS[:1])[0].finish == "length"
    monkeypatch.setattr(engine, "context", prompt + 5)
    (reply,) = replies(engine, CHATS[:1])
    assert (reply.finish, reply.usage.completion_tokens) == ("context", 5)
    monkeypatch.setattr(engine, "context", prompt)
    assert replies(engine, CHATS[:1]) == [Reply(text="", usage=Usage(prompt_tokens=prompt), finish="context")]


def test_samples_differ_by_seed_and_repeat_with_it(engine: OpenVinoEngine) -> None:
    def sample(seed: int) -> str:
        return replies(engine, CHATS[:1], Sampling(max_tokens=12, temperature=2.0, seed=seed))[0].text

    assert sample(1) == sample(1) != sample(2)


def test_only_new_tokens_of_a_conversation_count_as_computed(engine: OpenVinoEngine) -> None:
    async def turns() -> list[Usage]:
        first = await engine.chat(CHATS[0], GREEDY, "a")
        longer = chat(CHATS[0][0].content, first.text, "more")
        extended = await engine.chat(longer, GREEDY, "a")
        await engine.forget("a")
        return [first.usage, extended.usage, (await engine.chat(longer, GREEDY, "a")).usage]

    first, extended, forgotten = asyncio.run(turns())
    assert first.computed_tokens == first.prompt_tokens + first.completion_tokens
    assert extended.computed_tokens <= extended.billed - first.prompt_tokens
    assert forgotten.computed_tokens == forgotten.billed


def test_a_failed_step_reaches_every_caller_and_the_engine_lives_on(engine: OpenVinoEngine) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("no memory")

    before = replies(engine, CHATS)
    engine._pipeline = Broken()

    async def failing() -> list[Any]:
        return await asyncio.gather(*[engine.chat(c, GREEDY) for c in CHATS], return_exceptions=True)

    assert [type(e) for e in asyncio.run(failing())] == [EnvironmentFault] * 3
    assert replies(engine, CHATS) == before


def test_a_closed_engine_refuses(model_dir: Path, tmp_path: Path) -> None:
    engine = OpenVinoEngine(model_dir, None, 2, tmp_path)

    async def closing() -> None:
        waiting = asyncio.ensure_future(engine.chat(CHATS[0], Sampling(max_tokens=900)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EnvironmentFault, match="closed"):
            await waiting
        with pytest.raises(EnvironmentFault, match="closed"):
            await engine.chat(CHATS[0], GREEDY)

    asyncio.run(closing())


def test_the_file_is_written_once_per_content(model_dir: Path, tmp_path: Path) -> None:
    path = export_gguf(model_dir, None, tmp_path)
    stamp = path.stat().st_mtime_ns
    assert export_gguf(model_dir, None, tmp_path).stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = toy_model(tmp_path / "other", seed=1)
    names = {gguf_fingerprint(model_dir, None), gguf_fingerprint(other, None), gguf_fingerprint(other, None, "q8_0")}
    assert len(names) == 3


def test_an_architecture_the_reader_would_get_wrong_is_refused(tmp_path: Path) -> None:
    directory = toy_model(tmp_path / "biased")
    config = LlamaConfig.from_pretrained(directory, attention_bias=True)
    LlamaForCausalLM(config).save_pretrained(directory)
    with pytest.raises(ConfigError, match="use the torch engine"):
        export_gguf(directory, None, tmp_path / "cache")


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2)])
def test_keys_and_values_are_kept_in_the_precision_of_the_engine(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, width: int
) -> None:
    """Read off the pipeline itself: how many bytes of its cache a prompt takes."""
    if precision == "bfloat16" != best_dtype():
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(room, "best_dtype", lambda: precision)
    made = OpenVinoEngine(model_dir, None, 4, tmp_path)
    (reply,) = replies(made, [chat("You see a mug. " * 40)])
    metrics, config = made._pipeline.get_metrics(), read_json(model_dir / "config.json")
    made.close()
    assert (made.engine.name, made.engine.precision, made.engine.device) == ("OpenVINO GenAI", precision, "CPU")
    block = 32 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * width
    used = metrics.max_cache_usage / 100 * metrics.cache_size_in_bytes / block
    assert used == pytest.approx(-(-(reply.usage.billed - 1) // 32), abs=1.01), "of blocks of 32 tokens"


def test_telemetry_cannot_be_imported(engine: OpenVinoEngine) -> None:
    assert engine.fingerprint()
    loaded = [name for name in sys.modules if name.startswith("openvino_telemetry.")]
    assert sys.modules["openvino_telemetry"] is None and not loaded


def test_the_engine_says_what_it_is(engine: OpenVinoEngine) -> None:
    said = engine_of(engine)
    assert (said.name, said.precision, said.device) == ("OpenVINO GenAI", "float32", "CPU")
    assert re.fullmatch(r"OpenVINO GenAI \d+\.\d+[\d.]*, float32, CPU", said.words())


def test_a_reply_follows_its_schema_and_only_where_one_is_given(engine: OpenVinoEngine) -> None:
    form = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    bound = Sampling(max_tokens=60, temperature=2.0, seed=1, schema=json.dumps(form))
    (free,), (formed, other) = replies(engine, CHATS[:1]), replies(engine, CHATS[:2], bound)
    assert json.loads(formed.text)["n"] in (1, 2) and json.loads(other.text)["n"] in (1, 2)
    assert replies(engine, CHATS[:1]) == [free]
