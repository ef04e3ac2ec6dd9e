"""A scripted ChatModel policy for the whole DAG on WebShop: it tries options, follows hints, and a student knows.

A pure function of (messages, sampling, model name), like `tests.scripted_policy`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ragdistill.agents import make_agent
from ragdistill.envs.webshop.demonstrator import Shopper
from ragdistill.envs.webshop.pages import BUY, SEPARATOR
from ragdistill.llm import Sampling
from ragdistill.records import Message

STYLES = (make_agent("act"), make_agent("react"), make_agent("stateact"))
_PRODUCT = re.compile(r"click\[([A-Z0-9]{10})\]")


def play(messages: Sequence[Message], sampling: Sampling, name: str) -> str:
    """`name` is the directory of the weights: raw says nothing useful, students choose options, the base tries some."""
    if name == "raw":
        return "I am a helpful assistant."
    opening = messages[1].content
    told = name.startswith("distilled") or "click[{object}]" in opening
    shopper = Shopper("told" if told else "explores", random.Random(f"{opening} {sampling.temperature}"))
    thought = action = ""
    for message in messages[1:]:
        if message.role == "user":
            thought, action = shopper.act(message.content.split("\n\nHints")[0])
    hesitates = not told and random.Random(f"{opening} {sampling.seed}").random() < 0.3
    if hesitates and BUY in messages[-1].content.split(SEPARATOR):
        action = f"click[{BUY}]"
    agent = next(a for a in STYLES if messages[0].content.startswith(a.render("", (), ())[0].content))
    return agent.reply(thought, action, {"goal": opening.split(SEPARATOR)[2], "current selection": _opened(messages)})


def _opened(messages: Sequence[Message]) -> str:
    """The product that was opened last."""
    opened = [m for m in messages if m.role == "assistant" and _PRODUCT.search(m.content)]
    return _PRODUCT.findall(opened[-1].content)[-1] if opened else "nothing"
