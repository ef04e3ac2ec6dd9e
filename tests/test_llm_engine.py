"""The local engine: equal to transformers token by token, whatever shares the batch; faults reach every caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm import Reply, Sampling, engine_of
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.llm.local import LocalEngine
from ragdistill.params import load_params
from ragdistill.records import Message, Usage
from ragdistill.stages.playing import at_once
from tests.llm_toys import toy_model, toy_tokenizer

import torch  # isort: skip  (after the engine, which prepares the process)

GREEDY = Sampling(max_tokens=9)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy"))


@asynccontextmanager
async def engine(model_dir: Path, **options: Any) -> AsyncIterator[LocalEngine]:
    made = LocalEngine(model_dir, dtype=options.pop("dtype", "float32"), **options)
    try:
        yield made
    finally:
        made.close()


def opening(number: int) -> list[Message]:
    """Ragged: conversation 3 alone is longer than a block and than a prompt chunk."""
    return [
        Message(role="system", content="You see a mug. " * (3 + 30 * (number % 4))),
        Message(role="user", content=f"Start <|im_start|> {number}."),
    ]


async def play(model: LocalEngine, number: int, turns: int = 3, sampling: Sampling = GREEDY) -> list[Reply]:
    chat, replies = opening(number), []
    for turn in range(turns):
        replies.append(await model.chat(chat, sampling, f"c{number}"))
        chat.append(Message(role="assistant", content=replies[-1].text))
        chat.append(Message(role="user", content="open drawer 1 " * (1 + number + turn)))
    return replies


async def play_all(model: LocalEngine, numbers: Sequence[int], **options: Any) -> list[list[Reply]]:
    return list(await asyncio.gather(*(play(model, n, **options) for n in numbers)))


def transformers_reply(model_dir: Path, prompt: list[int], limit: int) -> str:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, eos_token_id=2, pad_token_id=0)
    return ChatFormat(toy_tokenizer()).decode([t for t in out[0].tolist()[len(prompt) :] if t != 2])


@pytest.mark.parametrize("reference", [False, True], ids=["batched", "reference"])
def test_ragged_conversations_equal_transformers_token_by_token(model_dir: Path, reference: bool) -> None:
    async def run() -> list[list[Reply]]:
        async with engine(model_dir, reference=reference) as model:
            return await play_all(model, range(6))

    fmt = ChatFormat(toy_tokenizer())
    for number, replies in enumerate(asyncio.run(run())):
        chat = opening(number)
        for turn, reply in enumerate(replies):
            prompt = fmt.prompt_ids(chat)
            assert reply.text == transformers_reply(model_dir, prompt, GREEDY.max_tokens)
            assert reply.usage.prompt_tokens == len(prompt)
            chat.append(Message(role="assistant", content=reply.text))
            chat.append(Message(role="user", content="open drawer 1 " * (1 + number + turn)))


def test_replies_differ_between_conversations(model_dir: Path) -> None:
    """Else the equality tests above and below could not fail."""

    async def run() -> list[list[Reply]]:
        async with engine(model_dir) as model:
            return await play_all(model, range(6))

    texts = [reply.text for replies in asyncio.run(run()) for reply in replies]
    assert len(set(texts)) > len(texts) // 2


def test_reference_is_bit_equal_at_any_concurrency(model_dir: Path) -> None:
    sampling = Sampling(max_tokens=9, temperature=1.3, top_p=0.9, seed=5)

    async def run(together: bool) -> list[list[Reply]]:
        async with engine(model_dir, reference=True) as model:
            if together:
                return await play_all(model, range(8), sampling=sampling)
            return [await play(model, n, sampling=sampling) for n in range(8)]

    assert asyncio.run(run(True)) == asyncio.run(run(False))


def test_samples_do_not_depend_on_the_batch_but_on_the_seed(model_dir: Path) -> None:
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=3)

    async def run(numbers: Sequence[int], seed: int) -> list[Reply]:
        async with engine(model_dir) as model:
            return (await play_all(model, numbers, sampling=Sampling(max_tokens=9, temperature=1.0, seed=seed)))[0]

    alone, crowd, other = (asyncio.run(run(n, s)) for n, s in (([1], 3), ([1, 0, 2, 3], 3), ([1], 4)))
    assert [r.text for r in alone] == [r.text for r in crowd]
    assert [r.text for r in alone] != [r.text for r in other]
    assert sampling.temperature == 1.0


def test_only_new_tokens_are_computed_and_counted(model_dir: Path) -> None:
    async def run() -> list[Reply]:
        async with engine(model_dir) as model:
            return await play(model, 2)

    first, second, _ = (r.usage for r in asyncio.run(run()))
    assert first.computed_tokens == first.prompt_tokens + first.completion_tokens
    assert second.computed_tokens < second.completion_tokens + second.prompt_tokens - first.prompt_tokens + 1


def test_an_evicted_conversation_is_recomputed_and_counted(model_dir: Path) -> None:
    async def run(slots: int) -> list[list[Reply]]:
        async with engine(model_dir, max_batch=slots) as model:
            return await play_all(model, range(6))

    roomy, cramped = asyncio.run(run(6)), asyncio.run(run(2))
    assert [[r.text for r in c] for c in cramped] == [[r.text for r in c] for c in roomy]

    def computed(all_replies: list[list[Reply]]) -> int:
        return sum(r.usage.computed_tokens for replies in all_replies for r in replies)

    assert computed(cramped) > computed(roomy)


def test_an_engine_of_few_slots_gets_as_many_episodes_and_computes_prompts_once(model_dir: Path) -> None:
    params = load_params(ROOT / "params.yaml")

    async def run(slots: int) -> tuple[int, list[Reply]]:
        async with engine(model_dir, max_batch=slots) as model:
            most = at_once(params, model)
            gate = asyncio.Semaphore(most)

            async def episode(number: int) -> list[Reply]:
                async with gate:
                    replies = await play(model, number)
                    await model.forget(f"c{number}")
                    return replies

            return most, [r for c in await asyncio.gather(*map(episode, range(12))) for r in c]

    (few, cramped), (many, roomy) = asyncio.run(run(3)), asyncio.run(run(params.model.concurrency + 1))
    assert (few, many) == (3, params.model.concurrency)
    assert [r.usage for r in cramped] == [r.usage for r in roomy]


def test_forgetting_frees_the_cache(model_dir: Path) -> None:
    async def run() -> tuple[Usage, Usage, int]:
        async with engine(model_dir) as model:
            kept = (await play(model, 1, turns=1))[0].usage
            await model.forget("c1")
            again = (await play(model, 1, turns=1))[0].usage
            await model.forget("c1")
            await play(model, 0, turns=1)
            return kept, again, sum(len(b.ids) for b in model._blocks)

    kept, again, blocks = asyncio.run(run())
    assert kept == again
    assert blocks == 1


def test_a_caller_that_goes_away_frees_its_slot_at_once(model_dir: Path) -> None:
    """A client with a short time-out that tries again would else fill every slot for as long as the context lasts."""

    async def run() -> list[int]:
        async with engine(model_dir) as model:
            gone = asyncio.create_task(model.chat(opening(1), Sampling(max_tokens=100_000, temperature=1.0, seed=1)))
            while not (running := list(model._running)) or len(running[0][0].generated) < 2:
                await asyncio.sleep(0.01)
            gone.cancel()
            await play(model, 1, turns=1)
            return [len(c.generated) for c, _ in running] + [len(model._running)]

    at_once, left = asyncio.run(run())
    assert left == 0 and at_once < 200


def test_a_reply_ends_where_it_should(model_dir: Path) -> None:
    async def run() -> list[Reply]:
        async with engine(model_dir, max_context=128) as model:
            chat = opening(0)
            whole = await model.chat(chat, Sampling(max_tokens=9))
            cut = await model.chat(chat, Sampling(max_tokens=9, stop=(whole.text[3:5],)))
            full = await model.chat(chat, Sampling(max_tokens=500, temperature=3.0))
            over = await model.chat(opening(3), GREEDY)
            return [whole, cut, full, over]

    whole, cut, full, over = asyncio.run(run())
    assert (whole.finish, whole.usage.completion_tokens) == ("length", 9)
    assert (cut.finish, cut.text) == ("stop", whole.text[: whole.text.index(whole.text[3:5])])
    assert full.finish in {"stop", "context"}
    assert full.usage.billed <= 128
    assert (over.finish, over.text, over.usage.computed_tokens) == ("context", "", 0)


def test_the_stop_token_ends_a_reply_and_is_counted(model_dir: Path) -> None:
    async def run() -> list[Reply]:
        async with engine(model_dir) as model:
            draws = (Sampling(max_tokens=200, temperature=5.0, seed=s) for s in range(12))
            return list(await asyncio.gather(*(model.chat(opening(0), s) for s in draws)))

    stopped = [r for r in asyncio.run(run()) if r.finish == "stop"]
    assert stopped
    assert all("<|im_end|>" not in r.text and r.usage.completion_tokens >= 1 for r in stopped)


def test_a_failed_step_reaches_every_caller_and_the_engine_lives_on(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> tuple[list[BaseException | Reply], Reply, Reply]:
        async with engine(model_dir, max_batch=2) as model:
            before = await model.chat(opening(1), GREEDY)
            with monkeypatch.context() as patch:
                patch.setattr(model._runner, "step", lambda *_: 1 / 0)
                calls = (model.chat(opening(n), GREEDY, f"c{n}") for n in range(5))
                failed = await asyncio.gather(*calls, return_exceptions=True)
            return list(failed), before, await model.chat(opening(1), GREEDY)

    failed, before, after = asyncio.run(run())
    assert all(isinstance(f, EnvironmentFault) for f in failed)
    assert after == before


def test_closing_ends_waiting_calls(model_dir: Path) -> None:
    async def run() -> None:
        model = LocalEngine(model_dir, dtype="float32", reference=True)
        calls = [asyncio.ensure_future(model.chat(opening(n), Sampling(max_tokens=900))) for n in range(4)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(model.close)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[-1], EnvironmentFault)
        with pytest.raises(EnvironmentFault):
            await model.chat(opening(0), GREEDY)

    asyncio.run(run())


def test_the_fingerprint_names_weights_precision_and_kind(model_dir: Path, tmp_path: Path) -> None:
    made = [
        LocalEngine(model_dir, dtype="float32"),
        LocalEngine(model_dir, dtype="bfloat16"),
        LocalEngine(model_dir, reference=True),
        LocalEngine(toy_model(tmp_path / "other", seed=1), dtype="float32"),
        LocalEngine(model_dir, dtype="float32"),
    ]
    prints = [m.fingerprint() for m in made]
    for m in made:
        m.close()
    assert len(set(prints)) == 4
    assert prints[0] == prints[4]
    said = [engine_of(m).words() for m in made[:3]]
    assert said == [
        "transformers, batched, float32, CPU", "transformers, batched, bfloat16, CPU",
        "transformers, one at a time, float32, CPU",
    ]  # fmt: skip


def test_an_architecture_with_another_attention_is_refused(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="endpoint"):
        LocalEngine(tmp_path, dtype="float32")
