"""WebShop on the original's 1,000 products: the known counts, gold purchases, official order. Needs the files."""

from __future__ import annotations

import gzip
import importlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from thefuzz.utils import full_process

from ragdistill.envs.webshop.catalogue import Catalogue
from ragdistill.envs.webshop.products import read_entries
from ragdistill.envs.webshop.reward import COLOURS, normalise_colour, option_hits
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder
from ragdistill.envs.webshop.splits import split_of
from tests.webshop_small import shared_data

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogue]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(shared_data()))
        folder = catalogue_folder(tmp_path_factory.mktemp("cache"), None)
    opened = Catalogue(folder)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def gold() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module("webshop_gold")


def test_counts_are_the_originals(catalogue: Catalogue) -> None:
    rows = catalogue.goal_rows("synthetic")
    assert len(catalogue) == 1000
    assert (len(rows), len({r.asin for r in rows})) == (6910, 415)
    assert max(Counter(r.asin for r in rows).values()) == 558
    assert len(catalogue.goal_rows("human")) == 13
    assert sum(not r.feasible for r in rows) == 458


def test_gold_purchases_earn_everything_but_for_one_known_flaw(catalogue: Catalogue, gold: ModuleType) -> None:
    rows = catalogue.goal_rows("synthetic")
    assert sum(r.feasible for r in rows) / len(rows) >= 0.93
    sample = rows[::23]
    assert len(sample) == 301
    earned = {r.number: gold.purchase(catalogue, r).total for r in sample}
    assert {n for n, total in earned.items() if total < 1.0} == {r.number for r in sample if not r.feasible}


def test_an_infeasible_goal_loses_options_alone_by_a_colour_inside_another_word(
    catalogue: Catalogue, gold: ModuleType
) -> None:
    for row in (r for r in catalogue.goal_rows("synthetic") if not r.feasible):
        goal, earned = catalogue.goal("synthetic", row.number), gold.purchase(catalogue, row)
        assert earned.r_type == earned.r_att == 1.0 and earned.r_price
        missed = [value for name, value in goal.options if not option_hits([value], [(name, value)])]
        assert missed and earned.r_option == (len(goal.options) - len(missed)) / len(goal.options)
        for value in missed:
            colour, words = normalise_colour(value), full_process(value, force_ascii=True).split()
            assert colour in COLOURS and colour not in words and any(colour in word for word in words), value
        assert [colour for colour, _ in gold.missed(catalogue, row)] == [normalise_colour(v) for v in missed]


def test_all_human_goals_can_be_won(catalogue: Catalogue, gold: ModuleType) -> None:
    assert [gold.purchase(catalogue, r).total for r in catalogue.goal_rows("human")] == [1.0] * 13


def test_the_table_of_gold_purchases_accounts_for_every_infeasible_goal(catalogue: Catalogue, gold: ModuleType) -> None:
    lines = gold.report(catalogue, 230).splitlines()
    assert "| of them infeasible | 458 (6.6%) |" in lines
    losses = [line.split(" | ") for line in lines[lines.index("") + 3 :]]
    assert sum(int(counts.rstrip(" |")) for _, _, counts in losses) == 458
    assert "| tan | rectangular 90, tank 10, stand 2 | 102 |" in lines
    assert "no colour word" not in "".join(lines)


def test_the_loader_agrees_with_the_originals_own_documents(catalogue: Catalogue) -> None:
    for document in read_entries(shared_data() / "webshop_docs_1k.jsonl.gz"):
        product = catalogue.product(document["asin"])
        assert {k: list(v) for k, v in product.options.items()} == document["options"]
        assert (product.price_tag, list(product.prices)) == (document["Price"], document["pricing"])
        assert list(product.attributes) == document["Attributes"]
        assert list(product.bullets) == document["BulletPoints"]


def test_the_index_text_is_the_originals(catalogue: Catalogue) -> None:
    with gzip.open(Path(shared_data()) / "webshop_docs_1k.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            assert catalogue.product(document["id"]).index_text() == document["contents"]


def test_buckets_of_unseen_products_are_mostly_right(catalogue: Catalogue) -> None:
    rows = [r for r in catalogue.goal_rows("synthetic") if split_of(r.family) in ("test", "dev")]
    right = [catalogue.bucket_words.bucket(catalogue.goal(r.source, r.number).instruction) == r.category for r in rows]
    assert sum(right) / len(right) > 0.95
