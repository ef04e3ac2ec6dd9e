"""Parts of the `llm` room: slot bookkeeping, sampling, packed weights, the scripted model."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from ragdistill.llm import Sampling, cpu_env
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.llm.slots import SlotTable, common_prefix
from ragdistill.records import Message

cpu_env.apply()

import torch  # noqa: E402

from ragdistill.errors import ConfigError  # noqa: E402
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer  # noqa: E402
from ragdistill.llm.counting import bound_tokens, counter, estimate_tokens  # noqa: E402
from ragdistill.llm.packed import PackedLinear, pack_linears  # noqa: E402
from ragdistill.llm.sampling import next_tokens  # noqa: E402
from tests.llm_toys import toy_model  # noqa: E402


@pytest.mark.parametrize(
    ("a", "b", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([1, 2, 3], [1, 2], 2)]
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == length


def test_at_least_one_prompt_token_is_left_to_compute() -> None:
    table = SlotTable(1)
    slot = table.acquire("a", [1, 2, 3])
    assert slot
    slot.tokens = [1, 2, 3]
    table.release(slot)
    again = table.acquire("a", [1, 2, 3])
    assert again is slot
    assert slot.tokens == [1, 2]


def test_the_longest_idle_conversation_is_evicted_and_a_busy_one_never() -> None:
    table = SlotTable(2)
    for name in ("a", "b", "a"):
        slot = table.acquire(name, [1, 2])
        assert slot
        table.release(slot)
    a = table.acquire("a", [1, 2])
    new = table.acquire("c", [1, 2])
    assert a and new
    assert (a.owner, new.owner) == ("a", "c")
    assert table.acquire("b", [1]) is None
    assert table.acquire("a", [1]) is None


def test_a_forgotten_conversation_keeps_nothing() -> None:
    table = SlotTable(1)
    slot = table.acquire("a", [1, 2, 3])
    assert slot
    slot.tokens = [1, 2, 3]
    table.forget("a")
    table.release(slot)
    again = table.acquire("a", [1, 2, 3])
    assert again
    assert again.tokens == []


def test_draws_follow_the_distribution_and_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    drawn = Counter(next_tokens(logits, [(Sampling(temperature=1.0, seed=s), 0) for s in range(2000)]))
    assert drawn[0] / 2000 == pytest.approx(0.5, abs=0.04)
    assert drawn[3] / 2000 == pytest.approx(0.05, abs=0.02)
    nucleus = Counter(next_tokens(logits, [(Sampling(temperature=1.0, top_p=0.7, seed=s), 0) for s in range(2000)]))
    assert set(nucleus) == {0, 1}
    cold = set(next_tokens(logits[:50], [(Sampling(temperature=0.01, seed=s), 0) for s in range(50)]))
    assert cold == {0}


def test_a_nucleus_wider_than_the_head_is_not_cut_short() -> None:
    logits = torch.zeros(1, 4096)
    drawn = {next_tokens(logits, [(Sampling(temperature=1.0, top_p=0.99, seed=s), 0)])[0] for s in range(200)}
    assert len(drawn) > 150


def test_a_draw_depends_on_seed_and_index_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 500)
    draws = [(Sampling(temperature=1.0, seed=s), s) for s in range(3)]
    together = next_tokens(logits, draws)
    assert together == [next_tokens(logits[i : i + 1], draws[i : i + 1])[0] for i in range(3)]
    indices = {next_tokens(logits[:1], [(Sampling(temperature=1.0, seed=1), t)])[0] for t in range(30)}
    assert len(indices) > 10


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="torch without oneDNN packing")
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_compute_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=bias)).to(torch.bfloat16)
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = plain(x)
        pack_linears(plain)
        assert isinstance(plain[0], PackedLinear)
        torch.testing.assert_close(plain(x), wanted, atol=0.02, rtol=0.02)


def test_the_scripted_model_answers_and_counts_honestly() -> None:
    def policy(messages: object, sampling: Sampling) -> str:
        return "one two three STOP four"

    async def run() -> None:
        model = ScriptedModel(policy, "s")
        chat = [Message(role="user", content="a b")]
        reply = await model.chat(chat, Sampling(stop=("STOP",)), "c")
        assert (reply.text.split(), reply.finish) == (["one", "two", "three"], "stop")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.computed_tokens) == (4, 4, 8)
        chat += [Message(role="assistant", content=reply.text), Message(role="user", content="x")]
        second = await model.chat(chat, Sampling(max_tokens=2), "c")
        assert (second.text, second.finish, second.usage.completion_tokens) == ("one two", "length", 2)
        assert second.usage.computed_tokens == second.usage.prompt_tokens - 7 + 2
        await model.forget("c")
        third = await model.chat(chat, Sampling(max_tokens=2), "c")
        assert third.usage.computed_tokens == third.usage.prompt_tokens + 2

    asyncio.run(run())
    assert ScriptedModel(policy, "s").fingerprint() != ScriptedModel(policy, "t").fingerprint()


def test_prompts_of_a_served_model_are_counted_exactly_with_its_tokenizer_and_high_without(tmp_path: Path) -> None:
    chat = [Message(role="system", content="Play."), Message(role="user", content="Go to the sink 1, 水槽.")]
    directory = toy_model(tmp_path / "toy")
    exact, how = counter(str(directory))
    assert "endpoint.tokenizer" in how
    assert exact(chat) == len(ChatFormat(load_tokenizer(directory)).prompt_ids(chat))
    high, how = counter(None)
    assert "estimated" in how and high is estimate_tokens
    assert len("Play.Go to the sink 1, 水槽.") / 4 < estimate_tokens(chat) < bound_tokens(chat)
    assert bound_tokens(chat) >= exact(chat), "a byte-level tokenizer"
    with pytest.raises(ConfigError, match="no directory"):
        counter(str(tmp_path / "absent"))
