"""The catalogue on disk: products, goals and bucket words in one SQLite file, the search index beside it.

Built once per content, streaming (memory does not grow with the catalogue but for its names), into a folder named by
the content, temp-then-rename, by one process at a time; opened read-only by any number of worker processes, which share
its pages through the operating system. Knows where nothing comes from (`sources`) and no page.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.envs.webshop.buckets import BucketWords, count_words
from ragdistill.envs.webshop.goals import SEED, Source, draw_price, goals_of, is_feasible
from ragdistill.envs.webshop.nouns import nouns
from ragdistill.envs.webshop.products import Product, Review
from ragdistill.envs.webshop.reward import Goal
from ragdistill.envs.webshop.search import SearchIndex, build_index
from ragdistill.envs.webshop.splits import family_of
from ragdistill.errors import DataError

FORMAT = "catalogue-1"
"""Changes whenever what is stored changes its meaning; part of every folder's name."""
TOP = 50
"""Hits of a search, as in the original."""
KEPT = 4096
"""Products that a process keeps in memory, of those that were looked at."""
SOURCES: tuple[Source, ...] = ("synthetic", "human")

_SCHEMA = """
CREATE TABLE products (number INTEGER PRIMARY KEY, asin TEXT UNIQUE, price REAL, family TEXT, body BLOB);
CREATE TABLE goals (source TEXT, number INTEGER, asin TEXT, feasible INTEGER, body BLOB, PRIMARY KEY (source, number))
  WITHOUT ROWID;
CREATE TABLE reviews (asin TEXT PRIMARY KEY, rating TEXT, body BLOB) WITHOUT ROWID;
CREATE TABLE words (word TEXT PRIMARY KEY, counts BLOB) WITHOUT ROWID;
"""
Reviews = Iterable[tuple[str, str, tuple[Review, ...]]]


class GoalRow(msgspec.Struct, frozen=True, gc=False):
    """Where a goal is and what sampling needs to know of it; a full catalogue has millions of them."""

    source: Source
    number: int
    """Position in generation order; `goals.official_order` shuffles these."""
    asin: str
    family: str
    category: str
    options: int
    """How many it asks for."""
    feasible: bool


class Catalogue:
    """Read access; also the `Shelves` of a visit. A damaged file is a `DataError` when it is found to be one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._db = sqlite3.connect(f"file:{folder / 'catalogue.sqlite'}?mode=ro&immutable=1", uri=True)
        except sqlite3.Error as e:
            raise self._damaged(e) from None
        self._index = SearchIndex(folder)
        self._cached = lru_cache(KEPT)(self._product)
        self.bucket_words = BucketWords(self._counts)

    def __len__(self) -> int:
        return self._index.documents

    def _rows(self, query: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._db.execute(query, values)
        except sqlite3.DatabaseError as e:
            raise self._damaged(e) from None

    def _damaged(self, error: sqlite3.Error) -> DataError:
        return DataError(f"The catalogue in {self._folder} is damaged ({error}); delete that folder.")

    def product(self, asin: str) -> Product:
        """One product, reviews included; `DataError` when the catalogue has none of that name."""
        return self._cached(asin)

    def _product(self, asin: str) -> Product:
        found = self._rows(
            "SELECT p.body, r.rating, r.body FROM products p LEFT JOIN reviews r USING (asin) WHERE asin = ?", (asin,)
        )
        row = next(found, None)
        if row is None:
            raise DataError(f"The catalogue has no product {asin}; was the task made for another catalogue?")
        product = msgspec.json.decode(row[0], type=Product)
        if row[1] is None:
            return product
        return msgspec.structs.replace(
            product, rating=row[1], reviews=msgspec.json.decode(row[2], type=tuple[Review, ...])
        )

    def products(self) -> Iterator[Product]:
        """All products, in the catalogue's order."""
        for (body,) in self._rows("SELECT body FROM products ORDER BY number"):
            yield msgspec.json.decode(body, type=Product)

    def price(self, asin: str) -> float:
        """What a purchase of `asin` costs: a price range was settled when the catalogue was built."""
        return next(self._rows("SELECT price FROM products WHERE asin = ?", (asin,)))[0]

    def search(self, query: str) -> list[str]:
        """ASINs of the best `TOP` products."""
        numbers = self._index.search(query, TOP)
        names = self._rows(
            f"SELECT number, asin FROM products WHERE number IN ({','.join('?' * len(numbers))})", numbers
        )
        asins = dict(names)
        return [asins[n] for n in numbers]

    def goal(self, source: str, number: int) -> Goal:
        """One goal; `DataError` when there is none of that number."""
        row = next(self._rows("SELECT body FROM goals WHERE source = ? AND number = ?", (source, number)), None)
        if row is None:
            raise DataError(f"The catalogue has no {source} goal {number}; was the task made for another catalogue?")
        return msgspec.json.decode(row[0], type=Goal)

    def goal_rows(self, source: Source) -> list[GoalRow]:
        """All goals of `source`, in generation order; those of one product share its names, to take less memory."""
        names: dict[str, str] = {}
        one = names.setdefault
        rows = self._rows(
            "SELECT g.number, g.asin, p.family, json_extract(p.body, '$.category'), "
            "json_array_length(g.body, '$.options'), g.feasible "
            "FROM goals g JOIN products p USING (asin) WHERE g.source = ? ORDER BY g.number",
            (source,),
        )
        return [
            GoalRow(source, number, one(asin, asin), one(family, family), one(category, category), options, bool(ok))
            for number, asin, family, category, options, ok in rows
        ]

    def goal_count(self, source: Source) -> int:
        """How many goals `source` has; their numbers begin with 0."""
        return next(self._rows("SELECT count(*) FROM goals WHERE source = ?", (source,)))[0]

    def families(self, source: Source, numbers: Sequence[int]) -> set[str]:
        """Families of the products that these goals ask for."""
        rows = self._rows(
            "SELECT DISTINCT p.family FROM goals g JOIN products p USING (asin) "
            "WHERE g.source = ? AND g.number IN (SELECT value FROM json_each(?))",
            (source, msgspec.json.encode(numbers).decode()),
        )
        return {family for (family,) in rows}

    def _counts(self, word: str) -> dict[str, int]:
        row = next(self._rows("SELECT counts FROM words WHERE word = ?", (word,)), None)
        return msgspec.json.decode(row[0], type=dict[str, int]) if row else {}

    def close(self) -> None:
        self._db.close()


def ensure_catalogue(folder: Path, products: Callable[[], Iterable[Product]], reviews: Callable[[], Reviews]) -> Path:
    """Build the catalogue in `folder` unless it is there; of several processes at once one builds and the others wait.

    What a killed build left behind is removed: it may be gigabytes.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for abandoned in folder.parent.glob(f".{folder.name}.*/"):
            shutil.rmtree(abandoned, ignore_errors=True)
        if not folder.exists():
            draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _build(draft, products(), reviews())
                draft.chmod(0o755)
                os.rename(draft, folder)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
    return folder


def _build(folder: Path, products: Iterable[Product], reviews: Reviews) -> None:
    db = sqlite3.connect(folder / "catalogue.sqlite")
    db.executescript(_SCHEMA)
    rng = random.Random(SEED)
    counts: dict[str, Counter[str]] = {}
    if not build_index(_store(db, products, rng, counts), folder):
        raise DataError("The catalogue has no products; see README.md for WebShop's files.")
    db.executemany(
        "INSERT INTO words VALUES (?, ?)", ((word, msgspec.json.encode(counts[word])) for word in sorted(counts))
    )
    db.executemany(
        "INSERT OR IGNORE INTO reviews VALUES (?, ?, ?)", ((a, r, msgspec.json.encode(b)) for a, r, b in reviews)
    )
    after_prices = rng.getstate()
    for source in SOURCES:  # the original draws the bounds of either kind right after the prices
        rng.setstate(after_prices)
        db.executemany("INSERT INTO goals VALUES (?, ?, ?, ?, ?)", _goal_rows(db, source, rng))
    db.commit()
    db.close()


def _store(
    db: sqlite3.Connection, products: Iterable[Product], rng: random.Random, counts: dict[str, Counter[str]]
) -> Iterator[tuple[str, str]]:
    """Write each product and pass on what the search engine indexes; fills the words of the buckets."""
    for number, product in enumerate(products):
        full = msgspec.structs.replace(product, nouns=nouns(product.title))
        row = (number, full.asin, draw_price(full.prices, rng), family_of(full), msgspec.json.encode(full))
        db.execute("INSERT INTO products VALUES (?, ?, ?, ?, ?)", row)
        count_words(full, counts)
        yield full.asin, full.index_text()


def _goal_rows(
    db: sqlite3.Connection, source: Source, rng: random.Random
) -> Iterator[tuple[str, int, str, bool, bytes]]:
    number = 0
    for price, body in db.execute("SELECT price, body FROM products ORDER BY number"):
        product = msgspec.json.decode(body, type=Product)
        for goal in goals_of(product, price, source, rng):
            yield source, number, goal.asin, is_feasible(goal, product, price), msgspec.json.encode(goal)
            number += 1
