"""Hints by a served model, end to end: real HTTP, a storm of refusals, and no reply paid twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from ragdistill.errors import BudgetError
from ragdistill.hints.ask import Asker
from ragdistill.hints.extract import Extracted, extract
from ragdistill.journal import Journal
from ragdistill.llm import Reply, endpoint
from tests.misbehaving import KEY, Act, serving, then
from tests.test_endpoint import STORM, opened
from tests.test_hint_llm import GOOD
from tests.test_hints import PARAMS, corpus


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(endpoint, "_FIRST_BACKOFF", 0.05)


def run(tmp: Path, url: str, **change: object) -> Extracted:
    model = opened(tmp, url, **change)
    asker = Asker(model, Journal(tmp / "hint_calls", Reply), 16)
    try:
        return asyncio.run(extract(corpus(), asker, PARAMS, 0))
    finally:
        model.close()


def test_a_storm_costs_nothing_and_a_second_run_asks_nobody(tmp_path: Path) -> None:
    good = Act(text=json.dumps({"hints": [GOOD]}))
    with serving(then([STORM, Act("garbage"), STORM], good)) as server:
        first = run(tmp_path, server.url)
        paid = len(server.answered)
        assert {h.text for h in first.hints} == {GOOD} and paid == first.account.cases
        assert all("response_format" in body for body in server.answered)
        assert run(tmp_path, server.url) == first and len(server.answered) == paid


def test_a_spent_budget_stops_the_extraction_and_what_was_paid_is_kept(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 4000, "completion_tokens": 100}  # 0.05 each
    good = Act(text=json.dumps({"hints": [GOOD]}), usage=usage)
    with serving(then([], good)) as server:
        with pytest.raises(BudgetError):
            run(tmp_path, server.url, budget=0.5)
        paid = len(server.answered)
        done = run(tmp_path, server.url, budget=None)
        assert 0 < paid < done.account.cases == len(server.answered), "the rest is paid, nothing again"
