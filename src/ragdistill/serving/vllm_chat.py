"""A `ChatModel` that asks a vLLM server with token ids, so that it reads exactly what the embedded engines read.

vLLM's own chat route renders the template and tokenises the whole, so that `<|im_start|>` inside an observation becomes
a control token; ids from this project's chat format do not. Threads carry the calls, which makes it independent of the
event loop. It knows no task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ragdistill.checks import on_this_machine
from ragdistill.errors import EnvironmentFault
from ragdistill.llm import Engine, Reply, Sampling
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.llm.keys import clean, hide
from ragdistill.llm.weights import MAX_CONTEXT, adapter_fingerprint, context_of, model_fingerprint
from ragdistill.llm.wire import NO_SCHEMAS, response_format
from ragdistill.records import Message, Usage, digest
from ragdistill.serving.vllm import VllmServer, deciding

VERSION = 1
"""Part of the fingerprint; bumped when a change alters outputs."""
NO_FORMS = (*NO_SCHEMAS, "structured", "grammar")
"""In the words of a vLLM that has no backend for a schema, or for this one."""
_NO_COMPLETION = "vLLM answered with something that is no completion; see its log."
_DEADLINE = 600.0
"""Seconds one call may take."""


class VllmChat:
    """One model of a server: its base, or a student that is loaded by `__init__`."""

    def __init__(
        self,
        server: VllmServer,
        base: Path,
        adapter: Path | None,
        max_batch: int,
        on_close: Callable[[], None],
        max_context: int = MAX_CONTEXT,
        args: Sequence[str] = (),
    ) -> None:
        """`on_close` is called by `close`: a caller that started the server for this model alone stops it there.

        The server has to hold `max_context` tokens a conversation, or what the base was made for if that is less.
        `args` are the arguments it was started with: those that decide what it answers, such as its precision, are part
        of the fingerprint.
        `IdentityError` for an adapter of another base. A server that was given by address is trusted to hold `base`.
        """
        from openai import DefaultHttpxClient, OpenAI

        self._name = server.load(base, adapter) if adapter else server.base_name
        self._format, self.context = ChatFormat(load_tokenizer(base)), context_of(base, max_context)
        parts = [model_fingerprint(base), adapter_fingerprint(adapter) if adapter else ""]
        version = server.version()
        self._fingerprint = digest(
            "vllm", *parts, version, str(context_of(base, MAX_CONTEXT)), str(VERSION), *deciding(args)
        )
        self.engine = Engine(name="vLLM", version=version)
        self._key, self._schemas = server.key, True
        self._client = OpenAI(
            base_url=server.url, api_key=server.key or "none", timeout=_DEADLINE, max_retries=2,
            http_client=DefaultHttpxClient(trust_env=not on_this_machine(server.url), follow_redirects=False),
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(max_batch, "ragdistill-vllm")
        self._on_close = on_close

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer; see `ChatModel.chat`. The server finds what it computed before by content, not by `conversation`."""
        prompt = self._format.prompt_ids(messages)
        if len(prompt) >= self.context:
            return Reply(text="", usage=Usage(prompt_tokens=len(prompt)), finish="context")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, prompt, sampling)

    def _ask(self, prompt: list[int], sampling: Sampling) -> Reply:
        from openai import BadRequestError, OpenAIError

        room, formed = self.context - len(prompt), bool(sampling.schema) and self._schemas
        own: dict[str, Any] = {"stop_token_ids": sorted(self._format.stop_ids), "skip_special_tokens": True}
        if formed:
            own["response_format"] = response_format(sampling.schema)
        try:
            got = self._client.completions.create(
                model=self._name, prompt=prompt, max_tokens=min(sampling.max_tokens, room),
                temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed,
                stop=list(sampling.stop) or None, extra_body=own,
            )  # fmt: skip
        except OpenAIError as e:
            if formed and isinstance(e, BadRequestError) and any(w in str(e).lower() for w in NO_FORMS):
                self._schemas = False  # it cannot constrain; whoever asked repairs, as with other engines
                return self._ask(prompt, sampling)
            said = clean(str(e), self._key)
            raise EnvironmentFault(f"vLLM failed to answer ({type(e).__name__}: {said}); see its log.") from None
        except ValueError:  # JSON that was cut off
            raise EnvironmentFault(_NO_COMPLETION) from None
        try:
            return self._read(got, len(prompt), room, sampling.max_tokens)
        except (AttributeError, IndexError, TypeError):  # the client checks no types: a page of HTML comes as a string
            raise EnvironmentFault(_NO_COMPLETION) from None

    def _read(self, got: Any, prompted: int, room: int, most: int) -> Reply:
        """The reply in `got`, an answer to `prompted` tokens; `room` and `most` are what context and caller allowed."""
        if not got.choices or got.usage is None:
            raise EnvironmentFault("vLLM answered without a choice or without usage; see its log.")
        details = got.usage.prompt_tokens_details
        cached = (details.cached_tokens if details else 0) or 0
        count = got.usage.completion_tokens
        usage = Usage(
            prompt_tokens=prompted, completion_tokens=count, computed_tokens=prompted - cached + count
        )  # fmt: skip
        full = got.choices[0].finish_reason == "length" and count >= room and room < most
        finish = "context" if full else "length" if got.choices[0].finish_reason == "length" else "stop"
        return Reply(text=hide(got.choices[0].text, self._key), usage=usage, finish=finish)

    async def forget(self, conversation: str) -> None:
        """Nothing is kept here; the server evicts by age."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Prompt length in tokens."""
        return len(self._format.prompt_ids(messages))

    def fingerprint(self) -> str:
        """Identity of base, adapter and vLLM's version; of a server given by address it is a claim."""
        return self._fingerprint

    def close(self) -> None:
        """Wait for calls under way, disconnect, and end the server where it was started for this model."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()
        self._on_close()
