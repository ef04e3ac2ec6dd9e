"""The torch engine on CUDA: it says what the CPU says, and no tensor is left on the wrong device.

The first needs a device (marker `gpu`); the second runs without, on the device of `tests/strict_device.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ragdistill.errors import ConfigError
from ragdistill.llm import Reply, Sampling, local
from ragdistill.llm.local import ENGINE_VERSION, LocalEngine
from ragdistill.llm.weights import load_merged, model_fingerprint
from ragdistill.records import Message, digest
from tests.llm_toys import toy_model

import torch  # isort: skip  (after the engine, which prepares the process)
from ragdistill.llm import runner as running  # isort: skip
from ragdistill.llm.kv_cache import BLOCK  # isort: skip

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy"))


@pytest.mark.timeout(600)  # seconds of work, but minutes beside others
def test_every_tensor_of_the_engine_is_on_its_device_and_the_replies_are_the_cpu_s(model_dir: Path) -> None:
    command = [sys.executable, "-m", "tests.strict_device", str(model_dir)]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert "one of the CPU" in said.pop("mixed"), "else the device would not notice"
    assert len({text for pair in said["cpu"] for text in pair}) > 8, "else equality says little"
    assert said["device"] == said["cpu"] == said["device, reference"]


def test_weights_are_cast_and_rotary_frequencies_are_not(model_dir: Path) -> None:
    model: Any = local.place(load_merged(model_dir, None, torch.float32), torch.bfloat16, "meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert {(b.device.type, b.dtype) for b in model.buffers()} == {("meta", torch.float32)}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "tied as before"


def test_a_gpu_holds_as_many_conversations_as_its_memory(model_dir: Path) -> None:
    config = load_merged(model_dir, None, torch.float32).config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * (512 + BLOCK)
    assert running._fitting(each * 10, each) == 8
    with pytest.raises(ConfigError, match="GPU has"):
        running._fitting(each, each)


def test_a_cpu_engine_keeps_the_fingerprint_that_episodes_are_filed_under(model_dir: Path) -> None:
    made = LocalEngine(model_dir, dtype="float32", device="cpu")
    made.close()
    parts = [model_fingerprint(model_dir), "", "batched", "float32", str(ENGINE_VERSION), "1024"]
    assert made.fingerprint() == digest("local", *parts)
    assert made.engine.words() == "transformers, batched, float32, CPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no device cuda"):
        LocalEngine(model_dir, device="cuda")


def prompts() -> list[list[Message]]:
    """One shorter than a block, one longer, one longer than a prompt chunk."""
    return [[Message(role="user", content=f"You see a mug and {n}. " * (1 + 9 * n))] for n in (0, 1, 3, 1, 0, 2)]


def replies(model_dir: Path, **options: Any) -> list[list[Reply]]:
    model = LocalEngine(model_dir, **options)

    async def two_turns(number: int, chat: list[Message]) -> list[Reply]:
        first = await model.chat(chat, Sampling(max_tokens=12), f"c{number}")
        longer = [*chat, Message(role="assistant", content=first.text), Message(role="user", content="open drawer 1")]
        return [first, await model.chat(longer, Sampling(max_tokens=12), f"c{number}")]

    async def all_of_them() -> list[list[Reply]]:
        return list(await asyncio.gather(*(two_turns(n, chat) for n, chat in enumerate(prompts()))))

    try:
        return asyncio.run(all_of_them())
    finally:
        model.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("reference", [False, True])
def test_cuda_draws_the_tokens_that_the_cpu_draws_in_float32(model_dir: Path, reference: bool) -> None:
    here = replies(model_dir, dtype="float32", device="cpu", reference=reference)
    assert len({reply.text for pair in here for reply in pair}) > 6, "else equality says little"
    assert replies(model_dir, dtype="float32", device="cuda", reference=reference) == here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_cuda_in_bfloat16_samples_and_mostly_agrees(model_dir: Path) -> None:
    here = [r for pair in replies(model_dir, dtype="float32", device="cpu") for r in pair]
    model = LocalEngine(model_dir, device="cuda")
    assert model.engine.words() == "transformers, batched, bfloat16, GPU"
    drawn = asyncio.run(model.chat(prompts()[0], Sampling(temperature=0.8, top_p=0.9, max_tokens=8, seed=3)))
    model.close()
    assert drawn.usage.completion_tokens >= 1
    there = [r for pair in replies(model_dir, dtype="auto", device="cuda") for r in pair]
    same = sum(a.text[:1] == b.text[:1] for a, b in zip(here, there, strict=True))
    assert same >= len(here) // 2, "the first tokens are no near-ties"
