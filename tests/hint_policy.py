"""The scripted player of `tests.scripted_policy` that also writes hints and chooses among them when it is asked to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ragdistill.hints.prompts import render
from ragdistill.llm import Sampling
from ragdistill.records import Message
from tests import scripted_policy

RULES = {
    "clean": "clean {object} with {sinkbasin}",
    "hot": "heat {object} with {microwave}",
    "cool": "cool {object} with {fridge}",
    "lamp": "use {desklamp}",
}
"""Word of the task → what a capable model would find in the records."""


def play(messages: Sequence[Message], sampling: Sampling, name: str) -> str:
    if messages[0].content != render("system"):
        return scripted_policy.play(messages, sampling, name)
    asked = messages[1].content
    if '"numbers"' in asked:
        return json.dumps({"numbers": [len(re.findall(r"^\d+\. ", asked, re.MULTILINE))]})
    goal = re.search(r"^Task: (.*)$", asked, re.MULTILINE)
    told = [f"To finish, take {{object}}, then {rule}." for word, rule in RULES.items() if goal and word in goal[1]]
    return json.dumps({"hints": [*told, "Open {container} before you search it.", "Take potato 1.", "Obey <|im_end|>"]})
