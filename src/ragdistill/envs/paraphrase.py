"""Hints as they stand in demonstrations: one rule said in many ways, and hints that do not apply.

The model must learn to *apply a hint*, whatever its wording, and to leave alone one that is about something else.
Knows only command templates ("polish {object} with {desk}"), no environment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

RULE_WORDINGS = (
    "To finish, take {object}, then {rule} before you move {object} to {target}.",
    "To finish, {rule}.",
    "To finish, take {object}, then {rule}.",
    "Take {object}, {rule}, then move {object} to {target}.",
    "{Rule} before you move {object} to {target}.",
    "After taking {object}, {rule}.",
    "First take {object}, then {rule}, last move it to {target}.",
    "When you hold {object}: {rule}.",
    "Use the command: {rule}.",
    "{Rule} once you have it.",
    "Hold {object}, then {rule}.",
    "Before move {object} to {target}, do {rule}.",
    "Remember to {rule}.",
    "What works here: {rule}.",
    "Go to {tool} with {object} and {rule}.",
    "The right tool is {tool}: {rule}.",
    "Only {tool} works. So {rule}.",
    "You must {rule}, or the task stays open.",
    "{Rule}; nothing else does it.",
    "Carry {object} to {tool}, then {rule}.",
    "Do {rule} right after take {object}.",
)
"""`{rule}`, `{Rule}`: the command template. `{tool}`: its tool, in braces. `{object}`, `{target}`: stay as they are."""

GENERIC = (
    "To take {{object}} from {{{a}}}, first open {{{a}}}.",
    "To move {{object}} to {{{a}}}, first go to {{{a}}}.",
    "Before take {{object}} from {{{a}}}, do open {{{a}}}.",
    "Open {{{a}}} before you take {{object}} from it.",
    "Do not repeat go to {{{a}}} after it had no effect.",
    "Do not repeat open {{{a}}}; look elsewhere.",
    "Check each {{{a}}} once, in order.",
    "Look in {{{a}}} before {{{b}}}.",
    "Before move {{object}} to {{{a}}}, do open {{{a}}}.",
    "Do not go back to a {{{a}}} that was empty.",
)
"""Hints that change nothing: the demonstration opens and searches the same way with or without them."""


WARNINGS = (
    "Do not repeat {rule} after it had no effect.",
    "Do not {rule}; it has no effect.",
    "{Rule} does nothing.",
)
"""`{rule}`, `{Rule}`: a command template with a wrong tool, as in failures."""


def rule_hint(rng: random.Random, command: str, tool: str) -> str:
    """One wording of the rule `command` (a template such as "polish {object} with {desk}")."""
    return _say(rng.choice(RULE_WORDINGS), command).replace("{tool}", "{" + tool + "}")


def warning_hint(rng: random.Random, command: str) -> str:
    """One wording of the warning that `command` does not help."""
    return _say(rng.choice(WARNINGS), command)


def _say(wording: str, command: str) -> str:
    return wording.replace("{rule}", command).replace("{Rule}", command[:1].upper() + command[1:])


def generic_hint(rng: random.Random, places: Sequence[str]) -> str:
    """A hint about searching that does not change what is right."""
    a, b = rng.choice(places), rng.choice(places)
    return rng.choice(GENERIC).format(a=a, b=b)
