"""Served models against a real server that misbehaves: nothing is lost, nothing paid twice, no key is told."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.errors import BudgetError, ConfigError, EnvironmentFault
from ragdistill.llm import Reply, Sampling, endpoint, engine_of
from ragdistill.llm.counting import bound_tokens
from ragdistill.llm.endpoint import EndpointModel
from ragdistill.llm.limiter import START
from ragdistill.params import EndpointParams, PriceParams
from ragdistill.records import Message
from tests.misbehaving import KEY, Act, serving, then

PRICES = PriceParams(prompt=10.0, cached=5.0, completion=100.0)
GREEDY = Sampling(max_tokens=20)
STORM = Act("status", status=429, headers={"retry-after": "0.2"})
Outcomes = list[Reply | BaseException]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(endpoint, "_FIRST_BACKOFF", 0.05)


def settings(url: str, **change: Any) -> EndpointParams:
    basis = EndpointParams(
        base_url=url, model="m", api_key_env="TEST_KEY", tokenizer=None, deadline=5.0, retries=4, max_concurrency=16,
        prices=PRICES, budget=None, currency="EUR",
    )  # fmt: skip
    return msgspec.structs.replace(basis, **change)


def opened(tmp: Path, url: str, **change: Any) -> EndpointModel:
    return EndpointModel(settings(url, **change), tmp / "calls", tmp / "ledger.jsonl", "rollouts")


def question(i: int) -> list[Message]:
    return [Message(role="system", content="Play."), Message(role="user", content=f"Question {i}")]


async def answers(model: EndpointModel, questions: Sequence[int], sampling: Sampling = GREEDY) -> Outcomes:
    calls = (model.chat(question(i), sampling) for i in questions)
    return await asyncio.gather(*calls, return_exceptions=True)


def ask(model: EndpointModel, questions: Sequence[int], sampling: Sampling = GREEDY) -> Outcomes:
    return asyncio.run(answers(model, questions, sampling))


def told(result: Reply | BaseException) -> Reply:
    assert isinstance(result, Reply), result
    return result


def test_usage_is_the_server_s_and_cached_tokens_are_not_computed(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 900}}
    with serving(then([], Act(usage=usage))) as server:
        model = opened(tmp_path, server.url)
        reply = told(ask(model, [0])[0])
        model.close()
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.computed_tokens) == (1000, 10, 110)
    assert model.account.money == pytest.approx((100 * 10 + 900 * 5 + 10 * 100) / 1e6)
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], "seed" in body) == (0.0, 20, False)
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 5, "total_tokens": 5}, {"prompt_tokens": -1}], ids=str)
def test_a_server_that_reports_no_usage_is_counted_high(tmp_path: Path, usage: Any) -> None:
    with serving(then([], Act(usage=usage))) as server:
        model = opened(tmp_path, server.url)
        reply = told(ask(model, [0])[0])
        model.close()
    assert reply.finish == "stop", "nothing is wrong with what it says"
    assert reply.usage.prompt_tokens == model.count_tokens(question(0)) > 10
    assert reply.usage.completion_tokens > 5
    assert model.account.money == model.account.unsure_money == pytest.approx(worst(0))


def worst(i: int) -> float:
    """Most that a greedy call can cost."""
    return (bound_tokens(question(i)) * PRICES.prompt + GREEDY.max_tokens * PRICES.completion) / 1e6


UNUSABLE: dict[str, dict[str, Any]] = {
    "malformed": {"choices": [{"message": {"content": [{"type": "text", "text": "x"}]}, "finish_reason": "stop"}]},
    "refused": {"choices": [{"message": {"refusal": "I will not."}, "finish_reason": "stop"}]},
    "broken off": {"choices": [{"message": {"content": "Tho"}, "finish_reason": "error"}]},
    "empty": {"choices": []},
}


@pytest.mark.parametrize("body", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_reply_costs_what_the_server_says_or_else_its_worst(tmp_path: Path, body: dict[str, Any]) -> None:
    bill = {"prompt_tokens": 40, "completion_tokens": 20}
    with serving(then([Act("body", body=body | {"usage": bill}), Act("body", body=body)])) as server:
        model = opened(tmp_path, server.url)
        told_of, silent = (told(r) for r in ask(model, [0]) + ask(model, [1]))
        model.close()
    assert told_of.finish == silent.finish == "error"
    assert (told_of.usage.prompt_tokens, told_of.usage.completion_tokens) == (40, 20)
    assert silent.usage.completion_tokens == GREEDY.max_tokens, "our own words of a reason say nothing"
    assert model.account.unsure_money == pytest.approx(worst(1))
    assert model.account.money == pytest.approx((40 * 10 + 20 * 100) / 1e6 + worst(1))


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 30, "completion_tokens": "300"}, {"prompt_tokens": 10**40}])
def test_a_bill_that_is_not_told_cannot_exceed_the_budget(tmp_path: Path, usage: Any) -> None:
    """Each reply is worth 300 tokens, one a byte, though its text is short."""
    long = msgspec.structs.replace(GREEDY, max_tokens=300)
    body = UNUSABLE["malformed"] | {"usage": usage}
    with serving(then([], Act("body", body=body))) as server:
        model = opened(tmp_path, server.url, budget=0.1)
        results = ask(model, range(10), long)
        model.close()
    assert 0 < len(server.answered) * (30 * 10 + 300 * 100) / 1e6 <= 0.1
    assert any(isinstance(r, BudgetError) for r in results)


@pytest.mark.parametrize(
    ("act", "finish", "text"),
    [
        (Act(finish="length"), "length", "Thought"),
        (Act(finish="eos"), "stop", "Thought"),
        (Act(text=""), "stop", ""),
        (Act(finish="content_filter"), "error", "refusal: stopped by the server's content filter"),
        (Act(finish=None), "error", "broken off by the server"),
        (Act("body", body={"choices": []}), "error", "empty reply: no choices"),
        (Act("body", body={}), "error", "empty reply: no choices"),
        (Act("body", body=[1, 2]), "error", "malformed reply"),
        (Act("body", body={"choices": [{"message": {"content": 7}}]}), "error", "malformed reply"),
        (Act("raw", text='{"choices": [{"message": {"content": "Thought \\ud83d"}, "finish_reason": "length"}]}'),
         "length", "Thought ?"),
        (Act("raw", text='{"choices": [{"message": {"content": "x"}, "logprobs": NaN, "finish_reason": "stop"}]}'),
         "stop", "x"),
        (Act("raw", text='{"choices": [], "x": ' + "[" * 5000 + "]" * 5000 + "}"), "error", "malformed reply: nested"),
        (Act("body", body={"choices": [{"message": {"refusal": "I will not."}, "finish_reason": "stop"}]}), "error",
         "refusal: I will not."),
        (Act("body", body={"choices": [{"message": {"content": None}, "finish_reason": "tool_calls"}]}), "error",
         "malformed reply: a tool call"),
        (Act("status", status=400, body={"error": {"message": "m", "code": "context_length_exceeded"}}), "context", ""),
        (Act("status", status=400, body={"error": {"message": "m", "code": "content_filter"}}), "error", "refusal: m"),
        (Act("status", status=400, body={"error": {"message": "m", "code": "data_inspection_failed"}}), "error",
         "refusal: m"),
        (Act("status", status=400, body={"error": {"message": "Content Exists Risk"}}), "error", "refusal: Content"),
        (Act("status", status=400, body={"error": {"message": "Your request was flagged as potentially violating our "
         "usage policy."}}), "error", "refusal: Your request"),
        (Act("status", status=403, body={"error": {"code": 403, "message": "m requires moderation on OpenAI. Your "
         "input was flagged for \"harassment\".", "metadata": {"flagged_input": "x"}}}), "error", "refusal: m req"),
        (Act("status", status=403, body={"code": "The caller does not have permission", "error": "Content violates "
         "usage guidelines."}), "error", "refusal: "),
        (Act("status", status=422, body={"error": "`inputs` tokens + `max_new_tokens` must be <= 4096"}), "context",
         ""),
        (Act("status", status=400, body={"detail": "x" * 300 + " maximum context length is 4096"}), "context", ""),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_every_answer_is_an_outcome_with_a_reason_and_is_asked_for_once(
    tmp_path: Path, act: Act, finish: str, text: str
) -> None:
    with serving(then([], act)) as server:
        for _ in range(2):
            model = opened(tmp_path, server.url)
            reply = told(ask(model, [0])[0])
            model.close()
            assert (reply.finish, reply.text[: len(text)]) == (finish, text)
        assert len(server.bodies) == 1


BILLING = {"error": {"code": 429, "message": "You exceeded your quota, please check your plan and billing details."}}
FAULTS = {
    "429 storm with Retry-After": [STORM] * 3,
    "429s that speak of billing": [Act("status", status=429, body=body) for body in (BILLING, [BILLING])],
    "500s": [Act("status", status=500)] * 3,
    "503 with an HTML page": [Act("status", status=503)] * 2,
    "a gateway's 502s and 504s": [Act("status", status=502), Act("status", status=504)],
    "hung connections": [Act("hang")] * 2,
    "garbage bodies": [Act("garbage")] * 3,
    "connection reset in mid-stream": [Act("reset")] * 3,
    "body cut short": [Act("half")] * 3,
    "an error in a 200": [Act("body", body={"error": {"message": "upstream", "code": 502}})] * 2,
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_that_passes_loses_nothing_and_pays_each_answer_once(tmp_path: Path, fault: str) -> None:
    with serving(then(FAULTS[fault])) as server:
        model = opened(tmp_path, server.url, deadline=1.0 if "hung" in fault else 30.0)
        replies = ask(model, range(8))
        model.close()
        assert all(told(r).finish == "stop" for r in replies)
        again = opened(tmp_path, server.url)
        assert ask(again, range(8)) == replies
        again.close()
        billed = [b["messages"][1]["content"] for b in server.answered]
    assert len(set(billed)) == 8 and len(billed) == 8 + ("200" in fault) * len(FAULTS[fault])
    assert again.account.replayed_calls == 8 and again.account.paid_calls == 0 and again.account.money == 0
    assert model.account.paid_calls == 8
    assert model.account.failed_attempts == len(FAULTS[fault])
    refused = fault.startswith("429") or fault in ("500s", "503 with an HTML page")
    assert (model.account.unsure_money == 0) == refused, "all others may have been computed, and billed"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (STORM, "HTTP 429"),
        (Act("status", status=500), "HTTP 500"),
        (Act("garbage"), "no JSON"),
        (Act("reset"), "the connection failed"),
        (Act("hang"), "no answer within 0.5 s"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_fault_that_stays_is_the_infrastructure_s_after_bounded_attempts(tmp_path: Path, act: Act, says: str) -> None:
    with serving(then([], act)) as server:
        model = opened(tmp_path, server.url, deadline=0.5 if act.kind == "hang" else 30.0, retries=2)
        [error] = ask(model, [0])
        model.close()
    assert isinstance(error, EnvironmentFault) and says in str(error)
    assert len(server.bodies) == 3


def test_nobody_listening_is_a_fault_and_free(tmp_path: Path) -> None:
    model = opened(tmp_path, "http://127.0.0.1:9/v1", retries=1)
    [error] = ask(model, [0])
    model.close()
    assert isinstance(error, EnvironmentFault) and "ConnectError" in str(error)
    assert model.account.money == 0 and model.account.failed_attempts == 2


def test_retry_after_is_honoured_by_every_call(tmp_path: Path) -> None:
    acts = [Act("status", status=429, headers={"retry-after": "1"})]
    with serving(then(acts)) as server:
        model = opened(tmp_path, server.url)
        ask(model, range(20))
        model.close()
    early = [t - server.times[0] for t in server.times if t - server.times[0] < 0.95]
    assert len(early) <= START, "only those that were under way before the refusal"
    assert len(server.answered) == 20


LATE = f"Thu, 01 Jan 2026 00:00:00 +{'9' * 20}"


@pytest.mark.parametrize("asked", ["0", "Thu, 01 Jan 2026 00:00:00 GMT", "0.001", LATE])
def test_a_server_that_asks_for_no_wait_is_given_growing_ones(tmp_path: Path, asked: str) -> None:
    with serving(then([], Act("status", status=503, headers={"retry-after": asked}))) as server:
        model = opened(tmp_path, server.url)
        [error] = ask(model, [0])
        model.close()
    assert isinstance(error, EnvironmentFault) and len(server.times) == 5
    waits = [after - before for before, after in itertools.pairwise(server.times)]
    assert all(wait >= 0.025 * 2**n for n, wait in enumerate(waits)), waits


def test_a_pause_of_hours_is_reported_at_once(tmp_path: Path) -> None:
    with serving(then([], Act("status", status=429, headers={"retry-after": "7200"}))) as server:
        model = opened(tmp_path, server.url)
        began = time.monotonic()
        results = ask(model, range(20))
        model.close()
    assert time.monotonic() - began < 5
    assert all(isinstance(r, EnvironmentFault) and "asks to wait" in str(r) for r in results)
    assert len(server.bodies) <= START


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "refuses the key (HTTP 401)"),
        (403, {"error": {"message": "no"}}, "refuses the key (HTTP 403)"),
        (403, {"error": {"message": "Your account was flagged."}}, "refuses the key (HTTP 403)"),
        (401, {"error": {"message": "Your input was flagged."}}, "refuses the key (HTTP 401)"),
        (404, {"error": {"message": "The model `m` does not exist"}}, "does not know the model 'm' (HTTP 404)"),
        (402, {"error": {"message": "Insufficient Balance"}}, "no credit"),
        (429, {"error": {"message": "quota", "code": "insufficient_quota"}}, "no credit"),
        (400, {"error": {"message": f"bad parameter {KEY}"}}, "refuses the request (HTTP 400: "),
    ],
    ids=str,
)
def test_what_no_retry_mends_stops_everything_with_one_sentence(
    tmp_path: Path, status: int, body: Any, says: str
) -> None:
    with serving(then([], Act("status", status=status, body=body))) as server:
        model = opened(tmp_path, server.url)
        results = ask(model, range(30))
        model.close()
    assert all(isinstance(r, ConfigError) for r in results)
    message = str(results[0])
    assert says in message and message.endswith(".") and "\n" not in message and KEY not in message
    assert len(server.bodies) <= START, "calls that were not under way are not sent"


def test_a_newer_name_of_the_token_limit_is_found_out(tmp_path: Path) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."

    def script(_: int, body: dict[str, Any]) -> Act:
        return Act("status", status=400, body={"error": {"message": message}}) if "max_tokens" in body else Act()

    with serving(script) as server:
        model = opened(tmp_path, server.url)
        assert all(told(r).finish == "stop" for r in ask(model, range(3)))
        model.close()
    assert server.answered[-1]["max_completion_tokens"] == 20


def test_a_server_of_this_machine_is_asked_past_the_proxy_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(then([])) as proxy, serving(then([])) as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        for i, url in enumerate((server.url, server.url.replace("127.0.0.1", "localhost"), "http://model.test/v1")):
            model = opened(tmp_path, url, retries=0)
            told(ask(model, [i])[0])
            model.close()
        assert (len(server.keys), len(proxy.keys)) == (2, 1)


def test_equal_greedy_questions_are_one_call_and_seeds_part_sampled_ones(tmp_path: Path) -> None:
    with serving(then([], Act(delay=0.1))) as server:
        model = opened(tmp_path, server.url)
        ask(model, [1, 1, 1], GREEDY)
        ask(model, [1], msgspec.structs.replace(GREEDY, seed=7))
        assert len(server.bodies) == 1
        for seed in (1, 2, 1):
            ask(model, [1], Sampling(temperature=0.7, seed=seed))
        model.close()
    assert [b.get("seed") for b in server.bodies] == [None, 1, 2]


def test_a_caller_that_goes_away_does_not_break_off_a_paid_call(tmp_path: Path) -> None:
    async def impatient(model: EndpointModel) -> None:
        async with asyncio.timeout(0.2):
            await asyncio.gather(*(model.chat(question(i), GREEDY) for i in range(30)))

    with serving(then([], Act(delay=0.6))) as server:
        model = opened(tmp_path, server.url)
        with pytest.raises(TimeoutError):
            asyncio.run(impatient(model))
        model.close()
        assert len(server.answered) == len(server.bodies) == START, "those under way end, no others are sent"
        again = opened(tmp_path, server.url)
        ask(again, range(START))
        again.close()
        assert len(server.bodies) == START
    assert not [t for t in threading.enumerate() if t.name == "ragdistill-endpoint"]


def test_calls_after_closing_are_refused(tmp_path: Path) -> None:
    model = opened(tmp_path, "http://127.0.0.1:9/v1")
    model.close()
    model.close()
    with pytest.raises(EnvironmentFault, match="closed"):
        asyncio.run(model.chat(question(0), GREEDY))


def test_the_budget_is_never_exceeded_and_is_used_up(tmp_path: Path) -> None:
    """A call costs 0.002 (100 prompt and 10 completion tokens); its worst case is more."""
    with serving(then([], Act(delay=0.02))) as server:
        model = opened(tmp_path, server.url, budget=0.1)
        results = ask(model, range(100))
        model.close()
        paid = [r for r in results if isinstance(r, Reply)]
        assert all(isinstance(r, Reply | BudgetError) for r in results)
        assert 0.09 <= round(model.account.money, 6) == round(0.002 * len(server.answered), 6) <= 0.1
        assert len(paid) == len(server.answered)
        [error] = [str(r) for r in results if isinstance(r, BudgetError)][:1]
        assert "endpoint.budget of 0.10 EUR" in error and "raise endpoint.budget" in error
        again = opened(tmp_path, server.url, budget=0.1)
        more = ask(again, range(100))
        again.close()
        assert sum(isinstance(r, Reply) for r in more) == again.account.replayed_calls == len(paid)
        richer = opened(tmp_path, server.url, budget=1.0)
        assert all(isinstance(r, Reply) for r in ask(richer, range(100)))
        richer.close()
        assert len(server.answered) == 100


def test_the_budget_counts_hung_calls_at_their_worst(tmp_path: Path) -> None:
    with serving(then([], Act("hang"))) as server:
        model = opened(tmp_path, server.url, budget=0.02, deadline=0.5, retries=20)
        results = ask(model, range(10))
        model.close()
    assert any(isinstance(r, BudgetError) and "at worst" in str(r) for r in results)
    assert 0 < model.account.unsure_money <= 0.02
    assert model.account.failed_attempts >= len(server.bodies) > 0


@pytest.mark.parametrize("end", [RuntimeError("a bug"), asyncio.CancelledError()], ids=repr)
def test_a_call_that_ends_as_nobody_foresaw_counts_at_its_worst_and_holds_up_no_other(
    tmp_path: Path, end: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> Any:
        raise end

    model = opened(tmp_path, "http://127.0.0.1:9/v1", budget=0.005)
    monkeypatch.setattr(model._wire, "ask", broken)
    ended = ask(model, [0])
    assert isinstance(ended[0], RuntimeError | EnvironmentFault)
    assert 0.0025 < model.account.unsure_money < 0.005
    [second] = asyncio.run(asyncio.wait_for(answers(model, [1]), 10))
    model.close()
    assert isinstance(second, BudgetError)


def test_a_reply_is_kept_if_nobody_settles_it_and_settled_if_nobody_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with serving(then([])) as server:
        unsettled, again, unkept = (opened(tmp_path, server.url) for _ in range(3))
        monkeypatch.setattr(unsettled._ledger, "settle", killed)
        monkeypatch.setattr(unkept._journal, "put", killed)
        assert isinstance(ask(unsettled, [0])[0], RuntimeError) and told(ask(again, [0])[0]).finish == "stop"
        assert len(server.bodies) == 1, "it is not paid twice"
        assert isinstance(ask(unkept, [1])[0], RuntimeError) and unkept.account.paid_calls == 1
        for model in (unsettled, again, unkept):
            model.close()


def texts(tmp: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in tmp.rglob("*") if p.is_file()}


def test_the_key_reaches_no_file_log_repr_or_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server repeats the key wherever it can."""
    echo = {"error": {"message": f"key {KEY} is wrong", "code": KEY}}
    acts = [
        Act(text=f"Your key is {KEY}"), Act("status", status=500, body=echo), Act("body", body=echo),
        Act("body", body={"choices": [{"message": {"refusal": f"No, {KEY}"}, "finish_reason": "stop"}]}),
        Act("body", body={"choices": KEY}), Act("status", status=400, body={"error": {"message": f"safety {KEY}"}}),
        Act("garbage"), Act("reset"), Act(finish=KEY),
    ]  # fmt: skip
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with serving(then(acts, Act("status", status=401, body=echo))) as server:
        model = opened(tmp_path, server.url, max_concurrency=1)
        for i in range(9):
            [result] = ask(model, [i])
            said.append(repr(result))
            if isinstance(result, BaseException):
                said.append("".join(traceback.format_exception(result)))
        model.close()
        said += [repr(model), repr(model.account), repr(model._wire), repr(settings(server.url)), repr(vars(model))]
    assert any("ConfigError" in s for s in said) and any("***" in s for s in said)
    out, err = capfd.readouterr()
    written = texts(tmp_path)
    assert any(b"***" in data for data in written.values())
    for place in (*said, caplog.text, out, err, *(d.decode() for d in written.values()), *map(str, written)):
        assert KEY not in place


@pytest.mark.parametrize("value", ["", "  ", "two words", "käse", "a\nb", "drawer7"])
def test_a_variable_without_a_key_is_named_and_its_value_is_not(
    tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(ConfigError, match="TEST_KEY") as caught:
        opened(tmp_path, "http://127.0.0.1:9/v1")
    assert not value.strip() or value not in str(caught.value)


def test_without_a_variable_no_key_of_the_environment_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with serving(then([])) as server:
        model = opened(tmp_path, server.url, api_key_env=None)
        ask(model, [0])
        model.close()
    assert server.keys == ["Bearer none"]


def test_the_fingerprint_names_address_and_model_or_the_weights(tmp_path: Path) -> None:
    def of(url: str, model: str, identity: str = "") -> str:
        made = EndpointModel(settings(url, model=model), tmp_path / "c", tmp_path / "l", "s", identity)
        made.close()
        assert engine_of(made).words() == f"served model {model}"
        return made.fingerprint()

    assert of("http://a/v1", "m") == of("http://a/v1/", "m")
    assert len({of("http://a/v1", "m"), of("http://b/v1", "m"), of("http://a/v1", "n")}) == 3
    assert of("http://a/v1", "m", "weights") == of("http://b/v1", "m", "weights")


SCHEMA = (
    '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}'
)


NO_SCHEMAS = {"message": "response_format json_schema is not supported"}
EXTRA = {"type": "extra_forbidden", "loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}


@pytest.mark.parametrize(
    "said",
    [{"error": NO_SCHEMAS}, NO_SCHEMAS, [{"error": NO_SCHEMAS}], {"error": NO_SCHEMAS["message"]}, {"detail": [EXTRA]}],
    ids=["OpenAI", "flat", "list", "text", "FastAPI"],
)
def test_a_schema_is_sent_and_left_out_for_a_server_that_knows_none(tmp_path: Path, said: Any) -> None:
    bound = msgspec.structs.replace(GREEDY, schema=SCHEMA)
    refusal = Act("status", status=400, body=said)
    with serving(then([], Act())) as server:
        model = opened(tmp_path / "a", server.url)
        assert all(told(r).finish == "stop" for r in ask(model, [0], bound) + ask(model, [1]))
        model.close()
    assert server.bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["n"]
    assert "response_format" not in server.bodies[1]
    with serving(lambda _, body: refusal if "response_format" in body else Act()) as server:
        model = opened(tmp_path / "b", server.url)
        assert all(told(r).finish == "stop" for r in ask(model, range(3), bound))
        model.close()
    assert len(server.answered) == 3
