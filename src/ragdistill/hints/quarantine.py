"""Which hints of a language model are not let in: unsafe, concrete, or not about the task. Each refusal has a reason.

Stricter than `safety.refusal`, which holds for hints of every origin: a model that has read a recorded text may repeat
what that text tells it to. A refused hint is kept out and named, never repaired. Knows no model and no environment;
what belongs to the task is read from what was played.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import msgspec
import Stemmer
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from ragdistill.hints.safety import refusal
from ragdistill.hints.templates import PLACEHOLDER, ROLES, entities, entity_names, normalise
from ragdistill.records import Trajectory

_WORD = re.compile(r"[a-z][a-z_-]*[a-z]")
_GAP = re.compile(r"[\s_-]+")
_RUN = re.compile(rf"[a-z]{{2,}}(?:{_GAP.pattern}[a-z]{{2,}})*")
_ARGUMENT = re.compile(r"\[[^\[\]]*\]")
_CODE_OF_ITEM = re.compile(r"\b(?=\w*\d)(?=\w*[a-z])\w{6,}\b", re.IGNORECASE)
_OUTSIDE = re.compile(
    r"\b(?:passwords?|credentials?|secrets?|api|e-?mails?|websites?|internet|downloads?|uploads?|install\w*|"
    r"shell|terminal|credit cards?|user|assistant|language models?|ai|prompts?|instructions?|json|repl(?:y|ies)|"
    r"respond|responses?|answers?|outputs?|prints?|translat\w+|poems?|stor(?:y|ies)|essays?|persona|role-?play|"
    r"jailbreak|developer|training|evaluation|test set)\b",
    re.IGNORECASE,
)
"""Subjects of the model's own situation or of the outside world, which no task of ours is about."""
_COMMON = 2
"""A word that occurs in the records of at least so many tasks belongs to the domain."""
_RARE = 0.1
"""A goal's word in no larger a share of all goals is that goal's own."""
_PLURALS = (("s", ""), ("es", ""), ("ies", "y"), ("lves", "lf"), ("ives", "ife"), ("aves", "af"))
_APART = 3
"""A name is found when it is written as so many words ("toilet paper hanger")."""
_SLOT_WORDS = 3
"""Words of a placeholder's name; more could smuggle a sentence past the other checks."""
_STRANGE = 2
"""Words from outside the domain that a hint may not reach if they are also the majority of its words."""


class Ground(msgspec.Struct, frozen=True):
    """What all records together say about the domain."""

    vocabulary: frozenset[str]
    """Stems of words that belong to it."""
    commands: frozenset[str]
    """Stems of the verbs that the environment accepted."""
    goals: dict[str, int]
    """Stem → in how many different goals it occurs."""
    goal_count: int
    entities: frozenset[str]
    """Bare names of numbered things ("potato"), where commands speak of such; empty in a shop."""


def survey(trajectories: Sequence[Trajectory]) -> Ground:
    """Read the domain off `trajectories`. Thoughts do not count: they are a model's words, not the environment's."""
    numbered = False
    by_task: dict[str, set[str]] = {}
    commands: set[str] = set()
    goals: dict[str, set[str]] = {}
    for t in trajectories:
        accepted = [s.action for s in t.steps if s.valid]
        texts = (t.goal, t.first_observation, *accepted, *(s.observation for s in t.steps))
        numbered = numbered or any(entities(_ARGUMENT.sub("", normalise(a))) for a in accepted)
        by_task.setdefault(t.task_id, set()).update(w for text in texts for w in stems(text))
        goals[t.goal] = stems(t.goal)
        commands.update(w for a in accepted if (m := _WORD.match(normalise(a))) for w in stems(m[0]))
    counts = Counter(w for words in by_task.values() for w in words)
    common = {w for w, n in counts.items() if n >= min(_COMMON, len(by_task))}
    asked = Counter(w for words in goals.values() for w in words)
    names = entity_names(trajectories) if numbered else frozenset[str]()
    return Ground(frozenset(common | commands), frozenset(commands), dict(asked), len(goals), names)


def concrete_names(case: Sequence[Trajectory], ground: Ground) -> frozenset[str]:
    """Words that name a thing, bare ("potato"); they may stand in a hint as `{potato}` only.

    In an environment of numbered entities these are all of its entities, elsewhere what these episodes' goals ask for
    and few others do.
    """
    if ground.entities:
        return ground.entities
    rare = _RARE * ground.goal_count
    words = {w for t in case for w in _words(t.goal)}
    found = {w for w in words if ground.goals.get(_stem(w), 0) <= max(1.0, rare) and _stem(w) not in _advice()}
    return frozenset(w for w in found if _stem(w) not in ground.commands and w not in ENGLISH_STOP_WORDS)


def objection(text: str, max_chars: int, names: Iterable[str], ground: Ground) -> str | None:
    """Why `text` is not let in as a hint, or None when it is."""
    plain = unicodedata.normalize("NFKC", text)
    loose = re.sub(r"[_{}-]", " ", plain)
    if reason := refusal(text, max_chars) or refusal(plain, 2 * max_chars) or refusal(loose, 2 * max_chars):
        return reason
    if long := next((p for p in PLACEHOLDER.findall(plain) if len(_words(p.replace("_", " "))) > _SLOT_WORDS), None):
        return f"a sentence for a placeholder: {long}"
    if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in text):
        return "letters of another script"
    bare = PLACEHOLDER.sub(" . ", plain.lower())
    words = _words(bare)
    if found := _named(bare, names):
        return f"names {found!r} instead of a placeholder"
    if code := _CODE_OF_ITEM.search(bare):
        return f"names {code[0]!r} instead of a placeholder"
    if outside := _OUTSIDE.search(loose):
        return f"speaks of {outside[0]!r}, not of the task"
    if not PLACEHOLDER.search(plain) and not any(_stem(w) in ground.commands for w in words):
        return "holds neither a placeholder nor a command of the task"
    return _strange(words, ground)


def _named(text: str, names: Iterable[str]) -> str | None:
    """The first of `names` in `text`, as it stands there: in the plural, or written apart."""
    known = {_GAP.sub("", name) for name in names}
    for run in _RUN.findall(text):
        words = _GAP.split(run)
        for i in range(len(words)):
            for end in range(i + 1, min(i + _APART, len(words)) + 1):
                joined = "".join(words[i:end])
                singular = {joined.removesuffix(s) + stands for s, stands in _PLURALS if joined.endswith(s)}
                if known & {joined, *singular}:
                    return " ".join(words[i:end])
    return None


def _strange(words: Sequence[str], ground: Ground) -> str | None:
    known = ground.vocabulary | _advice()
    content = [w for w in words if w not in ENGLISH_STOP_WORDS]
    unknown = [w for w in content if _stem(w) not in known]
    if len(unknown) >= _STRANGE and 2 * len(unknown) > len(content):
        return f"speaks of {', '.join(map(repr, unknown[:3]))}, not of the task"
    return None


def stems(text: str) -> set[str]:
    """Stems of the words of `text`."""
    return {_stem(w) for w in _words(text)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)


@cache
def _stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("english")


@cache
def _advice() -> frozenset[str]:
    """Stems of the words that advice of any kind is made of, and of the placeholders' common names."""
    text = Path(__file__).with_name("advice_words.txt").read_text(encoding="utf-8")
    return frozenset(stems(text)) | frozenset(stems(" ".join(ROLES)))
