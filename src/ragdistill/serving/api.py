"""OpenAI's chat protocol as data: requests read strictly where it matters, answers, chunks and errors written.

An option that would change the answer and that no engine here has is refused, not ignored. Contents stay plain text:
the chat format of the engine never turns them into control tokens. This module knows no engine and no HTTP library.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from ragdistill.llm import Reply, Sampling
from ragdistill.records import Message, Role

UNLIMITED = 1 << 20
"""Tokens of a reply without `max_tokens`: the context ends it."""
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ALWAYS_OFF: dict[str, tuple[object, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "tool_choice": ("none",),
    "function_call": ("none",), "response_format": ({"type": "text"},), "logit_bias": ({},), "audio": (),
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "modalities": (["text"],),
}  # fmt: skip
"""Options of the protocol that are not served, with the values that mean "off"; null always does."""


class ApiError(Exception):
    """A refusal in OpenAI's words."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON that clients expect."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Part(msgspec.Struct):
    """One piece of a message's content."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct):
    """A message as clients write it."""

    role: str
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct):
    """What a stream shall hold beside the text."""

    include_usage: bool | None = False


Count = Annotated[int, msgspec.Meta(ge=1)]


class ChatRequest(msgspec.Struct):
    """The body of a chat completion, as far as it is served; fields that are not known are ignored."""

    model: str
    messages: list[ChatMessage]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def read_request(raw: bytes, served: str) -> ChatRequest:
    """Decode a body; `ApiError` names what is wrong with it."""
    try:
        plain = msgspec.json.decode(raw, type=dict[str, Any])
        request = msgspec.convert(plain, ChatRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:  # also of wrong types
        text = str(e)
        place = text.rpartition("at `$.")[2].rstrip("`") if "at `$." in text else None
        raise ApiError(400, f"The body is no valid chat completion request: {text}.", param=place) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    for name, off in _ALWAYS_OFF.items():
        if plain.get(name) is not None and plain[name] not in off:
            raise ApiError(400, f"`{name}` is not supported by this server.", param=name, code="unsupported_parameter")
    if request.model != served:
        message = f"The model `{request.model}` does not exist; this server has `{served}`."
        raise ApiError(404, message, param="model", code="model_not_found")
    return request


def chat_of(request: ChatRequest) -> list[Message]:
    """The messages; `ApiError` for roles or contents that are not text."""
    if not request.messages:
        raise ApiError(400, "`messages` is empty; give at least one message.", param="messages")
    return [Message(role=_role(m, i), content=_content(m, i)) for i, m in enumerate(request.messages)]


def sampling_of(request: ChatRequest) -> Sampling:
    """How to draw; the protocol's defaults where the client says nothing, a fresh seed among them."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 4 or not all(stop):
        raise ApiError(400, "`stop` takes up to four strings that are not empty.", param="stop")
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        max_tokens=request.max_completion_tokens or request.max_tokens or UNLIMITED,
        seed=secrets.randbits(31) if request.seed is None else request.seed & 0x7FFFFFFF,
        stop=tuple(stop),
    )


def completion(reply: Reply, head: dict[str, Any]) -> dict[str, Any]:
    """The whole answer."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply)}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(reply)}


def chunks(reply: Reply, head: dict[str, Any], include_usage: bool) -> Iterator[bytes]:
    """The same answer as server-sent events; a reply comes in one piece, for engines answer whole turns."""
    for delta, finish in (
        ({"role": "assistant", "content": ""}, None),
        ({"content": reply.text}, None),
        ({}, _finish(reply)),
    ):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        extra = {"usage": None} if include_usage else {}
        yield _event({**head, "object": "chat.completion.chunk", "choices": [choice], **extra})
    if include_usage:
        yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(reply)})
    yield b"data: [DONE]\n\n"


def usage_of(reply: Reply) -> dict[str, Any]:
    """Token counts; `cached_tokens` were computed in an earlier turn."""
    u = reply.usage
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.billed,
        "prompt_tokens_details": {"cached_tokens": max(0, u.billed - u.computed_tokens)},
    }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _finish(reply: Reply) -> str:
    return "stop" if reply.finish == "stop" else "length"


def _role(message: ChatMessage, index: int) -> Role:
    if message.role not in _ROLES:
        where = f"messages[{index}].role"
        raise ApiError(400, f"`{where}` is not one of {', '.join(_ROLES)}.", param=where)
    return _ROLES[message.role]


def _content(message: ChatMessage, index: int) -> str:
    where = f"messages[{index}].content"
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise ApiError(400, f"`{where}` is missing.", param=where)
    if any(part.type != "text" for part in message.content):
        raise ApiError(400, f"`{where}` holds something that is not text; this model reads text only.", param=where)
    return "".join(part.text for part in message.content)
