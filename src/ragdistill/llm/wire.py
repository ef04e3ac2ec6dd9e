"""One attempt of one chat call over HTTP, and what became of it. The only module that imports `openai`.

Every end has a kind: an `Answer` (a reply to play, or finish "error" with the reason why there is none), a `Failure`
that another attempt may mend, or a `ConfigError` that no attempt mends (key, model, address, credit, a parameter the
server refuses). The body is decoded here, because the client accepts anything. Whatever a server says is
untrusted, and may repeat the key: texts pass `Wire.clean`. Knows no retries, no money and no journal.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ragdistill.checks import on_this_machine
from ragdistill.errors import ConfigError
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.keys import clean, hide
from ragdistill.records import Message, Usage

if TYPE_CHECKING:
    from openai import APIStatusError

_UNSENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"}
"""Transport errors of a request that never left: nothing can be billed."""
_TOO_LONG = (
    "context_length", "context length", "context size", "maximum context", "too many tokens", "too long",
    "tokens + `max_new_tokens` must be",
)  # fmt: skip
_REFUSED = (
    "content_filter", "content_policy", "content management policy", "invalid_prompt", "safety",
    "data_inspection_failed", "datainspectionfailed", "inappropriate content", "content exists risk",
    "requires moderation", "input was flagged", "flagged as potentially violating", "violates usage guidelines",
)  # fmt: skip
_NO_CREDIT = "insufficient_quota"
"""A code or type. What is said beside it decides nothing: limits a minute speak of plan and billing too."""
NO_SCHEMAS = ("response_format", "json_schema")
"""In the words of a server that refuses a reply's form."""
_GATEWAY = (502, 504, 520, 524)
"""Statuses of a proxy that heard no end from the server behind it, which may have computed (52x are Cloudflare's)."""
_CAP_NAMES = ("max_tokens", "max_completion_tokens")
"""Two names of the same limit: the servers' usual one, and the only one that OpenAI's newer models take."""
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
"""Tokens; more of them are no number to compute money with."""


class _Details(msgspec.Struct):
    cached_tokens: Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Count
    completion_tokens: Count
    prompt_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Bill(msgspec.Struct):
    usage: _Usage | None = None


class _Body(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: _Error | None = None


@dataclass(frozen=True)
class Answer:
    """The server answered; what it says it bills, if it says so."""

    reply: Reply
    reported: bool
    """Whether the usage is the server's own."""


@dataclass(frozen=True)
class Failure:
    """No answer; another attempt may have one."""

    reason: str
    after: float | None = None
    """Seconds the server asks to wait."""
    at_once: bool = False
    """The next attempt asks differently, so nothing has to pass before it."""
    unsure: bool = False
    """The server may have computed, and may bill, an answer that never came."""
    crowded: bool = True
    """Fewer calls at once may help."""


class Wire:
    """An `openai` client of one address and model; use it inside one event loop."""

    def __init__(self, base_url: str, model: str, key: str | None, deadline: float) -> None:
        """`key` is held in memory only. `deadline`: seconds an attempt may take, connection and body included."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self._base_url, self._model, self._key, self._deadline = base_url, model, key, deadline
        self._cap, self._schemas = _CAP_NAMES[0], True
        self._client = AsyncOpenAI(
            base_url=base_url, api_key=key or "none", timeout=deadline, max_retries=0,
            http_client=DefaultAsyncHttpxClient(trust_env=not on_this_machine(base_url)),
        )  # fmt: skip

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    def clean(self, text: str) -> str:
        """A server's words without the key, on one line, cut."""
        return clean(text, self._key)

    async def ask(self, messages: Sequence[Message], sampling: Sampling) -> Answer | Failure:
        """Send one request and say what became of it; raises `ConfigError` for what no other attempt would mend."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        cap, formed = self._cap, bool(sampling.schema) and self._schemas
        try:
            async with asyncio.timeout(self._deadline):
                body = self._request(messages, sampling, cap, formed)
                raw = await self._client.chat.completions.with_raw_response.create(**body)
                return self._read(raw.content)
        except (TimeoutError, APIConnectionError) as e:
            cause = type(e.__cause__).__name__
            if isinstance(e, TimeoutError) or (cause not in _UNSENT and "Timeout" in cause):
                return Failure(f"no answer within {self._deadline:g} s", unsure=True)
            return Failure(f"the connection failed ({cause})", unsure=cause not in _UNSENT)
        except APIStatusError as e:
            return self._refused(e, cap, formed)
        except OpenAIError as e:
            return Failure(f"the client failed ({type(e).__name__})", unsure=True)

    def _request(self, messages: Sequence[Message], sampling: Sampling, cap: str, formed: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            cap: sampling.max_tokens,
        }
        if sampling.temperature > 0:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if formed:
            body["response_format"] = response_format(sampling.schema)
        return body

    def _read(self, content: bytes) -> Answer | Failure:
        try:
            content = _strict(content)
            body = msgspec.json.decode(content, type=_Body)
        except msgspec.ValidationError as e:
            return _malformed(self.clean(str(e)), content)
        except RecursionError:
            return _malformed("nested too deeply", content)
        except ValueError:  # a proxy's page, or half of an answer
            return Failure("the answer's body is no JSON", unsure=True)
        if body.error and not body.choices:
            return Failure(f"an error in place of an answer: {self.clean(body.error.message)}", unsure=True)
        bill = _billed(content)
        return Answer(self._reply(body, bill), reported=bill is not None)

    def _reply(self, body: _Body, bill: _Usage | None) -> Reply:
        if not body.choices:
            return _unusable("empty reply: no choices", bill)
        choice = body.choices[0]
        text, finish = choice.message.content, choice.finish_reason
        if choice.message.refusal:
            return _unusable(f"refusal: {self.clean(choice.message.refusal)}", bill)
        if finish == "content_filter":
            return _unusable("refusal: stopped by the server's content filter", bill)
        if finish in (None, "error", "abort"):
            return _unusable(f"broken off by the server (finish_reason {finish})", bill)
        if text is None and finish in ("tool_calls", "function_call"):
            return _unusable("malformed reply: a tool call that nobody offered", bill)
        shown, end = hide(text or "", self._key), "length" if finish == "length" else "stop"
        return Reply(text=shown, usage=_usage(bill), finish=end)

    def _refused(self, e: APIStatusError, cap: str, formed: bool) -> Answer | Failure:
        """A status of 400 or more. Nothing is billed for it, unless it is a gateway's."""
        told = " ".join(_texts((isinstance(e.body, Mapping) and e.body.get("message")) or e.body))
        status, said = e.status_code, self.clean(told) or "no reason given"
        where, words = self._base_url, f"{told} {e.code} {e.type}".lower()
        refused = any(w in words for w in _REFUSED)
        if status == 401 or (status == 403 and not refused):
            tip = "check the variable that endpoint.api_key_env names."
            raise ConfigError(f"{where} refuses the key (HTTP {status}); {tip}") from None
        if status == 402 or (status == 429 and _NO_CREDIT in (e.code, e.type)):
            raise ConfigError(f"{where} says that the account has no credit (HTTP {status}: {said}).") from None
        if status in (408, 409, 429) or status >= 500:
            after = retry_after(e.response.headers, time.time())
            return Failure(f"HTTP {status}: {said}", after=after, unsure=status in _GATEWAY)
        if status == 404:
            tip = "check endpoint.model and endpoint.base_url."
            raise ConfigError(f"{where} does not know the model {self._model!r} (HTTP 404); {tip}") from None
        if status == 413 or any(w in words for w in _TOO_LONG):
            return Answer(Reply(text="", usage=Usage(), finish="context"), reported=True)
        if refused:
            return Answer(_unusable(f"refusal: {said}", None), reported=True)
        if cap == _CAP_NAMES[0] and _CAP_NAMES[1] in words:
            self._cap = _CAP_NAMES[1]
            return Failure("the server wants another name for max_tokens", at_once=True, crowded=False)
        if formed and any(w in words for w in NO_SCHEMAS):
            self._schemas = False
            return Failure("the server cannot constrain a reply to a schema", at_once=True, crowded=False)
        raise ConfigError(f"{where} refuses the request (HTTP {status}: {said}); check endpoint.model.") from None


def response_format(schema: str) -> dict[str, Any]:
    """How a request asks for a reply that follows `schema`, JSON as text."""
    form = {"name": "reply", "strict": True, "schema": msgspec.json.decode(schema)}
    return {"type": "json_schema", "json_schema": form}


def _usage(seen: _Usage | None) -> Usage:
    if seen is None:
        return Usage()
    cached = (seen.prompt_tokens_details and seen.prompt_tokens_details.cached_tokens) or 0
    prompt, completion = seen.prompt_tokens, seen.completion_tokens
    computed = prompt - min(cached, prompt) + completion
    return Usage(prompt_tokens=prompt, completion_tokens=completion, computed_tokens=computed)


def _unusable(reason: str, seen: _Usage | None) -> Reply:
    return Reply(text=reason, usage=_usage(seen), finish="error")


def _malformed(reason: str, content: bytes) -> Answer:
    bill = _billed(content)
    return Answer(_unusable(f"malformed reply: {reason}", bill), reported=bill is not None)


def _billed(content: bytes) -> _Usage | None:
    """What the server says that it bills, whatever the rest of the body is worth; None where that cannot be read."""
    try:
        return msgspec.json.decode(content, type=_Bill).usage
    except (ValueError, RecursionError):
        return None


def _strict(content: bytes) -> bytes:
    """`content` as JSON that msgspec reads: servers cut a reply within a character, and write NaN for a number.

    Raises `ValueError` for what is no JSON, `RecursionError`.
    """
    try:
        msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        read = json.loads(content.decode("utf-8", "replace"), parse_constant=lambda _: None)
        return json.dumps(read, ensure_ascii=False).encode("utf-8", "replace")
    return content


def _texts(body: object, depth: int = 8) -> Iterator[str]:
    """The words of a refusal, whatever its form, but for the part that repeats the request."""
    if isinstance(body, Mapping | list):
        parts = [v for k, v in body.items() if k != "input"] if isinstance(body, Mapping) else body
        for part in parts if depth else ():
            yield from _texts(part, depth - 1)
    elif body is not None:
        yield str(body)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a refusal asks to wait; None if it does not say.

    Reads `retry-after-ms`, or `retry-after` in seconds or as a date. `now`: seconds since the epoch.
    """
    try:
        milli = headers.get("retry-after-ms")
        seconds = float(headers["retry-after"]) if milli is None else float(milli) / 1000
    except KeyError:
        return None
    except ValueError:
        try:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - now
        except (KeyError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None
