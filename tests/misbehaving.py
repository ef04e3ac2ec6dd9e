"""A real HTTP server that speaks OpenAI's chat completions and misbehaves on purpose; it runs in a thread.

What it does with a request is a function `(request number from 0, body) -> Act`. Knows nothing of the client.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = "-".join(("sk", "test", "0123456789", "a", "secret"))  # in parts, so that this file is no leak


@dataclass(frozen=True)
class Act:
    """What becomes of one request."""

    kind: str = "answer"
    """answer | status | garbage | hang | reset | half | body | raw (`text` is the body)"""
    text: str = "Thought: I look.\nAction: look"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    """For `status` and `body`: sent as JSON."""
    delay: float = 0.0
    usage: dict[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    finish: str | None = "stop"


Script = Callable[[int, dict[str, Any]], Act]


@dataclass
class Seen:
    """What the server has counted."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of requests that were answered with a completion: what a provider bills."""
    at_once: int = 0
    most_at_once: int = 0


def completion(act: Act, body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": act.text}
    made = {"id": "c", "object": "chat.completion", "created": 0, "model": body.get("model"),
            "choices": [{"index": 0, "message": message, "finish_reason": act.finish}]}  # fmt: skip
    return made | ({"usage": act.usage} if act.usage is not None else {})


async def perform(act: Act, request: web.Request, body: dict[str, Any], seen: Seen) -> web.StreamResponse:
    await asyncio.sleep(act.delay)
    if act.kind == "hang":
        await asyncio.sleep(60)
    if act.kind in ("reset", "half"):
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if act.kind == "half":
            response.content_length = 5000
        await response.prepare(request)
        await response.write(json.dumps(completion(act, body)).encode()[:40])
        assert request.transport
        request.transport.abort() if act.kind == "reset" else request.transport.close()
        return response
    if act.kind == "garbage":
        return web.Response(text="<html>Bad gateway</html>", content_type="text/html")
    if act.kind == "status":
        return web.json_response(act.body or {"error": {"message": "no"}}, status=act.status, headers=act.headers)
    seen.answered.append(body)
    if act.kind == "raw":
        return web.Response(text=act.text, content_type="application/json")
    return web.json_response(completion(act, body) if act.kind == "answer" else act.body)


@contextmanager
def serving(script: Script) -> Iterator[Seen]:
    """Serve until the block ends."""
    seen, loop, started = Seen(), asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(seen.bodies)
        seen.bodies.append(body)
        seen.keys.append(request.headers.get("Authorization", ""))
        seen.times.append(time.monotonic())
        seen.at_once += 1
        seen.most_at_once = max(seen.most_at_once, seen.at_once)
        try:
            return await perform(script(number, body), request, body, seen)
        finally:
            seen.at_once -= 1

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server and isinstance(site._server, asyncio.Server)
        seen.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield seen
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        loop.close()


def then(acts: Sequence[Act], afterwards: Act | None = None) -> Script:
    """The first requests get `acts`, all others `afterwards`."""
    return lambda number, _: acts[number] if number < len(acts) else afterwards or Act()
