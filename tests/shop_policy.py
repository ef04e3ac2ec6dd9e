"""A scripted ChatModel policy for the example environment: it tries tools, follows hints, and a student knows.

A pure function of (messages, sampling, model name), like `tests.scripted_policy`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ragdistill.llm import Sampling
from ragdistill.records import Message

KNOWN = {"radio": "screwdriver", "chair": "hammer", "cup": "glue"}


def play(messages: Sequence[Message], sampling: Sampling, name: str) -> str:
    """`name` is the directory of the weights: raw says nothing useful, students know the tools, base draws one."""
    if name == "raw":
        return "I am a helpful assistant."
    opening = messages[1].content
    tools = re.findall(r"\b(screwdriver|hammer|glue) \d", opening)
    thing = re.search(r"mend the (\w+)", opening)
    assert thing is not None
    told = re.search(r"mend \{object\} with \{(\w+)\}", opening)
    tool = told[1] if told else random.Random(f"{opening} {sampling.seed}").choice(tools)
    if name.startswith("distilled"):
        tool = KNOWN[thing[1]]
    return f"Thought: I try the {tool}.\nAction: mend {thing[1]} 1 with {tool} {tools.index(tool) + 1}"
