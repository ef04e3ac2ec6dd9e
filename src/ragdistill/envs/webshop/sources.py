"""Where a catalogue comes from: the original files, or the embedded generator; and its folder in the cache.

`RAGDISTILL_WEBSHOP_DATA` names the folder with the original files: products (`items_shuffle.json`,
`items_shuffle_1000.json`, or the search engine's documents `*documents*.jsonl`, `*docs*.jsonl`, also `.gz`), attributes
(`items_ins_v2*.json`), people's instructions (`items_human_ins.json`) and, if there, `reviews.json`. Of several, the
first by preference, then by name, is taken; files that are being fetched (`….part`) are none of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ragdistill.envs.webshop import generator
from ragdistill.envs.webshop.catalogue import FORMAT, Reviews, ensure_catalogue
from ragdistill.envs.webshop.products import Product, product_of, read_by_asin, read_products, read_reviews
from ragdistill.errors import ConfigError
from ragdistill.records import digest

VARIABLE = "RAGDISTILL_WEBSHOP_DATA"
EMBEDDED = 1200
"""Products of the embedded catalogue."""
_PRODUCTS = (
    ("items_shuffle.json", "items_ins_v2.json"),
    ("items_shuffle_1000.json", "items_ins_v2_1000.json"),
    ("*documents*.jsonl", "items_ins_v2*.json"),
    ("*documents*.jsonl.gz", "items_ins_v2*.json"),
    ("*docs*.jsonl", "items_ins_v2*.json"),
    ("*docs*.jsonl.gz", "items_ins_v2*.json"),
)
"""(products, attributes) by preference."""
_SAMPLE = 1 << 20


class Files(msgspec.Struct, frozen=True):
    """The original files."""

    products: Path
    attributes: Path
    wishes: Path
    reviews: Path | None

    def key(self) -> str:
        """Identity of the content: sizes, and hashes of the small files and of both ends of the large ones."""
        found = [self.products, self.attributes, self.wishes, *([self.reviews] if self.reviews else [])]
        return digest([(p.name, p.stat().st_size, _ends(p)) for p in found])


def _ends(path: Path) -> str:
    with path.open("rb") as f:
        head = f.read(_SAMPLE)
        f.seek(max(path.stat().st_size - _SAMPLE, 0))
        return hashlib.sha256(head + f.read()).hexdigest()


def original_files() -> Files | None:
    """The original files; None when `RAGDISTILL_WEBSHOP_DATA` is not set. `ConfigError` names what is missing."""
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    root = Path(named)
    pairs = [
        (p, a)
        for products, attributes in _PRODUCTS
        for p in sorted(root.glob(products))  # in name order: a folder's own differs between machines
        for a in sorted(root.glob(attributes))
    ]
    wishes = root / "items_human_ins.json"
    if not pairs or not wishes.is_file():
        raise ConfigError(
            f"{VARIABLE} is {named}, which lacks WebShop's files (products, items_ins_v2*.json, items_human_ins.json); "
            "see README.md."
        )
    reviews = root / "reviews.json"
    return Files(*pairs[0], wishes, reviews if reviews.is_file() else None)


def catalogue_key(limit: int | None) -> str:
    """Identity of the catalogue that `catalogue_folder` gives."""
    files = original_files()
    where = ["original", files.key()] if files else ["embedded", generator.fingerprint(), EMBEDDED]
    return digest(FORMAT, *where, limit)


def catalogue_folder(cache: Path, limit: int | None) -> Path:
    """The folder of the catalogue, built now if it is not there. `limit`: the first so many products only."""
    files = original_files()

    def products() -> Iterable[Product]:
        if files:
            return read_products(files.products, read_by_asin(files.attributes), read_by_asin(files.wishes), limit)
        return embedded_products(EMBEDDED if limit is None else limit)

    def reviews() -> Reviews:
        return read_reviews(files.reviews) if files and files.reviews else ()

    return ensure_catalogue(cache / "webshop" / catalogue_key(limit), products, reviews)


def embedded_products(count: int) -> Iterable[Product]:
    """Products of the embedded catalogue, through the same reader as the original's."""
    for raw, attributes, wishes in generator.generate(count):
        yield product_of(raw, attributes, wishes)
