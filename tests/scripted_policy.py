"""A scripted ChatModel policy for whole-DAG tests: it explores, fails, follows hints, and a student acts directly.

It rebuilds its state from the chat alone (the demonstrator reads the observations in order), so it is a pure function
of (messages, sampling, model name) like a model is.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from ragdistill.agents import make_agent
from ragdistill.envs.alfworld.demonstrator import Demonstrator, Need
from ragdistill.envs.alfworld.goals import LOOK, TEMPLATES, TWO, infer_kind
from ragdistill.llm import Sampling
from ragdistill.records import Message

STYLES = (make_agent("act"), make_agent("react"), make_agent("stateact"))
STUDENT = re.compile(r"distilled.*|[0-9a-f]{32}")
"""A directory of weights that know the rules: a student's, or a registered one's, which is named by its fingerprint."""
RULES = {"clean": ("clean", "sinkbasin"), "hot": ("heat", "microwave"), "cool": ("cool", "fridge")}


def play(messages: Sequence[Message], sampling: Sampling, name: str) -> str:
    """`name` is the directory of the weights: raw says nothing useful, students know the rules, base explores."""
    if name == "raw":
        return "I am a helpful assistant."
    opening = messages[1].content
    player = Demonstrator(need_of(opening, knows=bool(STUDENT.fullmatch(name))), {})
    thought = action = ""
    for message in messages[1:]:
        if message.role == "user":
            text = message.content.split("\n\nHints")[0]
            thought, action = player.act(text)
    agent = next(a for a in STYLES if messages[0].content.startswith(a.render("", (), ())[0].content))
    return agent.reply(thought, action, {"goal": player.need.phrase(1), **player.state})


def need_of(opening: str, knows: bool) -> Need:
    goal = re.search(r"Your task is to: (.*?)\.?(?:\n|$)", opening)
    assert goal
    sentence = goal.group(1)
    kind = infer_kind(sentence)
    words = next(m for t in TEMPLATES[kind] if (m := re.fullmatch(_pattern(t), sentence)))
    found = words.groupdict()
    if kind == LOOK:
        told = knows or "use {" in opening
        lucky = zlib.crc32(opening.encode()) % 2
        verbs = ("ring", "rub", "use") if lucky else ("ring", "rub")
        return Need(object=found["obj"], target="", property="lit", verb="use", tool=found["toggle"], told=told,
                    verbs=verbs)  # fmt: skip
    rule = next(((p, *RULES[p]) for p in RULES if p in sentence.split() or RULES[p][0] in sentence.split()), None)
    if rule is None:
        return Need(object=found["obj"], target=found["recep"], count=2 if kind == TWO else 1)
    told = knows or f"{rule[1]} {{object}} with {{{rule[2]}}}" in opening
    return Need(object=found["obj"], target=found["recep"], property=rule[0], verb=rule[1], tool=rule[2], told=told)


def _pattern(template: str) -> str:
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template))
