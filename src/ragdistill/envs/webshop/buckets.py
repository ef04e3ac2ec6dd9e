"""The product category of an instruction, inferred from its words alone: hints are kept and retrieved by it.

Naive Bayes over stemmed words; the counts come from shop queries, category paths and titles of the catalogue's
*training* products (`splits.split_of`), so nothing of a test product, least of all its gold category, is used. The
official splits are by goal, not by product: there the words of an evaluated product may count, as the original's train
goals hold them too; the category of the goal never does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache

from ragdistill.envs.webshop.analysis import analyse
from ragdistill.envs.webshop.products import Product
from ragdistill.envs.webshop.splits import family_of, split_of

CATEGORIES = ("beauty", "electronics", "fashion", "garden", "grocery")
_TOTAL = ""
"""Pseudo-word that counts all words of a category."""
_PRICE = re.compile(r", and price lower than .*$")
_SMOOTHING = 0.5


def count_words(product: Product, counts: dict[str, Counter[str]]) -> None:
    """Add a training product's words; the query counts double, it is what instructions are made of."""
    if split_of(family_of(product)) not in ("train", "coldstart"):
        return
    texts = (product.query, product.query, product.product_category, product.title)
    for word in analyse(" ".join(texts)):
        counts.setdefault(word, Counter())[product.category] += 1
        counts.setdefault(_TOTAL, Counter())[product.category] += 1


class BucketWords:
    """`bucket(instruction)` → category; `lookup` gives a word's counts per category."""

    def __init__(self, lookup: Callable[[str], Mapping[str, int]]) -> None:
        self._counts = lru_cache(20_000)(lookup)

    def bucket(self, instruction: str) -> str:
        """The likeliest category; words that no training product has say nothing."""
        total = self._counts(_TOTAL)
        scores = dict.fromkeys(CATEGORIES, 0.0)
        for word in set(analyse(_PRICE.sub("", instruction))):
            seen = self._counts(word)
            for category in scores if seen else ():
                share = (seen.get(category, 0) + _SMOOTHING) / (total.get(category, 0) + 1.0)
                scores[category] += math.log(share)
        return max(scores, key=lambda category: scores[category])
