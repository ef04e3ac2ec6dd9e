"""An embedded catalogue in the original's file format, so that WebShop works from a clean clone.

`generate(count)` is deterministic, product by product: five categories of twenty product types each, brands, attributes
(three of the type's pool), none to three options, prices (one in ten a range), descriptions, synthetic instructions for
two products in three and a person's instruction for one in twelve. All texts are made from `lexicon.json`. It is easier
than the real catalogue (short titles that name every attribute) and no substitute for it in a comparison with published
numbers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.records import digest, read_json, seed_of

VERSION = "embedded-2"
"""Changes whenever the generated products change."""
OPTION_COUNTS = (27, 34, 32, 7)
"""Weights of 0, 1, 2, 3 options, where a type of two options takes two for three: goals that are drawn then have about
27, 34, 36, 3 %, as those of the original's 1,000 products."""
_LETTERS = "BCDFGHJKLMNPQRSTVWXYZ0123456789"


class Kind(msgspec.Struct, frozen=True):
    """A type of product."""

    noun: str
    query: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    low: float
    """Cheapest and dearest, dollars."""
    high: float


class Category(msgspec.Struct, frozen=True):
    """A category's first path element, its option values by option name, its types of product."""

    path: str
    options: dict[str, tuple[str, ...]]
    types: tuple[Kind, ...]


class Lexicon(msgspec.Struct, frozen=True):
    """All words that products are made of."""

    categories: dict[str, Category]
    brand_starts: tuple[str, ...]
    brand_ends: tuple[str, ...]
    praise: tuple[str, ...]
    wishes: tuple[str, ...]


@cache
def lexicon() -> Lexicon:
    """The words of `lexicon.json`."""
    return msgspec.convert(read_json(Path(__file__).with_name("lexicon.json")), Lexicon)


def fingerprint() -> str:
    """Identity of what `generate` gives."""
    return digest(VERSION, lexicon())


def generate(count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """(entry of the products file, of the attributes file, of people's instructions) for products 0 … count − 1."""
    names = sorted(lexicon().categories)
    for number in range(count):
        name = names[number % len(names)]
        category = lexicon().categories[name]
        place = number // len(names)
        yield _product(number, name, category, category.types[place % len(category.types)], place)


def _product(
    number: int, name: str, category: Category, kind: Kind, place: int
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    rng = random.Random(seed_of("webshop product", VERSION, number))
    attributes = _attributes(name, kind, place // len(category.types))
    rng.shuffle(attributes)
    title, asin = _title(kind, attributes, rng), _asin(number)
    options = _options(category, kind, rng)
    raw = {
        "name": title,
        "asin": asin,
        "category": name,
        "query": kind.query,
        "page": 1 + number % 40,
        "product_category": f"{category.path} › {kind.query.title()} › {kind.noun}",
        "full_description": f"{title}. {kind.noun}: {', '.join(attributes)}, {rng.choice(lexicon().praise)}.",
        "small_description": [f"{a.capitalize()}: {rng.choice(lexicon().praise)}." for a in attributes],
        "pricing": _pricing(kind, rng),
        "images": [""],
        "average_rating": "",
        "customization_options": options or "",
    }
    wanted = attributes[: rng.choice((1, 2, 2))]
    need = f"{', '.join(wanted)} {kind.query}"
    told = {"attributes": attributes}
    if rng.random() < 2 / 3:
        told |= {"instruction": f"Find me {need}", "instruction_attributes": wanted}
    return raw, told, _wishes(asin, need, wanted, options, rng) if rng.random() < 1 / 12 else []


def _attributes(name: str, kind: Kind, variant: int) -> list[str]:
    """Three of the type's attributes: every combination once before any comes again."""
    combinations = list(itertools.combinations(kind.attributes, 3))
    random.Random(seed_of("webshop attributes", name, kind.noun)).shuffle(combinations)
    return list(combinations[variant % len(combinations)])


def _title(kind: Kind, attributes: list[str], rng: random.Random) -> str:
    words = lexicon()
    brand = rng.choice(words.brand_starts) + rng.choice(words.brand_ends)
    model = f"{rng.choice('ABCDEFGH')}{rng.randrange(10, 99)}"
    return f"{brand} {kind.noun}, {', '.join(a.title() for a in attributes)}, {model}"


def _asin(number: int) -> str:
    value = int(digest("webshop asin", VERSION, number), 16)
    letters: list[str] = []
    for _ in range(8):
        value, letter = divmod(value, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "B0" + "".join(letters)


def _options(category: Category, kind: Kind, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """As many of the type's options as `OPTION_COUNTS` says, if it has so many; two to four values each."""
    (drawn,) = rng.choices(range(len(OPTION_COUNTS)), OPTION_COUNTS)
    picked = rng.sample(kind.options, min(drawn, len(kind.options)))
    chosen = [name for name in kind.options if name in picked]
    options: dict[str, list[dict[str, Any]]] = {}
    for name in chosen:
        pool = category.options[name]
        values = set(rng.sample(pool, min(len(pool), rng.randint(2, 4))))
        options[name.title()] = [{"value": v.title(), "image": None, "is_available": True} for v in pool if v in values]
    return options


def _pricing(kind: Kind, rng: random.Random) -> str:
    price = int(rng.uniform(kind.low, kind.high)) + rng.choice((0.49, 0.95, 0.99))
    return f"${price:.2f}" if rng.random() < 0.9 else f"${price:.2f} - ${price + rng.randint(2, 9):.2f}"


def _wishes(
    asin: str, need: str, wanted: list[str], options: dict[str, list[dict[str, Any]]], rng: random.Random
) -> list[dict[str, Any]]:
    values = [rng.choice(contents)["value"].lower() for contents in options.values()]
    asked = f"{need}{' in ' + ' and '.join(values) if values else ''}"
    return [
        {
            "asin": asin,
            "instruction": rng.choice(lexicon().wishes).format(need=asked) + ".",
            "instruction_attributes": wanted,
            "instruction_options": values,
        }
    ]
