"""Nouns of a product title: what the type part of the reward compares.

The original asks spaCy's `en_core_web_sm`, a model that no package index carries. Here TextBlob's tagger, whose lexicon
ships with its package, names the nouns among words that are cut as spaCy's tokenizer cuts them (numbers apart from
their units, hyphens and slashes between words). Used
while a catalogue is built, never while somebody plays. spaCy itself is not used: importing it imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

_WORD = re.compile(
    r"(?<![^\W_])\d+(?:[.,]\d+)*(?=(?:km|m|dm|cm|mm|kg|g|mg|kb|lb|oz|in|ft|gb|mb|tb|K|fl)\b)"  # number, unit
    r"|['’]s\b"
    r"|[^\W_]+(?:(?:\.|,(?=\d)|(?<=\d)[-/x×](?=\d))[^\W_]+)*"
    r"|[^\w\s]"
)


@cache
def _tagger() -> Callable[[list[str]], list[list[str]]]:
    from textblob.en import parser  # a second to import

    return parser.find_tags


def nouns(title: str) -> tuple[str, ...]:
    """Lower-case nouns and names of `title`, in order, repeats included."""
    tagged = _tagger()(_WORD.findall(title))
    return tuple(word.lower() for word, kind in tagged if kind.startswith("NN") and any(map(str.isalpha, word)))
