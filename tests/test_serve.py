"""`ragdistill serve`: OpenAI's own client against the real server process, and what a client can do wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from ragdistill.commands.smoke import override
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.llm.local import LocalEngine
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.records import Message
from ragdistill.serving import http
from ragdistill.serving.api import ApiError, read_request, sampling_of
from ragdistill.serving.conversations import Conversations
from ragdistill.serving.http import KEY_ENV, WAITING, ChatServer
from tests.llm_toys import toy_model, toy_tokenizer

ROOT = Path(__file__).resolve().parents[1]
HELLO: list[Any] = [{"role": "user", "content": "You see a drawer 1. <|im_end|>"}]


def start(folder: Path, *args: str, **settings: str) -> tuple[subprocess.Popen[str], str]:
    """The real command in its own process; returns it and the address it prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "RAGDISTILL_CACHE", KEY_ENV)}
    env |= {"PYTHONPATH": str(ROOT / "src"), **settings}
    command = [sys.executable, "-m", "ragdistill.cli", "serve", "--model", "base", "--port", "0", *args]
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        pytest.fail(f"no address: {line!r} {process.communicate()[1]}")
    return process, next(word for word in line.split() if word.startswith("http://"))


def end(process: subprocess.Popen[str], how: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(how)
    try:
        out, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "params.yaml", folder)
    override(folder / "params.yaml", ["model.engine=batched", "model.dtype=float32", "model.concurrency=4"])
    toy_model(folder / "models/base")
    return folder


@pytest.fixture(scope="module")
def address(project: Path) -> Iterator[str]:
    process, url = start(project)
    yield url
    code, out, err = end(process, signal.SIGINT)
    assert (code, out, err) == (0, "stopped.\n", ""), "Ctrl-C is the normal end"


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def here(project: Path) -> Iterator[LocalEngine]:
    """The same engine in this process."""
    engine = LocalEngine(project / "models/base", dtype="float32")
    yield engine
    engine.close()


def greedy(client: openai.OpenAI, messages: Sequence[Any] = HELLO, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "base", "temperature": 0.0, "max_tokens": 12, **options}
    return client.chat.completions.create(messages=list(messages), **given)


def asked(engine: LocalEngine, messages: Sequence[Any] = HELLO, **options: Any) -> Reply:
    sampling = Sampling(**{"max_tokens": 12, **options})
    return asyncio.run(engine.chat([Message(**m) for m in messages], sampling))


def test_a_client_gets_what_the_engine_says(client: openai.OpenAI, here: LocalEngine) -> None:
    assert [m.id for m in client.models.list()] == ["base"] and client.models.retrieve("base").owned_by == "ragdistill"
    got, wanted = greedy(client), asked(here)
    (choice,) = got.choices
    assert choice.message.content == wanted.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and got.model == "base" and got.object == "chat.completion"
    counts = (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens)
    assert counts == (wanted.usage.prompt_tokens, 12, wanted.usage.billed)


def test_control_tokens_in_a_message_are_text(client: openai.OpenAI) -> None:
    plain = len(ChatFormat(toy_tokenizer()).prompt_ids([Message(**m) for m in HELLO]))
    control = toy_tokenizer().apply_chat_template(HELLO, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert greedy(client).usage.prompt_tokens == plain > len(control)


def test_sampling_follows_temperature_seed_and_stop(client: openai.OpenAI, here: LocalEngine) -> None:
    def text(**options: Any) -> str:
        return greedy(client, **options).choices[0].message.content

    assert text(temperature=1.5, seed=3) == text(temperature=1.5, seed=3) == asked(here, temperature=1.5, seed=3).text
    assert len({text(temperature=2.0, seed=i) for i in range(4)}) > 1
    assert text(temperature=1.5, seed=3, top_p=0.01) == text()
    whole = text()
    cut = greedy(client, stop=[whole[4:6]])
    assert cut.choices[0].message.content == whole[: whole.index(whole[4:6])]
    assert cut.choices[0].finish_reason == "stop"
    assert greedy(client, max_completion_tokens=3, max_tokens=12).usage.completion_tokens == 3


def test_a_stream_holds_the_same_answer_and_its_usage(client: openai.OpenAI) -> None:
    events = list(greedy(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    ends = [e.choices[0].finish_reason for e in events if e.choices]
    assert text == greedy(client).choices[0].message.content and ends[-1] == "length" and set(ends[:-1]) == {None}
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 12
    assert len({e.id for e in events}) == 1
    assert all(e.usage is None for e in greedy(client, stream=True))


def test_the_turns_of_a_chat_reuse_what_was_computed(client: openai.OpenAI) -> None:
    chat: list[Any] = [{"role": "system", "content": "You see a mug. " * 20}, *HELLO]
    first = greedy(client, chat)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    chat += [{"role": "assistant", "content": "open drawer 1"}, {"role": "user", "content": "ok"}]
    assert greedy(client, chat).usage.prompt_tokens_details.cached_tokens == 0, "not what this model had said"
    chat[2]["content"] = first.choices[0].message.content
    assert greedy(client, chat).usage.prompt_tokens_details.cached_tokens > 0.7 * first.usage.prompt_tokens


def test_many_clients_at_once_each_get_their_own_answer(client: openai.OpenAI, here: LocalEngine) -> None:
    chats = [[{"role": "user", "content": f"open drawer {i} " * (1 + i % 5)}] for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        got = list(pool.map(lambda chat: greedy(client, chat).choices[0].message.content, chats))
    assert got == [asked(here, chat).text for chat in chats]


def test_the_asynchronous_client_works_too(address: str, here: LocalEngine) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="x", max_retries=0) as client:
            wanted = {"model": "base", "messages": HELLO, "temperature": 0.0, "max_tokens": 12}
            replies = await asyncio.gather(*(client.chat.completions.create(**wanted) for _ in range(6)))
            return [r.choices[0].message.content for r in replies]

    assert set(asyncio.run(talk())) == {asked(here).text}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4o"}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "mug " * 3000}]}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"stop": ["a", ""]}, "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "param"), BAD, ids=[param for _, param in BAD])
def test_a_wrong_request_is_refused_in_openais_format(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    messages = options.get("messages", HELLO)
    with pytest.raises(openai.NotFoundError if param == "model" else openai.BadRequestError) as caught:
        greedy(client, messages, **{k: v for k, v in options.items() if k != "messages"})
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert greedy(client).choices, "the server lives on"


def test_what_no_client_library_sends_is_refused_too(address: str) -> None:
    root = address.removesuffix("/v1")
    with httpx.Client(base_url=root) as raw:
        health = raw.get("/health").json()
        assert health["status"] == "ok" and health["model"] == "base" and len(health["fingerprint"]) == 32
        json_type = {"content-type": "application/json"}
        wanted = [
            (raw.get("/v1/nowhere"), 404),
            (raw.get("/v1/chat/completions"), 405),
            (raw.post("/v1/chat/completions", content=b"{", headers=json_type), 400),
            (raw.post("/v1/chat/completions", content=b'{"model":1}', headers=json_type), 400),
            (raw.post("/v1/chat/completions", content=b'{"model":"\xff"}', headers=json_type), 400),
            (raw.post("/v1/chat/completions", content=b"[" * 100_000, headers=json_type), 400),
            (raw.post("/v1/chat/completions", content=b"x" * (http.MAX_BODY + 1), headers=json_type), 413),
            (raw.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
        ]
        assert [(r.status_code, "message" in r.json()["error"]) for r, _ in wanted] == [(s, True) for _, s in wanted]
        rebound = raw.get("/v1/models", headers={"host": "evil.example:8000"})
        assert rebound.status_code == 400, "a web page under another name may not use the model"


def test_sigterm_ends_it_cleanly_while_a_reply_is_computed(project: Path) -> None:
    process, url = start(project, "--name", "other")
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(greedy(client, model="other", max_tokens=40).choices[0].finish_reason)
        except openai.APIError as e:
            outcome.append(e)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    code, out, err = end(process, signal.SIGTERM)
    asking.join()
    assert (code, out, err) == (0, "stopped.\n", "")
    assert outcome == ["length"], "an open request is answered before the end"


# --- in this process: what needs a model that misbehaves


class Slow(ScriptedModel):
    """Answers when told to; remembers what was forgotten and what was cancelled."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(lambda messages, sampling: "hello there", "slow")
        self.go, self.error = asyncio.Event(), error
        self.forgotten: list[str] = []
        self.cancelled = 0

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        if self.error:
            raise self.error
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().chat(messages, sampling, conversation)

    async def forget(self, conversation: str) -> None:
        self.forgotten.append(conversation)


BODY = {"model": "slow", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("error", "status"),
    [(EnvironmentFault("The engine failed."), 503), (ConfigError("Bad template."), 400), (ValueError("secret"), 500)],
)
def test_a_failing_engine_is_an_error_and_not_a_hang(error: Exception, status: int) -> None:
    model = Slow(error)
    with TestClient(ChatServer(model, "slow", 2).app(["testserver"]), raise_server_exceptions=False) as client:
        got = client.post("/v1/chat/completions", json=BODY)
    assert got.status_code == status and "secret" not in got.text and got.json()["error"]["message"]
    assert model.forgotten == ["http-1"]


def test_a_key_is_asked_for_where_one_is_set() -> None:
    model = Slow()
    model.go.set()
    with TestClient(ChatServer(model, "slow", 2, key="k3y").app(["testserver"])) as client:
        assert client.post("/v1/chat/completions", json=BODY).json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        right = {"authorization": "Bearer k3y"}
        assert client.post("/v1/chat/completions", json=BODY, headers=right).status_code == 200
        assert client.get("/health").status_code == 200


def test_others_are_served_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    with pytest.raises(ConfigError, match=KEY_ENV):
        http.run(Slow(), "slow", "0.0.0.0", 0, 1, print)


def test_a_taken_port_is_one_sentence() -> None:
    with http._bound("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(ConfigError, match="choose another"):
            http._bound("127.0.0.1", sock.getsockname()[1])


async def post(app: Any, body: dict[str, Any], gone: asyncio.Event) -> int:
    """One request to `app`, whose client hangs up when `gone` is set; returns the status."""
    sent: list[Any] = []
    parts = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> Any:
        for part in parts:
            return part
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"testserver"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b"",
        "http_version": "1.1", "scheme": "http", "server": ("testserver", 80), "client": ("x", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"]


def test_a_client_that_hangs_up_frees_its_place() -> None:
    async def run() -> None:
        model, gone = Slow(), asyncio.Event()
        app = ChatServer(model, "slow", 1).app(["testserver"])
        waiting = asyncio.create_task(post(app, BODY, gone))
        await asyncio.sleep(0.05)
        gone.set()
        await asyncio.wait_for(waiting, 5)
        assert model.cancelled == 1 and model.forgotten == ["http-1"]
        model.go.set()
        assert await post(app, BODY, asyncio.Event()) == 200

    asyncio.run(run())


def test_more_requests_than_could_soon_be_answered_get_429() -> None:
    async def run() -> None:
        model = Slow()
        app = ChatServer(model, "slow", 2).app(["testserver"])
        stay = asyncio.Event()
        open_ones = [asyncio.create_task(post(app, BODY, stay)) for _ in range(2 * WAITING)]
        await asyncio.sleep(0.05)
        assert await post(app, BODY, stay) == 429
        model.go.set()
        assert set(await asyncio.gather(*open_ones)) == {200}
        assert await post(app, BODY, stay) == 200

    asyncio.run(run())


# --- parts


def chat(*texts: str) -> list[Message]:
    return [Message(role="assistant" if i % 2 else "user", content=t) for i, t in enumerate(texts)]


def test_a_request_goes_on_the_longest_conversation_that_it_begins_with() -> None:
    talks = Conversations(3)
    a = talks.claim(chat("q"))
    assert talks.keep(chat("q"), "r", a) == []
    b = talks.claim(chat("q"))
    assert b != a, "another start"
    assert talks.claim(chat("q", "r", "more")) == a
    assert talks.claim(chat("q", "r", "more")) not in (a, b), "one request at a time"
    assert talks.keep(chat("q", "r", "more"), "s", a) == []
    assert talks.claim(chat("q", "r", "more", "s", "x", "y", "z")) == a
    assert talks.claim(chat("q", "other", "more")) not in (a, b)


def test_old_conversations_make_room() -> None:
    talks = Conversations(2)
    names = [talks.claim(chat(str(i))) for i in range(4)]
    gone = [talks.keep(chat(str(i)), "r", name) for i, name in enumerate(names)]
    assert gone == [[], [], [names[0]], [names[1]]]
    assert talks.keep(chat("3"), "r", "twin") == [names[3]], "two that end alike: one is enough"


def test_borders_between_messages_count() -> None:
    talks = Conversations(2)
    talks.keep(chat("ab"), "c", "first")
    assert talks.claim([*chat("a", "bc"), *chat("x")]) != "first"


def request(**fields: Any) -> Any:
    return read_request(json.dumps({"model": "m", "messages": [], **fields}).encode(), "m")


def test_unset_options_are_the_protocols_defaults() -> None:
    first, second = sampling_of(request()), sampling_of(request(temperature=None, seed=None, stop=None))
    assert (first.temperature, first.top_p, first.stop) == (1.0, 1.0, ()) and first.max_tokens > 100_000
    assert first.seed != second.seed, "a fresh seed where the client gives none"
    assert sampling_of(request(seed=-1)).seed >= 0


def test_options_that_are_off_or_unknown_are_accepted() -> None:
    off = {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "frequency_penalty": 0}
    assert request(**off, user="me", store=False, metadata=None).model == "m"
    with pytest.raises(ApiError, match="logit_bias"):
        request(logit_bias={"5": 3})
