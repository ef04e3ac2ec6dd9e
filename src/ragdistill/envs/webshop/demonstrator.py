"""A scripted shopper that reads observations only and says why it acts: the source of cold-start demonstrations.

It shows the interface: search with the whole need, open the product whose title shares most words with it, buy; each
thought restates the need. **Withheld**, and left to hints: that options are to be chosen. No demonstration shows an
option of the catalogue (`houserules`); options of house groups are chosen as the instruction says only where a hint is
shown. Untold, the shopper either tries a value of each group at random, as an explorer would, or leaves them alone and
buys: if every demonstration chose something, the base would find the rule by itself. **Never shown at all**: comparing
prices, reading sub-pages, turning pages, going back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from ragdistill.envs.webshop.pages import BUY, NEXT, PREV, SEPARATOR

Mood = Literal["plain", "told", "explores", "ignores"]
"""`plain`: there is nothing to choose. The others differ in what is done where there is."""

MAX_QUERY = 180
"""Characters of a search; an agent takes longer actions for runaway text."""
_PRICE = re.compile(r",? and price lower than .*$")
_OPENING = re.compile(
    r"^(?:please )?(?:find(?: me)?|show me|get me|give me|can you get me|(?:i'?m |i am )?looking for|"
    r"i(?: would| ?'?d)? (?:like|need|want)(?: to (?:buy|get|find))?) ",
    re.IGNORECASE,
)
_NAMED = re.compile(r"(?: with |, and )((?:(?! with )[\w ])+): ([^,]+)")
_WORD = re.compile(r"[^\W_]+")


def need_of(instruction: str) -> str:
    """What is wanted, in the instruction's own words, without the phrase it opens with and without the price."""
    return _OPENING.sub("", _PRICE.sub("", instruction)).strip(" .").replace("[", "(").replace("]", ")")


class Shopper:
    """Plays one visit; `act(observation)` → (thought, action)."""

    def __init__(self, mood: Mood, rng: random.Random) -> None:
        self._mood, self._rng = mood, rng
        self._todo: list[str] | None = None

    def act(self, observation: str) -> tuple[str, str]:
        """Next (thought, action) after `observation`."""
        pieces = observation.split(SEPARATOR)
        need = need_of(pieces[pieces.index("Instruction:") + 1])
        start = f"I need {need}."
        if BUY in pieces:
            return self._on_item(start, need, pieces)
        if NEXT in pieces and pieces[-1] != NEXT:  # a search without hits lists nothing
            best = choose(need, pieces)
            return f"{start} {best} fits best.", f"click[{best}]"
        query = need if len(need) <= MAX_QUERY else need[:MAX_QUERY].rsplit(" ", 1)[0]
        return f"{start} I search for it.", f"search[{query}]"

    def _on_item(self, start: str, need: str, pieces: Sequence[str]) -> tuple[str, str]:
        if self._todo is None:
            self._todo = self._plan(need, pieces)
        if not self._todo:
            return f"{start} I buy it.", f"click[{BUY}]"
        value = self._todo.pop(0)
        verb = "choose" if self._mood == "told" else "try"
        return f"{start} I {verb} {value}.", f"click[{value}]"

    def _plan(self, need: str, pieces: Sequence[str]) -> list[str]:
        """Values to click: those the need names if told, one of each group at random when exploring."""
        named = _NAMED.findall(need)
        shown = list(
            pieces[pieces.index(PREV) + 1 : next(i for i, p in enumerate(pieces) if p.startswith("Price:")) - 1]
        )
        if self._mood == "told":
            return [value.strip() for _, value in named if value.strip() in shown]
        if self._mood != "explores":
            return []
        starts = [i for i, piece in enumerate(shown) if piece in {name for name, _ in named}]
        groups = [shown[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(shown)], strict=False)]
        return [self._rng.choice(values) for values in groups if values]


def choose(need: str, pieces: Sequence[str]) -> str:
    """The listed product whose title shares most words with the need; the first of equals, as the search ranks them."""
    listed = pieces[pieces.index(NEXT) + 1 :]
    wanted = set(_WORD.findall(need.lower()))
    products = list(zip(listed[::3], listed[1::3], strict=False))
    return max(products, key=lambda p: len(wanted & set(_WORD.findall(p[1].lower()))))[0]
