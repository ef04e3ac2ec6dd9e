"""A hand-made shop for the WebShop tests: few products, every number computable by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.envs.webshop import generator
from ragdistill.envs.webshop.products import Product
from ragdistill.envs.webshop.reward import Goal


def product(**changed: Any) -> Product:
    """A red cotton shirt of 20 dollars, changed as told."""
    base = Product(
        asin="B0SHIRT001", category="fashion", query="men's shirts",
        product_category="Clothing › Men › Shirts", title="Acme Cotton Shirt", description="A Soft Shirt.",
        bullets=("Machine wash", "Regular fit"), prices=(20.0,), price_tag="$20.0",
        options={"color": ("red", "dark blue"), "size": ("small", "x-large")},
        attributes=("long sleeve", "easy care"), nouns=("acme", "cotton", "shirt"),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changed)


def goal(**changed: Any) -> Goal:
    """Asks for that shirt in red and small, below 30 dollars."""
    base = Goal(
        asin="B0SHIRT001", instruction="Find me long sleeve shirts with color: red, and size: small",
        attributes=("long sleeve", "machine wash"), options=(("color", "red"), ("size", "small")), price_upper=30.0,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changed)


class Shelf:
    """Shelves over a list; a search finds all products whose title holds the query's first word, in list order."""

    def __init__(self, *products: Product) -> None:
        self._products = {p.asin: p for p in products}

    def product(self, asin: str) -> Product:
        return self._products[asin]

    def price(self, asin: str) -> float:
        return self._products[asin].prices[0]

    def search(self, query: str) -> list[str]:
        word = query.split(maxsplit=1)[0]
        return [a for a, p in self._products.items() if word in p.title.lower()][:50]


def write_original(folder: Path, count: int) -> Path:
    """The first `count` embedded products in the original's files, as `RAGDISTILL_WEBSHOP_DATA` names them."""
    made = list(generator.generate(count))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items_shuffle.json").write_text(json.dumps([raw for raw, _, _ in made]))
    (folder / "items_ins_v2.json").write_text(json.dumps({raw["asin"]: attributes for raw, attributes, _ in made}))
    (folder / "items_human_ins.json").write_text(json.dumps({raw["asin"]: wishes for raw, _, wishes in made}))
    return folder


def shared_data() -> Path:
    """The folder with the original 1k files; skips where it is absent."""
    named = os.environ.get("RAGDISTILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
    folder = Path(named)
    if not (folder / "webshop_docs_1k.jsonl.gz").is_file():
        pytest.skip("no WebShop files: set RAGDISTILL_SHARED_DATA to the folder of webshop_docs_1k.jsonl.gz")
    return folder
