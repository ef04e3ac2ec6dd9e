"""WebShop's pages and what actions do on them: the texts to the letter, the traps of the original."""

from __future__ import annotations

import msgspec
import pytest

from ragdistill.envs.webshop.pages import done_page, results_page, sub_page, visible
from ragdistill.envs.webshop.products import Review
from ragdistill.envs.webshop.reward import reward
from ragdistill.envs.webshop.shop import Visit, admissible, parse
from tests.webshop_small import Shelf, goal, product

INSTRUCTION = goal().instruction
HAT = product(asin="B0HAT00001", title="Acme Cotton Hat", options={}, price_tag="$5.0 to $7.5")
SHIRT_ITEM = (
    f"Instruction: [SEP] {INSTRUCTION} [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] dark blue [SEP] "
    "size [SEP] small [SEP] x-large [SEP] Acme Cotton Shirt [SEP] Price: $20.0 [SEP] Rating: N.A. [SEP] Description "
    "[SEP] Features [SEP] Reviews [SEP] Buy Now"
)


def visit(**options: bool) -> Visit:
    return Visit(Shelf(product(), HAT), goal(), **options)


def played(*actions: str, **options: bool) -> Visit:
    v = visit(**options)
    for action in actions:
        assert v.act(action), action
    return v


def test_every_page_reads_as_the_originals() -> None:
    v = visit()
    assert v.page.text == f"WebShop [SEP] Instruction: [SEP] {INSTRUCTION} [SEP] Search"
    v.act("search[acme things]")
    head = f"Instruction: [SEP] {INSTRUCTION} [SEP] Back to Search [SEP]"
    assert v.page.text == (
        f"{head} Page 1 (Total results: 2) [SEP] Next > [SEP] B0SHIRT001 [SEP] Acme Cotton Shirt [SEP] $20.0 "
        "[SEP] B0HAT00001 [SEP] Acme Cotton Hat [SEP] $5.0 to $7.5"
    )
    v.act("click[Next >]")
    assert v.page.text == f"{head} Page 2 (Total results: 2) [SEP] < Prev [SEP] Next >"  # on and on, as in the original
    v.act("click[< prev]")
    v.act("click[b0shirt001]")
    assert v.page.text == SHIRT_ITEM
    v.act("click[description]")
    assert v.page.text == f"{head} < Prev [SEP] A Soft Shirt."
    v.act("click[< prev]")
    v.act("click[features]")
    assert v.page.text == f"{head} < Prev [SEP] Machine wash [SEP] Regular fit"
    v.act("click[< prev]")
    v.act("click[red]")
    assert v.page.text == SHIRT_ITEM  # a chosen option is not shown
    v.act("click[buy now]")
    assert v.page.text == (
        "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk interface.) [SEP] "
        'Purchased [SEP] asin [SEP] B0SHIRT001 [SEP] options [SEP] {"color": "red"} [SEP] attrs [SEP] None [SEP] '
        "category [SEP] None [SEP] query [SEP] None [SEP] product category [SEP] None [SEP] Target [SEP] asin [SEP] "
        "options [SEP] attrs [SEP] price upper [SEP] instuction text [SEP] category [SEP] product category [SEP] "
        "query [SEP] Goal [SEP] None [SEP] Reward [SEP] Your score (min 0.0, max 1.0) [SEP] 0.8 [SEP] "
        "Reward Details [SEP] None"
    )


def test_reviews_and_attributes_pages() -> None:
    reviewed = product(reviews=(Review("Fine", "4.0", "It fits."), Review("", "2", "")))
    assert sub_page("i", reviewed, "Reviews").pieces[4:] == ('"Fine"', "4.0", "It fits.", '""', "2")
    assert sub_page("i", product(), "Attributes").pieces[4:] == (
        "long sleeve", "easy care", "fashion", "men's shirts", "Clothing › Men › Shirts",
    )  # fmt: skip
    assert "Attributes" in played("search[acme]", "click[b0shirt001]", show_attributes=True).page.pieces


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        ((" a ", ""), ("a",)),
        ((" ", "  "), ("", "")),  # an empty bullet leaves an empty piece, as in the original
        (("\n", " \n ", "\r\n"), ()),
        (("\xa0",), ("",)),
        (("a\nb",), ("a\nb",)),
        (("<b>&amp;</b>",), ("<b>&amp;</b>",)),
    ],
)
def test_white_space_is_read_as_from_html(texts: tuple[str, ...], pieces: tuple[str, ...]) -> None:
    assert visible(*texts) == pieces


def test_chosen_options_can_be_shown() -> None:
    v = played("search[acme]", "click[b0shirt001]", "click[small]", show_chosen=True)
    assert "small [SEP] x-large [SEP] chosen: small [SEP] Acme" in v.page.text
    v.act("click[buy now]")
    assert v.page.pieces[-1] == "type 1, attributes 1.00, options 0.50, price within the bound"


@pytest.mark.parametrize(
    "action",
    [
        "", "buy", "click", "click[]", "click[search]", "click[buy now]", "click[b0shirt001]", "search[]",
        "Search[acme]", "Click[back to search]", "search acme", "[acme]",
    ],
)  # fmt: skip
def test_a_refused_action_changes_nothing(action: str) -> None:
    v = visit()
    before = v.page
    assert not v.act(action)
    assert v.page == before
    assert v.earned is None


@pytest.mark.parametrize(
    ("action", "parsed"),
    [
        ("search[Red Shirt]", ("search", "red shirt")),
        ("click[< Prev] and then", ("click", "< prev")),
        ("search[a [b] c]", ("search[a ", "b] c")),  # greedy, as the original's pattern is
        ("click[x]]", ("click", "x]")),
        ("think", ("think", "")),
    ],
)
def test_actions_are_read_as_the_original_reads_them(action: str, parsed: tuple[str, str]) -> None:
    assert parse(action) == parsed


def test_search_is_accepted_everywhere_and_forgets_the_options() -> None:
    v = played("search[acme]", "click[b0shirt001]", "click[red]", "click[description]", "search[acme]")
    assert v.chosen == {}
    assert "Page 1" in v.page.text


@pytest.mark.parametrize("leave", ["click[< prev]", "click[back to search]"])
def test_leaving_the_product_forgets_the_options_and_a_sub_page_does_not(leave: str) -> None:
    v = played("search[acme]", "click[b0shirt001]", "click[red]", "click[features]", "click[< prev]")
    assert v.chosen == {"color": "red"}
    v.act(leave)
    assert v.chosen == {}


def test_prev_on_a_product_returns_to_its_page_of_results() -> None:
    many = [product(asin=f"B0000000{i:02}") for i in range(12)]
    v = Visit(Shelf(*many), goal())
    for action in ("search[acme]", "click[next >]", "click[b000000011]", "click[< prev]"):
        v.act(action)
    assert v.page.pieces[3] == "Page 2 (Total results: 12)"
    assert v.page.pieces[6::3] == ("B000000010", "B000000011")


def test_a_value_of_two_options_belongs_to_the_later_one_and_page_names_win() -> None:
    odd = product(options={"color": ("red", "reviews"), "trim": ("red",)})
    v = Visit(Shelf(odd), goal())
    for action in ("search[acme]", "click[b0shirt001]", "click[red]"):
        v.act(action)
    assert v.chosen == {"trim": "red"}
    v.act("click[reviews]")
    assert v.chosen == {"trim": "red"}
    assert "Price: $20.0" not in v.page.pieces


def test_options_called_like_our_own_kinds_are_options() -> None:
    v = Visit(Shelf(product(options={"product": ("b0",), "button": ("tiny",)})), goal())
    for action in ("search[acme]", "click[b0shirt001]", "click[b0]", "click[tiny]"):
        assert v.act(action)
    assert (v.asin, v.chosen) == ("B0SHIRT001", {"product": "b0", "button": "tiny"})


def test_what_no_click_names_is_not_offered() -> None:
    """The original reserves "search" for its search box; an empty argument is none."""
    v = Visit(Shelf(product(options={"type": ("search", "", "find")})), goal())
    for action in ("search[acme]", "click[b0shirt001]"):
        v.act(action)
    assert not v.act("click[search]") and "search" in v.page.pieces
    offered = [a for a in admissible(v.page) if a != "click[buy now]"]
    assert "click[find]" in offered
    for action in offered:
        again = Visit(Shelf(product(options={"type": ("search", "", "find")})), goal())
        assert again.act("search[acme]") and again.act("click[b0shirt001]") and again.act(action), action


def test_a_name_in_small_letters_opens_its_product() -> None:
    v = Visit(Shelf(product(asin="b0Shirt001")), goal())
    assert v.act("search[acme]") and v.act("click[B0SHIRT001]")
    assert v.asin == "b0Shirt001"


def test_only_the_purchase_itself_is_the_end() -> None:
    v = played("search[acme]", "click[b0shirt001]", "click[buy now]")
    assert v.over
    v.act("search[acme]")
    v.act("click[back to search]")
    assert not v.over, "a page without buttons, after a purchase, is not a second one"


def test_the_purchase_is_judged_and_ends_clicking() -> None:
    v = played("search[acme]", "click[b0shirt001]", "click[red]", "click[small]", "click[buy now]")
    assert v.earned is not None and v.earned.total == 1.0
    assert not v.act("click[buy now]")


def test_the_options_of_the_last_page_are_spelled_as_json_in_html() -> None:
    earned = reward(product(), 20.0, {}, goal(), product())
    page = done_page("B0", {"b": "5' x 6\" & <é>", "a": "1"}, earned, show_parts=False)
    assert '{"a": "1", "b": "5\\u0027 x 6\\" \\u0026 \\u003c\\u00e9\\u003e"}' in page.pieces


def test_no_hits_and_hidden_queries() -> None:
    v = played("search[nothing like it]")
    assert v.page.text.endswith("Page 1 (Total results: 0) [SEP] Next >")
    v.act("search[<q> men's shirts]")
    assert "Total results: 0" in v.page.text  # the original would list the products collected with that query


def test_a_title_of_spaces_and_none_are_told_apart() -> None:
    page = results_page("i", [msgspec.structs.replace(HAT, title=""), msgspec.structs.replace(HAT, title=" ")], 1, 2)
    assert page.text.endswith("Next > [SEP] B0HAT00001 [SEP] $5.0 to $7.5 [SEP] B0HAT00001 [SEP]  [SEP] $5.0 to $7.5")
