"""vLLM as a process of ours: started, checked, given students, ended with us; and, where it is installed, the real one.

The fake speaks the few routes that are used. The real server is asked where RAGDISTILL_VLLM_PYTHON names its
interpreter.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.errors import ConfigError, EnvironmentFault, IdentityError
from ragdistill.hints.extract import schema
from ragdistill.hints.rankers import CHOICE_SCHEMA
from ragdistill.llm import ChatModel, Engine, Reply, Sampling, engine_of
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.llm.endpoint import EndpointModel
from ragdistill.llm.local import LocalEngine
from ragdistill.llm.weights import load_merged
from ragdistill.params import load_params
from ragdistill.records import Message
from ragdistill.serving import parity, vllm
from ragdistill.serving.vllm import PYTHON_ENV, VllmServer, interpreter, whole_prompts
from ragdistill.serving.vllm_chat import VllmChat
from ragdistill.stages.playing import open_model
from tests.llm_toys import toy_model, toy_tokenizer
from tests.misbehaving import KEY
from tests.serving_toys import CHATS, make_adapter, taught_model

import torch  # isort: skip  (after the engine, which prepares the process)

ROOT = Path(__file__).resolve().parents[1]
FORM = ChatFormat(toy_tokenizer())
SHORT = json.dumps(
    {
        "type": "object",
        "properties": {"way": {"enum": ["left", "right"]}},
        "required": ["way"],
        "additionalProperties": False,
    }
)
"""A form that ends, whatever a model with random weights would rather say."""

FAKE = """
import argparse, http.server, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--served-model-name")
args, rest = parser.parse_known_args()
here = pathlib.Path(__file__).parent
(here / "started.json").write_text(json.dumps({"argv": sys.argv[1:], "pid": os.getpid(), "env": dict(os.environ)}))
if "--fail" in rest:
    print("RuntimeError: no such device"); sys.exit(3)
if "--hang" in rest:
    time.sleep(600)
if os.fork() == 0:  # as vLLM's engine does, in the same group
    time.sleep(600); os._exit(0)
models = {args.served_model_name: None}
ODD = {
    90: b"<html>busy</html>", 91: b"[]", 92: b'{"choices": [null], "usage": {}}', 93: b'{"choices": [{"text": null}], ',
    94: b'{"choices": [{"text": null}], "usage": {"completion_tokens": 1}}', 95: b'{"choices": 1, "usage": 1}',
}

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, data):
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status); self.send_header("content-type", "application/json")
        self.send_header("location", "/health")
        self.send_header("content-length", str(len(raw))); self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *_): pass
    def do_GET(self):
        if self.path == "/v1/models":
            return self.answer(200, {"data": [{"id": m, "parent": p} for m, p in models.items()]})
        self.answer(302 if "/moved" in self.path else 200, {"version": "fake"})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with (here / "asked.jsonl").open("a") as f:
            f.write(json.dumps({"path": self.path, "key": self.headers["authorization"], **body}) + "\\n")
        echo = {"error": {"message": "no, " + self.headers["authorization"]}}
        if "echo" in body.get("lora_name", "") or body.get("seed") == 99:
            return self.answer(400, echo)
        if body.get("seed") in ODD:
            return self.answer(200, ODD[body["seed"]])
        if "response_format" in body and body["seed"] == 98:
            return self.answer(400, {"error": {"message": "No structured outputs backend."}})
        if self.path == "/v1/load_lora_adapter":
            models[body["lora_name"]] = args.served_model_name
            return self.answer(200, "ok")
        if self.path == "/v1/unload_lora_adapter":
            models.pop(body["lora_name"], None)
            return self.answer(200, "ok")
        if body["model"] not in models:
            return self.answer(404, {"error": {"message": "no such model"}})
        if body["max_tokens"] == 13:
            return self.answer(200, {"choices": []})
        cached = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        cached["prompt_tokens_details"] = {"cached_tokens": 5}
        end = "length" if body["max_tokens"] <= 3 else "stop"
        said = f"says {body['model']}" if body["seed"] != 97 else "I was sent " + self.headers["authorization"]
        self.answer(200, {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "usage": cached,
                          "choices": [{"index": 0, "text": said, "finish_reason": end}]})

http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_model(tmp_path_factory.mktemp("base"), 32)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("students") / "distilled-0")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """An "interpreter" whose vLLM is the fake."""
    package = tmp_path / "site/vllm/entrypoints/openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def start(python: Path, base: Path, *args: str, adapters: Sequence[Path] = (), timeout: float = 60.0) -> VllmServer:
    return vllm.start(python, base, adapters, python.parent / "log/server.log", 1024, timeout, args)


def started(python: Path) -> dict[str, Any]:
    return json.loads((python.parent / "site/vllm/entrypoints/openai/started.json").read_text())


def questions(python: Path) -> list[dict[str, Any]]:
    path = python.parent / "site/vllm/entrypoints/openai/asked.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def group_lives(pid: int) -> bool:
    """Whether any process of the group that the server belonged to is left (zombies do not count)."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            return True
    return False


def ask(model: ChatModel, chat: Sequence[Message], **options: Any) -> Reply:
    return asyncio.run(model.chat(chat, Sampling(**{"max_tokens": 24, **options})))


def test_a_server_is_started_checked_and_ended_with_all_its_children(fake: Path, base: Path) -> None:
    with start(fake, base) as server:
        assert server.healthy() and server.version() == "fake"
        told = started(fake)
        line = " ".join(told["argv"])
        for part in ("--host 127.0.0.1", "--enable-prefix-caching", "--enable-lora", "--max-model-len 1024"):
            assert part in line
        assert server.key not in line and told["env"][vllm.KEY_ENV] == server.key, "no key on a command line"
        group = os.getpgid(told["pid"])
        assert group != os.getpgrp() and group_lives(group)
    assert not group_lives(group) and not server.healthy()
    server.stop()


def test_the_documented_server_runs_as_ours_does(base: Path) -> None:
    """One that lacks an argument answers, but otherwise: with a repetition penalty, without students, without reuse."""
    (said,) = re.findall(r"vllm serve .*?(?=\ndvc)", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    own = [a for a in vllm.command(Path("python"), base, 8000, 8192, 64, []) if a.startswith("--")]
    assert set(own) - set(said.split()) == {"--model", "--served-model-name"}
    assert "--generation-config vllm" in said and "--max-lora-rank 64" in said
    profiles = (ROOT / "profiles").glob("paper-*.yaml")
    assert max(int(r) for p in profiles for r in re.findall(r"lora: \{r: (\d+)", p.read_text())) == 64


def test_a_server_ends_with_its_owner_even_after_kill_9(fake: Path, base: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ragdistill.serving import vllm\n"
        "fake, base = map(Path, sys.argv[1:])\n"
        "server = vllm.start(fake, base, [], fake.with_suffix('.log'), 64, 60)\n"
        "print('up', flush=True); time.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    owner = subprocess.Popen([sys.executable, "-c", code, str(fake), str(base)], stdout=subprocess.PIPE, env=env)
    assert owner.stdout and owner.stdout.readline() == b"up\n"
    group = os.getpgid(started(fake)["pid"])
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 20
    while group_lives(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(group)


@pytest.mark.parametrize(("arg", "reason"), [("--fail", "status 3.*no such device"), ("--hang", "not healthy after")])
def test_a_server_that_does_not_come_up_is_one_sentence_and_leaves_nothing(
    fake: Path, base: Path, arg: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        start(fake, base, arg, timeout=2.0 if arg == "--hang" else 60.0)
    with pytest.raises(ProcessLookupError):
        os.kill(started(fake)["pid"], 0)


def test_a_student_has_a_name_of_its_content_and_only_on_its_base(
    fake: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    twin = make_adapter(base, tmp_path / "other/distilled-0", ["look", "look"])
    with start(fake, base, adapters=[adapter]) as server:
        assert "--max-lora-rank 8" in " ".join(started(fake)["argv"])
        names = [server.load(base, adapter), server.load(base, twin), server.load(base, adapter)]
        assert names[0] == names[2] != names[1] and names[0].startswith("distilled-0-")
        loads = [q for q in questions(fake) if q["path"].endswith("load_lora_adapter")]
        assert [q["lora_name"] for q in loads] == names[:2], "each is loaded once"
        with pytest.raises(IdentityError, match="trained on base"):
            server.load(toy_model(tmp_path / "stranger", seed=9), adapter)
        server.unload(names[0])
        assert server.load(base, adapter) == names[0] and len(questions(fake)) == 4


def test_prompts_arrive_as_the_ids_that_other_engines_read(fake: Path, base: Path, adapter: Path) -> None:
    server = start(fake, base)
    model = VllmChat(server, base, adapter, 2, server.stop)
    reply = ask(model, CHATS[0][:1], temperature=0.5, seed=7, stop=("\n",), top_p=0.9)
    *_, asked = questions(fake)
    prompt = FORM.prompt_ids(CHATS[0][:1])
    assert asked["prompt"] == prompt, "a control token in the text stays text"
    assert asked["stop_token_ids"] == sorted(FORM.stop_ids) and asked["model"].startswith("distilled-0-")
    assert (asked["temperature"], asked["seed"], asked["stop"], asked["top_p"]) == (0.5, 7, ["\n"], 0.9)
    assert asked["key"] == f"Bearer {server.key}"
    assert reply.text == f"says {asked['model']}" and reply.finish == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.computed_tokens) == (len(prompt), len(prompt) - 5 + 3)
    assert ask(model, CHATS[0][:1], max_tokens=3).finish == "length"
    long = [Message(role="user", content="mug " * 2000)]
    assert ask(model, long).finish == "context" and len(questions(fake)) == 3, "not even asked"
    with pytest.raises(EnvironmentFault, match="without a choice"):
        ask(model, CHATS[0][:1], max_tokens=13)
    model.close()
    assert not server.healthy(), "it was started for this model alone"
    with pytest.raises(RuntimeError):
        ask(model, CHATS[0][:1])


def test_a_server_that_repeats_its_key_is_repeated_without_it(
    fake: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One given by address, to which the user's own key is sent: what it says ends in trajectories and logs."""
    with start(fake, base) as own:
        monkeypatch.setenv(vllm.KEY_ENV, KEY)
        server = vllm.connect(own.url)
        model = VllmChat(server, base, adapter, 2, lambda: None)
        with pytest.raises(EnvironmentFault, match=r"no, Bearer \*\*\*") as refused:
            ask(model, CHATS[0][:1], seed=99)
        with pytest.raises(EnvironmentFault, match=r"no, Bearer \*\*\*") as unloaded:
            server.load(base, make_adapter(base, tmp_path / "echo-0"))
        assert ask(model, CHATS[0][:1], seed=97).text == "I was sent Bearer ***"
        model.close()
    assert questions(fake)[-1]["key"] == f"Bearer {KEY}", "it was sent"
    assert KEY not in f"{refused.value!r}{unloaded.value!r}"
    monkeypatch.setenv(vllm.KEY_ENV, f"{KEY}\nX: y")
    with pytest.raises(ConfigError, match="holds something that is no key") as broken:
        vllm.connect(own.url)
    assert KEY not in str(broken.value)


def test_a_schema_is_sent_and_left_out_for_a_server_that_cannot_constrain(fake: Path, base: Path) -> None:
    schema = '{"type": "object"}'
    with start(fake, base) as server:
        model = VllmChat(server, base, None, 2, lambda: None)
        ask(model, CHATS[0][:1], schema=schema)
        ask(model, CHATS[0][:1])
        assert ask(model, CHATS[0][:1], schema=schema, seed=98).text.startswith("says")
        ask(model, CHATS[0][:1], schema=schema)
        model.close()
    sent = [q.get("response_format", {}).get("type") for q in questions(fake)]
    assert sent == ["json_schema", None, "json_schema", None, None]
    assert questions(fake)[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize("seed", range(90, 96))
def test_an_answer_that_is_none_is_the_server_s_fault(fake: Path, base: Path, seed: int) -> None:
    with start(fake, base) as server:
        model = VllmChat(server, base, None, 2, lambda: None)
        with pytest.raises(EnvironmentFault, match=r"no completion|without a choice"):
            ask(model, CHATS[0][:1], seed=seed)
        model.close()


def test_our_own_server_is_asked_past_the_proxy_and_no_redirect_gets_the_key(
    fake: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with start(fake, base, timeout=20.0) as server:
        model = VllmChat(server, base, None, 2, lambda: None)
        assert ask(model, CHATS[0][:1]).text.startswith("says")
        model.close()
        assert not VllmServer(server.url.replace("/v1", "/moved/v1"), server.key, "").healthy()


def test_a_port_that_speaks_no_http_is_one_sentence() -> None:
    def greet() -> None:
        peer, _ = door.accept()
        peer.sendall(b"SSH-2.0-OpenSSH_9\r\n")
        peer.close()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=greet).start()
        with pytest.raises(ConfigError, match="does not answer /health"):
            vllm.connect(f"http://127.0.0.1:{door.getsockname()[1]}/v1")


def test_base_and_students_are_different_models(fake: Path, base: Path, adapter: Path) -> None:
    with start(fake, base) as server:
        plain, student = (VllmChat(server, base, a, 2, lambda: None) for a in (None, adapter))
        assert len({plain.fingerprint(), student.fingerprint()}) == 2
        assert engine_of(plain) == engine_of(student) == Engine(name="vLLM", version=server.version())
        assert ask(plain, CHATS[0][:1]).text == f"says {server.base_name}" != ask(student, CHATS[0][:1]).text
        plain.close()
        student.close()
        assert server.healthy()


def test_the_engine_of_the_parameters_starts_one_or_asks_a_given_one(
    fake: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(ROOT / "params.yaml")
    change = msgspec.structs.replace
    monkeypatch.setenv("RAGDISTILL_CACHE", str(fake.parent / "cache"))
    monkeypatch.setenv(PYTHON_ENV, str(fake))
    params = change(params, model=change(params.model, engine="vllm"))
    own = open_model(params, base, adapter)
    assert "distilled-0" in ask(own, CHATS[0][:1]).text
    assert ("--no-enable-chunked-prefill" in started(fake)["argv"]) == (not torch.cuda.is_available())
    own.close()
    quick = change(params, vllm=change(params.vllm, args=("--max-num-seqs", "8", "--swap-space=1")))
    exact = change(quick, model=change(params.model, dtype="float32"))
    small = change(params, vllm=change(params.vllm, args=("--quantization", "fp8")))
    models = [open_model(p, base, adapter) for p in (quick, exact, small)]
    for model in models:
        model.close()
    assert models[0].fingerprint() == own.fingerprint(), "what is only speed plays nothing again"
    assert len({m.fingerprint() for m in models}) == 3, "another precision is another model"
    with start(fake, base) as server:
        monkeypatch.setenv(vllm.KEY_ENV, server.key)
        given = open_model(change(params, vllm=change(params.vllm, url=server.url)), base, adapter)
        assert "distilled-0" in ask(given, CHATS[0][:1]).text
        given.close()
        assert server.healthy(), "not ours to stop"
    with pytest.raises(ConfigError, match="does not answer"):
        open_model(change(params, vllm=change(params.vllm, url="http://127.0.0.1:9/v1")), base, adapter)


def test_without_vllm_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_ENV, raising=False)
    with pytest.raises(ConfigError, match=f"environment of its own.*{PYTHON_ENV}"):
        interpreter(None)
    with pytest.raises(ConfigError, match="no/such"):
        interpreter("/no/such/python")


# --- the real server


@pytest.fixture(scope="module")
def real(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    if not os.environ.get(PYTHON_ENV):
        pytest.skip(f"vLLM is optional: {PYTHON_ENV} names no interpreter")
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    args = ("--dtype", "float32", "--max-loras", "1", *([] if torch.cuda.is_available() else whole_prompts(1024)))
    with vllm.start(interpreter(None), base, [adapter], log, 1024, 600, args) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_vllm_says_what_our_engine_says_and_keeps_students_apart(
    real: VllmServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    twin = make_adapter(base, tmp_path / "twin", ["look", "open cabinet 2"])
    turns = [chat[:i] for chat in CHATS for i in (1, 3)]
    models = [None, adapter, twin]
    served = {a: VllmChat(real, base, a, 4, lambda: None) for a in models}
    said: dict[Path | None, list[list[str]]] = {a: [] for a in models}
    for _ in range(2):  # the second time from the prefix cache, after the others have used the only LoRA slot
        for a in models:
            said[a].append([ask(served[a], turn).text for turn in turns])
    for a in models:
        engine = LocalEngine(base, a, dtype="float32")
        wanted = [ask(engine, turn).text for turn in turns]
        engine.close()
        assert said[a] == [wanted, wanted], a
    assert len({str(v) for v in said.values()}) == 3
    student, plain = parity.load_adapted(base, adapter), load_merged(base, None, torch.float32)
    row = parity.served("vLLM", served[adapter], FORM, CHATS, student, plain, 1.0)
    assert row.ok and (row.base_agreement or 0) < 1.0
    for model in served.values():
        model.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_vllm_survives_many_long_prompts_of_sampled_episodes_at_once(real: VllmServer, base: Path) -> None:
    """vLLM reads prompts in parts where they exceed its batch, and on CPUs that ended it: each request has a seed."""
    model = VllmChat(real, base, None, 24, lambda: None)
    turns = [[Message(role="user", content=f"{i} " + "look " * 200)] for i in range(24)]
    assert sum(len(FORM.prompt_ids(t)) for t in turns) > 4096, "more than one batch"

    async def sampled() -> list[Reply]:
        drawn = [Sampling(temperature=1.0, seed=i, max_tokens=8) for i in range(len(turns))]
        return await asyncio.gather(*map(model.chat, turns, drawn))

    assert len(asyncio.run(sampled())) == len(turns) and real.healthy()
    model.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_vllm_writes_hints_in_the_form_that_is_asked_through_both_clients(
    real: VllmServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy model has never seen JSON, so that only the server's constraint can make it write some."""
    monkeypatch.setenv("TEST_KEY", real.key)
    asked = msgspec.structs.replace(
        load_params(ROOT / "params.yaml").endpoint, base_url=real.url, model=real.base_name, api_key_env="TEST_KEY"
    )
    clients: list[Any] = [
        VllmChat(real, base, None, 2, lambda: None),
        EndpointModel(asked, tmp_path / "calls", tmp_path / "ledger.jsonl", "hints"),
    ]
    for model in clients:
        freely = ask(model, CHATS[0][:1], temperature=1.0, seed=1, max_tokens=100).text
        assert "{" not in freely[:1]
        for text, name in ((schema(3), "hints"), (CHOICE_SCHEMA, "numbers")):
            reply = ask(model, CHATS[0][:1], temperature=1.0, seed=1, max_tokens=100, schema=text)
            assert re.match(rf'\s*{{\s*"{name}"\s*:\s*\[', reply.text), "a list without end, yet of the form"
        reply = ask(model, CHATS[0][:1], temperature=1.0, seed=1, max_tokens=100, schema=SHORT)
        assert reply.finish == "stop" and json.loads(reply.text) in ({"way": "left"}, {"way": "right"})
        model.close()
