"""Wording of mined hints: short imperative sentences that hold the command templates literally.

A small model copies what it reads, so the command stands in the sentence exactly as it must be typed. Cold-start
demonstrations may use the same functions, so that hints look alike everywhere. Knows no statistics.
"""

from __future__ import annotations

import re

_SOURCE = re.compile(r" from \{[a-z_-]+\}$")


def shorten(template: str) -> str:
    """Drop a trailing source ("take {object} from {shelf}" → "take {object}"): where it lay is incidental."""
    return _SOURCE.sub("", template)


def contrast_text(template: str, before: str, after: str, max_chars: int) -> str:
    """A short plan around `template`; neighbours that do not fit into `max_chars` are left out (empty = unknown)."""
    head = f"{before}, then " if before else ""
    tail = f" before you {after}" if after else ""
    options = (f"To finish, {head}{template}{tail}.", f"To finish, {head}{template}.", f"To finish, {template}{tail}.")
    return next((o for o in options if len(o) <= max_chars), f"To finish, {template}.")


def twice_text(template: str, before: str, max_chars: int) -> str:
    """The same command for two different objects."""
    plan = f"{before}, then {template}" if before else template
    options = (f"Do this for two different {{object}}: {plan}.", f"Do this for two {{object}}: {template}.")
    return next((o for o in options if len(o) <= max_chars), options[-1])


def precondition_text(template: str, first: str) -> str:
    """`template` only works right after `first`."""
    return f"To {template}, first {first}."


def redundancy_text(template: str) -> str:
    """`template` was repeated in vain."""
    return f"Do not repeat {template} after it had no effect."


def bound_text(template: str) -> str:
    """`template` ended it above what the goal allows."""
    return f"Before {template}, check that the price is below the bound."


def affordance_text(template: str) -> str:
    """`template` was possible and never tried."""
    return f"Try to {template}."
