"""A `ChatModel` behind any server that speaks OpenAI's chat completions: OpenAI, vLLM, SGLang, llama-server, Ollama.

A thread of its own runs the calls, so that a caller that goes away (Ctrl-C, a spent budget, another episode's error)
cannot break off a call that is paid for: it ends, is written down, and answers the same question in the next run.
Every answer is journaled under (model, messages, sampling); a replayed episode pays for nothing twice, and equal calls
under way at once are one call. `limiter` decides how many run at once, `wire` what one attempt brought, `ledger` what
it cost.

Infrastructure that fails through all retries is an `EnvironmentFault`: the episode is played afresh. A wrong key, model
or address and a spent budget stop everything at once. Knows no task, and no secret leaves `wire`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ragdistill.errors import BudgetError, ConfigError, EnvironmentFault, RagdistillError
from ragdistill.journal import Journal
from ragdistill.llm import Engine, Reply, Sampling
from ragdistill.llm.counting import bound_tokens, counter, estimate_tokens
from ragdistill.llm.keys import api_key
from ragdistill.llm.ledger import Account, Ledger
from ragdistill.llm.limiter import AdaptiveLimiter
from ragdistill.llm.wire import Answer, Failure, Wire
from ragdistill.params import EndpointParams
from ragdistill.records import Message, Usage, digest

CALLS_VERSION = "calls-1"
"""Part of every call's key; changes when a reply would be read differently."""
LONGEST_PAUSE = 300.0
"""Seconds; a server that asks for more (a daily quota) is a fault to report, not to wait for."""
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0


@dataclass(eq=False)
class _Call:
    """One question and all who wait for its answer."""

    key: str
    messages: tuple[Message, ...]
    sampling: Sampling
    waiting: list[Future[Reply]] = field(default_factory=list)
    sent: bool = False

    @property
    def wanted(self) -> bool:
        return not all(f.cancelled() for f in self.waiting)


class EndpointModel:
    """The served model `settings.model`; needs `close`."""

    def __init__(self, settings: EndpointParams, calls: Path, ledger: Path, stage: str, identity: str = "") -> None:
        """`calls`: directory of the journal; `ledger`: file of the accounts; `stage`: as it stands in them.

        `identity`: what names the weights where the address does not, such as a hash of the files that are served.
        """
        self._settings = settings
        self._count, self.counting = counter(settings.tokenizer)
        self.engine = Engine(name=f"served model {settings.model}")
        self._fingerprint = digest("endpoint", identity or settings.base_url.rstrip("/"), settings.model)
        self._journal = Journal(calls, Reply)
        self._ledger = Ledger(ledger, stage, settings.model, settings.prices, settings.budget, settings.currency)
        key = api_key(settings.api_key_env)
        self._wire = Wire(settings.base_url, settings.model, key, settings.deadline)
        self._limiter = AdaptiveLimiter(settings.max_concurrency)
        self._shut_until = 0.0
        """In the loop's time: the server asked to be left alone for longer than is worth waiting."""
        self._calls: dict[str, _Call] = {}
        self._tasks: dict[_Call, asyncio.Task[None]] = {}
        self._fatal: RagdistillError | None = None
        self._closed = False
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="ragdistill-endpoint", daemon=True)
        self._thread.start()
        self._loop = self._ready.result()

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer; see `ChatModel.chat`. Finish "error" comes with the reason as text.

        Raises `EnvironmentFault` after the retries, `ConfigError` for a wrong key, model or request, `BudgetError`.
        """
        if self._closed:
            raise self._gone()
        future: Future[Reply] = Future()
        self._loop.call_soon_threadsafe(self._take, tuple(messages), sampling, future)
        return await asyncio.wrap_future(future)

    async def forget(self, conversation: str) -> None:
        """Nothing is kept here; the server keeps its caches itself."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Prompt length; `counting` says how it is found."""
        return self._count(messages)

    def fingerprint(self) -> str:
        """Identity of address and model name: a server does not prove its weights."""
        return self._fingerprint

    @property
    def account(self) -> Account:
        """Tokens and money of this process's calls."""
        return msgspec.structs.replace(self._ledger.account, most_at_once=self._limiter.peak)

    def close(self) -> None:
        """Let the calls under way end, since they are paid for, and disconnect; all others raise `EnvironmentFault`."""
        if not self._closed:
            self._closed = True
            under_way = sum(call.sent for call in list(self._tasks))
            if under_way and sys.exc_info()[0] is not None:
                print(f"{under_way} calls under way are waited for, they are paid.", file=sys.stderr, flush=True)
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._ready.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        for call, task in self._tasks.items():
            if not call.sent:
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._wire.aclose()

    def _take(self, messages: tuple[Message, ...], sampling: Sampling, future: Future[Reply]) -> None:
        """In the loop: answer from the journal, join an equal call, or start one."""
        seed = sampling.seed if sampling.temperature > 0 else 0  # a greedy reply has no use for it
        sampling = msgspec.structs.replace(sampling, seed=seed)
        key = digest(CALLS_VERSION, self._fingerprint, messages, sampling)
        if call := self._calls.get(key):
            call.waiting.append(future)
            return
        if known := self._journal.get(key):
            self._ledger.replayed()
            _resolve(future, known)
            return
        call = self._calls[key] = _Call(key, messages, sampling, [future])
        self._tasks[call] = asyncio.get_running_loop().create_task(self._answer(call))

    async def _answer(self, call: _Call) -> None:
        """Resolve `call` for all who wait."""
        result: Reply | BaseException
        try:
            result = await self._pay(call)
        except asyncio.CancelledError:
            result = self._gone()
        except (BudgetError, ConfigError) as e:
            result = self._fatal = e
        except Exception as e:  # noqa: BLE001  (handed to whoever waits, as if it had happened there)
            result = e
        del self._calls[call.key], self._tasks[call]
        for future in call.waiting:
            _resolve(future, result)

    async def _pay(self, call: _Call) -> Reply:
        """Attempts until one brings an answer, with growing pauses; `EnvironmentFault` after the last."""
        failure = Failure("")
        for attempt in range(self._settings.retries + 1):
            async with self._limiter.slot() as turn:
                outcome = await self._attempt(call)
                if isinstance(outcome, Answer):
                    self._limiter.succeeded(turn)
                    return outcome.reply
                if outcome.crowded:
                    self._limiter.congested(turn)
                if (outcome.after or 0.0) > LONGEST_PAUSE:
                    self._shut_until = self._loop.time() + (outcome.after or 0.0)
                elif outcome.after:
                    self._limiter.pause(outcome.after)
            failure = outcome
            if self._closed:
                raise self._gone()
            self._check_open()
            if attempt < self._settings.retries and not outcome.at_once and (outcome.after or 0.0) < _FIRST_BACKOFF:
                # a server that asks for no wait, or for a date that is past, has not said that it recovered
                backoff = min(_FIRST_BACKOFF * 2**attempt, _LONGEST_BACKOFF)
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
        raise EnvironmentFault(
            f"{self._where()} failed {self._settings.retries + 1} times in a row, last with: {failure.reason}."
        )

    async def _attempt(self, call: _Call) -> Answer | Failure:
        """Reserve the money, send, and write down what came of it before anyone learns of it."""
        ticket = await self._reserve(call)
        call.sent = True
        try:
            outcome = await self._wire.ask(call.messages, call.sampling)
        except ConfigError:
            self._ledger.fail(ticket, unsure=False)
            raise
        except BaseException:  # a bug, or the end of the loop: it may be billed, and nobody is left to settle it
            self._ledger.fail(ticket, unsure=True)
            raise
        finally:
            call.sent = False
        if isinstance(outcome, Failure):
            self._ledger.fail(ticket, outcome.unsure)
            return outcome
        reply = outcome.reply
        if not outcome.reported:
            reply = msgspec.structs.replace(reply, usage=_guessed(call, reply))
        try:  # the reply first: a kill in between leaves the call at its worst, but not to be paid again
            self._journal.put(call.key, reply)
        finally:
            self._ledger.settle(ticket, reply.usage, unsure=not outcome.reported)
        return Answer(reply, outcome.reported)

    async def _reserve(self, call: _Call) -> str:
        """Money for the worst case. Waits while calls under way hold too much of it."""
        bound = bound_tokens(call.messages)
        while True:
            if self._fatal:
                raise self._fatal
            if self._closed or not call.wanted:
                raise self._gone()
            self._check_open()
            ticket = self._ledger.reserve(bound, call.sampling.max_tokens)
            if ticket:
                return ticket
            await asyncio.sleep(0.02)  # at the very end of a budget only, so no queue is built for it

    def _check_open(self) -> None:
        wait = self._shut_until - self._loop.time()
        if wait > 0:
            raise EnvironmentFault(f"{self._where()} asks to wait {wait:.0f} s; run again after that.")

    def _where(self) -> str:
        return f"{self._settings.base_url} ({self._settings.model})"

    def _gone(self) -> EnvironmentFault:
        return EnvironmentFault("The endpoint was closed; make a new one.")


def _resolve(future: Future[Reply], result: Reply | BaseException) -> None:
    if future.set_running_or_notify_cancel():
        if isinstance(result, Reply):
            future.set_result(result)
        else:
            future.set_exception(result)


def _guessed(call: _Call, reply: Reply) -> Usage:
    """High estimates of tokens, for a server that does not report; money is counted at the call's worst instead."""
    prompt, completion = estimate_tokens(call.messages), call.sampling.max_tokens
    if reply.finish != "error":  # or else the text is our own
        completion = min(estimate_tokens([Message(role="assistant", content=reply.text)]), completion)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, computed_tokens=prompt + completion)
