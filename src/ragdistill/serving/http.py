"""An OpenAI-compatible HTTP server in front of one `ChatModel`: `/v1/models`, `/v1/chat/completions`, `/health`.

starlette and uvicorn do the HTTP. A client that hangs up frees its place; more requests than the engine could soon
answer get 429. Only JSON is accepted, and only under this machine's own name, so that a web page that is open in a
browser cannot use the model. This module knows no engine.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ragdistill.checks import is_loopback
from ragdistill.errors import ConfigError, RagdistillError
from ragdistill.llm import ChatModel, Reply, Sampling
from ragdistill.records import Message
from ragdistill.serving import api
from ragdistill.serving.api import ApiError
from ragdistill.serving.conversations import Conversations

KEY_ENV = "RAGDISTILL_SERVE_KEY"
"""Environment variable with the key that clients must send; without it there is none."""
MAX_BODY = 8 << 20
"""Bytes of a request; a context of text is far less."""
WAITING = 8
"""Requests that may be open for each one that the engine computes at once."""
GRACE = 5
"""Seconds that open requests get when the server is stopped."""
_HERE = ["127.0.0.1", "localhost", "[::1]"]


class ChatServer:
    """The application's state: the model, its name, its conversations, how many requests are open."""

    def __init__(self, model: ChatModel, name: str, concurrency: int, key: str = "") -> None:
        self._model, self._name, self._key = model, name, key
        self._most, self._open = concurrency * WAITING, 0
        self._talks = Conversations(concurrency)
        self._started = int(time.time())

    def app(self, hosts: list[str]) -> Starlette:
        """The ASGI application; requests for other host names than `hosts` are refused."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._list),
                Route("/v1/models/{name:path}", self._one),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                ApiError: _refused,
                HTTPException: _not_there,
                RagdistillError: _failed,
                Exception: _bug,
            },
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self._name, "fingerprint": self._model.fingerprint()})

    async def _list(self, request: Request) -> Response:
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one(self, request: Request) -> Response:
        self._authorise(request)
        if request.path_params["name"] != self._name:
            raise ApiError(404, f"This server has only `{self._name}`.", param="model", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "ragdistill"}

    async def _chat(self, request: Request) -> Response:
        self._authorise(request)
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The content type has to be application/json.")
        asked = api.read_request(await _body(request), self._name)
        messages, sampling = api.chat_of(asked), api.sampling_of(asked)
        if self._open >= self._most:
            raise ApiError(429, "Too many requests are open; try again in a moment.", code="rate_limit_exceeded")
        self._open += 1
        try:
            reply = await _unless_gone(request, self._answer(messages, sampling))
        finally:
            self._open -= 1
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name,
            "system_fingerprint": f"fp_{self._model.fingerprint()[:12]}",
        }  # fmt: skip
        if not asked.stream:
            return JSONResponse(api.completion(reply, head))
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return StreamingResponse(api.chunks(reply, head, usage), media_type="text/event-stream")

    async def _answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        talk = self._talks.claim(messages)
        try:
            reply = await self._model.chat(messages, sampling, talk)
        except BaseException:  # also when the client hung up: what is cached of the conversation is no use
            await self._model.forget(talk)
            raise
        if reply.finish == "context" and not reply.usage.completion_tokens:
            await self._model.forget(talk)
            message = f"The messages are {reply.usage.prompt_tokens} tokens, more than this model's context holds."
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        for old in self._talks.keep(messages, reply.text, talk):
            await self._model.forget(old)
        return reply

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")


def run(model: ChatModel, name: str, host: str, port: int, concurrency: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, then let open requests end for `GRACE` seconds.

    `ready` is told the address once requests are accepted (`port` 0 takes a free one). `ConfigError` when the port is
    taken, or when others could reach the server and no key is set.
    """
    key = os.environ.get(KEY_ENV, "")
    local = is_loopback(host)
    if not local and not key:
        raise ConfigError(f"{host} can be reached by others; set {KEY_ENV} to a key that clients must send.")
    with _bound(host, port) as sock:
        where = sock.getsockname()[:2]
        app = ChatServer(model, name, concurrency, key).app([*_HERE, host] if local else ["*"])
        config = uvicorn.Config(
            app, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn ends by raising what stopped it again
        sock.listen(128)
        ready(f"http://{f'[{where[0]}]' if ':' in where[0] else where[0]}:{where[1]}/v1")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[sock])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as e:
        raise ConfigError(f"{host}:{port} cannot be served ({e}); choose another --host or --port.") from None
    return sock


async def _body(request: Request) -> bytes:
    """The whole body, while it is not too large (starlette's own limit does not answer in OpenAI's format)."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"The body is larger than {MAX_BODY >> 20} MiB.")
    return bytes(body)


async def _unless_gone(request: Request, work: Awaitable[Reply]) -> Reply:
    """The result of `work`, which is cancelled when the client hangs up first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hangup(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client hung up.")
        return task.result()
    finally:
        for left in (task, watcher):
            left.cancel()


async def _hangup(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101  (registered for it only)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  (registered for it only)
    what = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(ApiError(error.status_code, what).body(), error.status_code)


async def _failed(_: Request, error: Exception) -> Response:
    """A designed error: the chat does not fit the template, or the engine broke."""
    status = 400 if isinstance(error, ConfigError) else 503
    return JSONResponse(ApiError(status, str(error)).body(), status)


async def _bug(_: Request, error: Exception) -> Response:
    """Anything else; its traceback goes to the server's log and not to the client."""
    return JSONResponse(ApiError(500, f"The server failed ({type(error).__name__}).").body(), 500)
