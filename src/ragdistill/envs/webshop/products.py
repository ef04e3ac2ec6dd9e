"""What a product is, and how one is read from the original files (or from the search engine's documents).

The rules are WebShop's loader's: which products count, how option values are spelled, what a price tag says. Knows no
goal, no page and no database.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from ragdistill.errors import DataError

NO_ATTRIBUTE = "DUMMY_ATTR"
"""What the original shows for a product without an entry in the attributes file."""
NO_RATING = "N.A."
DEFAULT_PRICE = 100.0
_CHUNK = 1 << 20
MAX_ENTRY = 1 << 26
"""Characters of one entry of an array; the original's have some ten thousand. Bounds what a damaged file costs."""


class Wish(msgspec.Struct, frozen=True):
    """One person's instruction for a product."""

    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    """Option values without their names."""


class Review(msgspec.Struct, frozen=True):
    """One review, as its page shows it."""

    title: str
    score: str
    body: str


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """One product, as the pages and the reward need it."""

    asin: str
    category: str
    """beauty, electronics, fashion, garden or grocery."""
    query: str
    """The shop query it was collected with, lower case."""
    product_category: str
    """Path, joined by ' › '."""
    title: str
    description: str
    bullets: tuple[str, ...]
    prices: tuple[float, ...]
    """One price, or the two ends of a range; dollars."""
    price_tag: str
    options: dict[str, tuple[str, ...]]
    """Name → values, both lower case, in the shop's order."""
    attributes: tuple[str, ...]
    instruction: str = ""
    """Template of the synthetic goals; empty for products that have none."""
    instruction_attributes: tuple[str, ...] = ()
    wishes: tuple[Wish, ...] = ()
    nouns: tuple[str, ...] = ()
    """Of the title, lower case, repeats included; filled by the catalogue."""
    rating: str = NO_RATING
    reviews: tuple[Review, ...] = ()

    def index_text(self) -> str:
        """What the search engine indexes."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, self.bullets[0] if self.bullets else "", options]).lower()


_DAMAGE = (KeyError, TypeError, AttributeError, ValueError)
"""What an entry raises that lacks something or holds something else."""


def read_products(
    path: Path, attributes: Mapping[str, Any], wishes: Mapping[str, Any], limit: int | None = None
) -> Iterator[Product]:
    """Products of `path` in its order; the same ASIN twice, or an impossible one, is left out.

    `path`: the original array (`items_shuffle*.json`) or documents, one a line (`.jsonl`, also `.gz`). `attributes`,
    `wishes`: the original files' content, by ASIN. `limit` counts entries of the file, as the original's
    `num_products` does. Memory is that of one product and the ASINs. `DataError` names a damaged entry, also one of
    another type than the pages and the reward need.
    """
    seen: set[str] = set()
    for i, raw in enumerate(read_entries(path)):
        if i == limit:
            return
        try:
            asin = raw["asin"]
            if asin == "nan" or len(asin) > 10 or asin in seen:
                continue
            seen.add(asin)
            product = product_of(raw, attributes.get(asin) or {}, wishes.get(asin) or ())
            # A struct is not checked when it is made; the catalogue stores this text and must read it back.
            yield msgspec.json.decode(msgspec.json.encode(product), type=Product)
        except _DAMAGE as e:
            raise DataError(f"{path}, product {i}: {type(e).__name__} {e}; fetch the file again.") from None


def product_of(raw: Mapping[str, Any], attributes: Mapping[str, Any], wishes: Iterable[Mapping[str, Any]]) -> Product:
    """One entry of the products file with its entries of the other two files."""
    prices = prices_of(raw.get("pricing"))
    tag = f"${prices[0]}" if len(prices) == 1 else f"${prices[0]} to ${prices[1]}"
    small = raw["small_description"]
    return Product(
        asin=raw["asin"],
        category=raw["category"],
        query=raw["query"].lower().strip(),
        product_category=raw["product_category"],
        title=raw["name"],
        description=raw["full_description"] or "",
        bullets=tuple(small) if isinstance(small, list) else (small or "",),
        prices=prices,
        price_tag=tag,
        options=options_of(raw["customization_options"]),
        attributes=tuple(attributes.get("attributes", raw.get("Attributes") or (NO_ATTRIBUTE,))),
        instruction=attributes.get("instruction") or "",
        instruction_attributes=tuple(attributes.get("instruction_attributes") or ()),
        wishes=tuple(
            Wish(w["instruction"], tuple(w["instruction_attributes"]), tuple(w["instruction_options"])) for w in wishes
        ),
    )


def prices_of(pricing: str | list[float] | None) -> tuple[float, ...]:
    """One price or the two ends of a range; a product without one costs 100 dollars."""
    if not pricing:
        return (DEFAULT_PRICE,)
    if isinstance(pricing, list):
        return tuple(pricing[:2])
    found = tuple(float(re.sub(r"[^\d.]", "", part)) for part in pricing.split("$")[1:])
    return found[:2] or (DEFAULT_PRICE,)


def options_of(customization: Mapping[str, Any] | str | None) -> dict[str, tuple[str, ...]]:
    """Option names and values as the shop shows them: lower case, '/' spelled ' | '."""
    if not customization or isinstance(customization, str):
        return {}
    return {
        name.lower(): tuple(c["value"].strip().replace("/", " | ").lower() for c in contents)
        for name, contents in customization.items()
        if contents is not None
    }


def read_reviews(path: Path) -> Iterator[tuple[str, str, tuple[Review, ...]]]:
    """(ASIN, average rating, reviews) of the original's `reviews.json`; `DataError` names a damaged entry."""
    for i, raw in enumerate(read_entries(path)):
        try:
            reviews = tuple(
                Review(str(r["title"]), str(r.get("score", r.get("stars", ""))), str(r.get("review", "")))
                for r in raw["reviews"]
            )
            yield str(raw["asin"]), str(raw["average_rating"]), reviews
        except _DAMAGE as e:
            raise DataError(f"{path}, entry {i}: {type(e).__name__} {e}; fetch the file again.") from None


def read_by_asin(path: Path) -> dict[str, Any]:
    """Content of the attributes file or of people's instructions: something for each ASIN."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as e:
        raise DataError(f"{path} is not what WebShop has under that name ({e}); fetch it again.") from None


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON array or of a document file, one at a time; `DataError` for a missing or damaged file.

    A file that was fetched in part counts as damaged, but for documents that end with a whole line.
    """
    try:
        if ".jsonl" in path.name:
            with _open(path) as lines:
                for line in filter(str.strip, lines):
                    document = msgspec.json.decode(line, type=dict[str, Any])
                    yield document.get("product", document)
        else:
            with _open(path) as file:
                yield from _array(file)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; see README.md for WebShop's files.") from None
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path} is damaged or not JSON ({e}); fetch it again.") from None


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _array(file: IO[str]) -> Iterator[dict[str, Any]]:
    """Elements of one JSON array, decoded as they arrive: the full catalogue has five gigabytes."""
    decoder, text, at = json.JSONDecoder(), file.read(_CHUNK).lstrip().removeprefix("["), 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if text.startswith("]", at):
            return
        try:
            entry, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            more = file.read(max(_CHUNK, len(text) - at)) if len(text) - at < MAX_ENTRY else ""
            if not more:
                raise
            text, at = text[at:] + more, 0
            continue
        yield entry
