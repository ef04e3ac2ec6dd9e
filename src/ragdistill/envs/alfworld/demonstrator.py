"""A scripted player that reads observations only and says why it acts: the source of cold-start demonstrations.

It knows the interface (search, open, take, move) and, when told, one house rule. Untold, it is a naive explorer: it
tries the operation with one receptacle after the other, round the room's list from a random one on, or one verb after
the other on a tool it can see, and gives up with the episode. It has no rule for cleaning, heating, cooling or lamps.

What a small model needs is built in. Each thought restates the whole need, a told rule with it: the first one copies
the rule from the hint, every later one from the thought before. "I found" always names what the last need named, and
thoughts say whether the agent goes to a tool or stands at it. Long searches are kept. Every order is predictable:
receptacle types by likelihood, and one type in the order of the room's list, which counts *down* in ALFWorld ("drawer
3, drawer 2, drawer 1"), so that the next place is the next word and nobody counts on to a drawer that does not exist.
And there is one reaction to a refused `go to`, whatever its cause: look elsewhere.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_ENTITY = re.compile(r"\ban? ([a-z]+) (\d+)")

SearchOrder = Mapping[str, Sequence[str]]
"""Object type → receptacle types, likeliest first."""


@dataclass(frozen=True)
class Need:
    """What the goal asks for, in in-game words."""

    object: str
    target: str
    """Receptacle type to put it in; empty for goals that end with the object in hand."""
    count: int = 1
    property: str = ""
    """The goal's own word for what the object must become ("polished"), empty for plain goals."""
    verb: str = ""
    """The operation's command verb."""
    tool: str = ""
    """The right tool; the player looks at it only if `told`."""
    told: bool = False
    verbs: tuple[str, ...] = ()
    """Set for tools that are objects ("ring gong 1", object in hand): verbs to try in turn, `verb` among them."""

    def rule(self) -> str:
        """The told rule in few words."""
        return f"{self.verb} {self.tool}" if self.verbs else f"{self.verb} with {self.tool}"

    def phrase(self, missing: int) -> str:
        """The whole need in few words, restated in every thought."""
        if self.count > 1:
            return f"{missing} {self.object} in {self.target}"
        if self.told:
            return f"{self.object}, then {self.rule()}" + (f", in {self.target}" if self.target else "")
        if self.verbs:
            return f"{self.object} with {self.tool}"
        thing = f"{self.property} {self.object}" if self.property else self.object
        return f"{thing} in {self.target}"


HABITS = 10
"""Placements that the habits of all objects count for in one object's search order: a small model does not learn the
chances of rare objects, and then looks anywhere."""


def likelihood_order(
    placements: Iterable[Mapping[str, str]], rooms: Iterable[Sequence[str]], closed: Collection[str] = ()
) -> dict[str, list[str]]:
    """A search order: how often an object type lies in a receptacle of each type in training games, a step of looking.

    `placements`: object name → receptacle name, one mapping a game; `rooms`: the receptacle names of each game;
    `closed`: receptacle types that must be opened, which doubles the steps.
    """
    seen: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for where in placements:
        for obj, place in where.items():
            seen.setdefault(_type(obj), Counter())[_type(place)] += 1
    for names in rooms:
        total.update(_type(n) for n in names)
    everything = sum(seen.values(), Counter[str]())

    def worth(counts: Counter[str], place: str) -> float:
        often = counts[place] + HABITS * everything[place] / everything.total()
        return often / total[place] / (2 if place in closed else 1)

    return {obj: sorted(total, key=lambda r: (-worth(counts, r), r)) for obj, counts in sorted(seen.items())}


@dataclass
class Demonstrator:
    """Plays one game; `act(observation)` → (thought, action)."""

    need: Need
    order: SearchOrder
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    """Draws where the untold start."""
    listing: list[str] = field(default_factory=list)
    """Receptacle names, in the room's own order."""
    at: str = ""
    holding: str = ""
    done: int = 0
    has_property: bool = False
    closed: set[str] = field(default_factory=set)
    """Receptacles seen closed and not opened since."""
    visited: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Places where `go to` had no effect (they share the standing point, or do not exist); they come last."""
    known: dict[str, str] = field(default_factory=dict)
    """Wanted objects seen so far → receptacle."""
    tools: dict[str, str] = field(default_factory=dict)
    """Tools that are objects, seen so far → receptacle."""
    tried: list[str] = field(default_factory=list)
    """Receptacles (or verbs) tried in vain."""
    trying: str = ""
    """The receptacle to try next, where the rule is not told."""
    last: str = ""
    operation: str = ""
    """The operation's command, as last tried."""
    stuck: bool = False
    """The last `go to` had no effect."""

    def act(self, observation: str) -> tuple[str, str]:
        """Next (thought, action) after `observation`."""
        self._read(observation)
        thought, action = self._decide(observation)
        self.last = action
        return thought, action

    @property
    def state(self) -> dict[str, str]:
        """Where it is, what it holds and, while it searches, where it has looked: as known before the last action.

        Once nothing is searched for, the list would only be said again every turn.
        """
        here = {"current location": self.at or "start", "current inventory": self.holding or "nothing"}
        if self.holding and (self.tools or not self.need.verbs):
            return here
        numbers: dict[str, list[str]] = {}
        for name in self.visited:
            numbers.setdefault(_type(name), []).append(name.rsplit(" ", 1)[-1])
        looked = ", ".join(f"{kind} {' '.join(n)}" for kind, n in numbers.items())
        return {**here, "locations visited": looked or "none"}

    def _read(self, text: str) -> None:
        self.stuck = False
        if not self.listing:
            self.listing = [f"{t} {n}" for t, n in _ENTITY.findall(text.split("Your task is to", maxsplit=1)[0])]
            return
        happened = "nothing happens" not in text.lower()
        verb, _, rest = self.last.partition(" ")
        if self.last.startswith("go to "):
            self.at = self.last.removeprefix("go to ")
            self.stuck = not happened
            if happened:
                self._look(text)
            else:
                self.skipped.append(self.at)
        elif verb == "open" and happened:
            self.closed.discard(rest)
            self._look(text)
        elif verb == "take" and happened:
            self.holding = rest.split(" from ")[0]
            self.known.pop(self.holding, None)
        elif verb == "move" and happened:
            self.holding, self.done = "", self.done + 1
        elif self.last == self.operation:
            self.has_property = happened
            self.tried.append(verb if self.need.verbs else self.at)

    def _look(self, text: str) -> None:
        if f"The {self.at} is closed" in text:
            self.closed.add(self.at)
        elif self.at not in self.visited:
            self.visited.append(self.at)
        for kind, number in _ENTITY.findall(text):
            if kind == self.need.object and _type(self.at) != self.need.target:
                self.known[f"{kind} {number}"] = self.at
            if self.need.verbs and kind == self.need.tool:
                self.tools[f"{kind} {number}"] = self.at

    def _decide(self, text: str) -> tuple[str, str]:
        if not self.holding:
            return self._search(text)
        if self.need.verbs:
            return self._use_tool(text)
        if self.need.property and not self.has_property:
            return self._operate()
        return self._deliver()

    @property
    def _missing(self) -> str:
        return self.need.phrase(self.need.count - self.done)

    def _search(self, text: str) -> tuple[str, str]:
        need = f"I need {self._missing}."
        here = [o for o, r in self.known.items() if r == self.at]
        tool = next((f"I see {t} here. " for t, r in self.tools.items() if r == self.at), "")
        if here:
            return f"I found {' and '.join(here[:2])} at {self.at}. {tool}{need}", f"take {here[0]} from {self.at}"
        if f"The {self.at} is closed" in text:
            return f"The {self.at} is closed. {need}", f"open {self.at}"
        if self.known:
            obj, place = next(iter(self.known.items()))
            return f"{need} I saw {obj} at {place}.", f"go to {place}"
        return self._go_on(self.need.object, tool + need)

    def _go_on(self, wanted: str, start: str) -> tuple[str, str]:
        """Look for `wanted` in the likeliest place not seen yet."""
        place = self._next_place(wanted)
        missed = f"Nothing at {self.at}. " if self.stuck else ""
        return f"{missed}{start} I look in {place}.", f"go to {place}"

    def _next_place(self, wanted: str) -> str:
        rank = {t: i for i, t in enumerate(self.order.get(wanted, ()))}
        unseen = [r for r in self.listing if r not in self.visited and r not in self.skipped]
        left = [r for r in unseen if _type(r) != self.need.target] or unseen or self.skipped or self.listing
        return min(left, key=lambda r: (rank.get(_type(r), len(rank)), _type(r), self.listing.index(r)))

    def _use_tool(self, text: str) -> tuple[str, str]:
        """The tool is an object that stands somewhere: find it, then act on it with the object in hand."""
        need = self.need
        start = f"I have {self.holding}. I need {need.rule() if need.told else need.tool}."
        tool = next((t for t, r in self.tools.items() if r == self.at), "")
        if tool:
            return self._try_verb(tool)
        if f"The {self.at} is closed" in text:
            return f"The {self.at} is closed. {start}", f"open {self.at}"
        if self.tools:
            tool, place = next(iter(self.tools.items()))
            return f"{start} I saw {tool} at {place}.", f"go to {place}"
        return self._go_on(need.tool, start)

    def _try_verb(self, tool: str) -> tuple[str, str]:
        left = [v for v in self.need.verbs if v not in self.tried] or self.need.verbs[-1:]
        verb = self.need.verb if self.need.told else left[0]
        self.operation = f"{verb} {tool}"
        start = f"Not {', '.join(self.tried[-3:])}." if self.tried else f"I found {tool} at {self.at}."
        return f"{start} I have {self.holding}. I {'' if self.need.told else 'try to '}{verb} it.", self.operation

    def _operate(self) -> tuple[str, str]:
        need = self.need
        state = f"I have {self.holding}. I {need.rule()}." if need.told else f"{self.holding} must be {need.property}."
        tool = self._first(need.tool) if need.told else self._next_tool()
        if self.at == tool:
            self.operation = f"{need.verb} {self.holding} with {tool}"
            return f"I am at {tool}. {state}" + ("" if need.told else " I try."), self.operation
        failed = f"Not with {self.tried[-1]}. " if self.at in self.tried else ""
        return f"{failed}{state} I go to {tool}.", f"go to {tool}"

    def _next_tool(self) -> str:
        """Any receptacle first, then the next ones in the room's list, which starts again at its end.

        Random throughout, and a small model makes things up; in order from the first on, and it never meets what
        stands last.
        """
        if not self.trying:
            self.trying = self.rng.choice(self.listing)
        elif self.trying in self.tried:
            self.trying = self.listing[(self.listing.index(self.trying) + 1) % len(self.listing)]
        return self.trying

    def _deliver(self) -> tuple[str, str]:
        target = self.need.target
        state = f"{self.holding} is {self.need.property}." if self.need.property else f"I have {self.holding}."
        thought = f"{state} I put it in {target}."
        place = self._first(target)
        if self.at != place:
            return thought, f"go to {place}"
        if place in self.closed or self.last.startswith("move "):  # a move that failed: shut, and never seen so
            return f"The {place} is closed. {thought}", f"open {place}"
        return thought, f"move {self.holding} to {place}"

    def _first(self, kind: str) -> str:
        names = [r for r in self.listing if _type(r) == kind]
        return min(names, key=lambda r: int(r.split()[-1]), default=f"{kind} 1")


def _type(name: str) -> str:
    return name.rsplit(" ", 1)[0]
