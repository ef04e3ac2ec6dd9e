"""WebShop's catalogue: the files' formats, goals and their order, what is embedded, what many processes share."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ragdistill.envs.webshop import generator
from ragdistill.envs.webshop.catalogue import SOURCES, Catalogue, ensure_catalogue
from ragdistill.envs.webshop.goals import gold_options, official_order, official_range
from ragdistill.envs.webshop.products import Product, product_of, read_entries, read_products, read_reviews
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder, catalogue_key, embedded_products
from ragdistill.errors import ConfigError, DataError
from tests.webshop_small import product

RAW: dict[str, Any] = {
    "asin": "B000000001", "name": "A / B", "full_description": "d", "small_description": ["one", "two"],
    "pricing": "$1,234.50", "category": "garden", "query": " Rugs ", "product_category": "a › b", "images": ["x"],
    "customization_options": {"Size": [{"value": " 5/8 Inch "}, {"value": "X"}], "Color": None},
    "average_rating": "", "seller_id": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded catalogue of 300 products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        return catalogue_folder(tmp_path_factory.mktemp("cache"), 300)


@pytest.fixture
def catalogue(folder: Path) -> Iterator[Catalogue]:
    opened = Catalogue(folder)
    yield opened
    opened.close()


def test_an_entry_is_read_as_the_original_reads_it() -> None:
    got = product_of(RAW, {"attributes": ["soft"], "instruction": None}, ())
    assert (got.query, got.prices, got.price_tag) == ("rugs", (1234.5,), "$1234.5")
    assert got.options == {"size": ("5 | 8 inch", "x")}
    assert (got.attributes, got.instruction) == (("soft",), "")
    assert got.index_text() == "a / b d one size: 5 | 8 inch, x"
    assert product_of(RAW | {"small_description": "one"}, {}, ()).bullets == ("one",)
    assert product_of(RAW, {}, ()).attributes == ("DUMMY_ATTR",)


@pytest.mark.parametrize(
    ("pricing", "prices", "tag"),
    [
        ("", (100.0,), "$100.0"),
        (None, (100.0,), "$100.0"),
        ("$5", (5.0,), "$5.0"),
        ("$10.50 - $20.00", (10.5, 20.0), "$10.5 to $20.0"),
        ("$1$2$3", (1.0, 2.0), "$1.0 to $2.0"),
        ([7.25], (7.25,), "$7.25"),
    ],
)
def test_prices(pricing: Any, prices: tuple[float, ...], tag: str) -> None:
    got = product_of(RAW | {"pricing": pricing}, {}, ())
    assert (got.prices, got.price_tag) == (prices, tag)


@pytest.mark.parametrize("layout", ["array", "indented", "lines"])
def test_every_layout_streams_the_same_products(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragdistill.envs.webshop.products._CHUNK", 37)  # so that entries lie across chunks
    entries = [RAW | {"asin": f"B00000000{i}"} for i in range(5)]
    entries += [RAW, RAW | {"asin": "nan"}, RAW | {"asin": "B0000000012"}]
    path = tmp_path / ("items.jsonl" if layout == "lines" else "items.json")
    lines = "".join(json.dumps({"id": e["asin"], "product": e}) + "\n" for e in entries)
    path.write_text(lines if layout == "lines" else json.dumps(entries, indent=2 if layout == "indented" else None))
    assert [p.asin for p in read_products(path, {}, {})] == [f"B00000000{i}" for i in range(5)]
    assert len(list(read_products(path, {}, {}, limit=3))) == 3


@pytest.mark.parametrize("text", ['[{"asin": "B0"', "[1", "", "[{}]", '[{"asin": 3}]'])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "items.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(str(path))):
        list(read_products(path, {}, {}))
    with pytest.raises(DataError, match="does not exist"):
        list(read_entries(tmp_path / "none.json"))


def test_reviews_are_joined(tmp_path: Path) -> None:
    rows = [{"asin": "B0SHIRT001", "average_rating": 4.5, "reviews": [{"title": "t", "stars": "5.0", "review": "b"}]}]
    path = tmp_path / "reviews.json"
    path.write_text(
        json.dumps([*rows, {"asin": "B0OTHER", "average_rating": "x", "reviews": [{"title": "t", "score": 1}]}])
    )
    folder = ensure_catalogue(tmp_path / "c", lambda: [product()], lambda: read_reviews(path))
    got = Catalogue(folder).product("B0SHIRT001")
    assert (got.rating, got.reviews[0].score, got.reviews[0].body) == ("4.5", "5.0", "b")


def test_the_embedded_catalogue_is_the_same_every_time_and_each_product_its_own() -> None:
    first, again = list(generator.generate(40)), list(generator.generate(25))
    assert first[:25] == again
    assert json.loads(json.dumps(first)) == [list(x) for x in first]


def test_the_embedded_catalogue_has_everything_the_original_has(catalogue: Catalogue) -> None:
    products = list(catalogue.products())
    assert len(products) == len(catalogue) == 300
    assert len({p.asin for p in products}) == len({p.title for p in products}) == 300
    assert Counter(p.category for p in products) == dict.fromkeys(
        ("beauty", "electronics", "fashion", "garden", "grocery"), 60
    )
    assert all(re.fullmatch("[A-Z0-9]{10}", p.asin) and p.description and p.bullets and p.nouns for p in products)
    assert all(len(p.prices) == 1 or p.prices[0] < p.prices[1] for p in products)
    assert 0.05 < sum(len(p.prices) == 2 for p in products) / 300 < 0.2
    shares = [sum(len(p.options) == n for p in products) / 300 for n in range(4)]
    assert all(abs(s - as_original) < 0.08 for s, as_original in zip(shares, (0.27, 0.34, 0.36, 0.03), strict=True))
    assert any(p.wishes for p in products)
    synthetic, human = catalogue.goal_rows("synthetic"), catalogue.goal_rows("human")
    assert len(synthetic) > 300 and len(human) > 5
    assert 0 < sum(not r.feasible for r in synthetic) < 0.1 * len(synthetic), "the original: 458 of 6,910"
    assert all(r.feasible for r in human)


def test_the_shipped_size_is_at_least_a_thousand_products() -> None:
    titles = [p.title for p in embedded_products(1200)]
    assert len(set(titles)) > 1190


def test_a_search_with_the_instruction_finds_most_products_on_the_first_page(catalogue: Catalogue) -> None:
    goals = [catalogue.goal("synthetic", r.number) for r in catalogue.goal_rows("synthetic")[::7]]
    found = sum(g.asin in catalogue.search(g.instruction.split(", and price")[0])[:10] for g in goals)
    assert found / len(goals) > 0.9


def test_feasible_means_that_the_gold_purchase_earns_everything(catalogue: Catalogue) -> None:
    rows = catalogue.goal_rows("synthetic")
    for row in rows[:50]:
        goal = catalogue.goal("synthetic", row.number)
        gold = catalogue.product(goal.asin)
        assert gold_options(goal, gold) == dict(goal.options)
        assert (row.category, row.options, row.feasible) == (gold.category, len(goal.options), True)
        assert catalogue.price(goal.asin) <= goal.price_upper


def test_goals_of_one_product_share_its_names_in_memory(catalogue: Catalogue) -> None:
    rows = catalogue.goal_rows("synthetic")
    for names in ([r.asin for r in rows], [r.family for r in rows], [r.category for r in rows]):
        assert len(set(map(id, names))) == len(set(names)) < len(rows)


def test_families_are_those_of_the_goals_asked_about(catalogue: Catalogue) -> None:
    for source in SOURCES:
        rows = catalogue.goal_rows(source)
        assert [r.number for r in rows] == list(range(catalogue.goal_count(source)))
        assert catalogue.families(source, [r.number for r in rows[::9]]) == {r.family for r in rows[::9]}
        assert catalogue.families(source, []) == set()


def test_buckets_come_from_the_words_of_the_instruction(catalogue: Catalogue) -> None:
    bucket = catalogue.bucket_words.bucket
    assert bucket("find me a paraben free shampoo for dry hair, and price lower than 20.00 dollars") == "beauty"
    assert bucket("i need a 6 feet high speed hdmi cable") == "electronics"
    assert bucket("machine wash long sleeve dress shirts") == "fashion"
    assert bucket("solid wood console tables with storage shelf") == "garden"
    assert bucket("gluten free almonds") == "grocery"
    assert bucket("") == bucket("zzzqqq"), "a word that no product has says nothing"


def test_official_ranges_and_order() -> None:
    assert official_order(5) == official_order(5) != list(range(5))
    assert official_range("test", 6910) == range(500)
    assert official_range("eval", 6910) == range(500, 1500)
    assert official_range("train", 6910) == range(1500, 6910)
    assert official_range("eval", 300) == range(300, 300)


def test_unknown_goals_and_products_are_named(catalogue: Catalogue) -> None:
    with pytest.raises(DataError, match="another catalogue"):
        catalogue.goal("synthetic", 10**6)
    with pytest.raises(DataError, match="no product B0"):
        catalogue.product("B0")
    assert catalogue.search("") == catalogue.search("zzzzqqq") == []


def test_an_empty_catalogue_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no products"):
        ensure_catalogue(tmp_path / "c", tuple[Product, ...], lambda: ())
    assert [p.name for p in tmp_path.iterdir()] == [".c.lock"]


def test_the_data_folder_must_hold_the_files_and_its_content_is_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="lacks WebShop's files"):
        catalogue_key(None)
    (tmp_path / "items_shuffle_1000.json").write_text(json.dumps([RAW]))
    (tmp_path / "items_ins_v2_1000.json").write_text("{}")
    (tmp_path / "items_human_ins.json").write_text("{}")
    before = catalogue_key(None)
    assert len(Catalogue(catalogue_folder(tmp_path / "cache", None))) == 1
    (tmp_path / "items_human_ins.json").write_text('{"B0": []}')
    assert catalogue_key(None) != before
    monkeypatch.delenv(VARIABLE)
    assert catalogue_key(None) != before
