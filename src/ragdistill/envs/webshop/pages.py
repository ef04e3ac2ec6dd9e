"""The shop's pages as text: the words a reader of the original's HTML sees, in order, and what can be clicked.

The original renders templates and reads the visible text back, joined by " [SEP] "; here the text is composed at once.
`visible` holds the one rule of that reading which shows: white space. Knows no session and no database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import msgspec

from ragdistill.envs.webshop.products import Product
from ragdistill.envs.webshop.reward import Reward

SEPARATOR = " [SEP] "
WINDOW = 10
"""Products on a page of results."""
BUY, BACK, NEXT, PREV = "Buy Now", "Back to Search", "Next >", "< Prev"
SUB_PAGES = ("Description", "Features", "Reviews", "Attributes")
BUTTON, PRODUCT = "Button", "Product"
"""Kinds of clickables beside options, whose names are lower case: an option may be called "product"."""
_NO_CLICK = ("", "search")
"""Option values that no click names: an action has an argument, and the original keeps "search" for its search box."""
_HTML_SPACES = " \t\n\f\r"


class Page(msgspec.Struct, frozen=True):
    """A page: its pieces of text, and what `click[…]` accepts: label → (`BUTTON`, `PRODUCT` or option name)."""

    pieces: tuple[str, ...]
    clickables: dict[str, str]

    @property
    def text(self) -> str:
        return SEPARATOR.join(self.pieces)


def visible(*texts: str) -> tuple[str, ...]:
    """The pieces of consecutive HTML elements: stripped; white space counts only if it holds no line break."""
    pieces: list[str] = []
    for text in texts:
        if text.strip(_HTML_SPACES):
            pieces.append(text.strip())
        elif text and "\n" not in text:
            pieces.append("")
    return tuple(pieces)


def buttons(*labels: str) -> dict[str, str]:
    """Clickables of `labels`: lower case, as actions are."""
    return {label.lower(): BUTTON for label in labels}


def start_page(instruction: str) -> Page:
    """The search box. Its button is shown but cannot be clicked: searching is an action of its own."""
    return Page(visible("WebShop", "Instruction:", instruction, "Search"), {})


def results_page(instruction: str, products: Sequence[Product], number: int, total: int) -> Page:
    """Page `number` (from 1) of `total` hits; `products` are those on it. "Next >" stands even on the last page."""
    turn = (PREV, NEXT) if number > 1 else (NEXT,)
    head = visible("Instruction:", instruction, BACK, f"Page {number} (Total results: {total})", *turn)
    listed = [piece for p in products for piece in visible(p.asin, p.title, p.price_tag)]
    links = {p.asin.lower(): PRODUCT for p in products}
    return Page((*head, *listed), buttons(BACK, *turn) | links)


def item_page(
    instruction: str, product: Product, chosen: Mapping[str, str], show_attributes: bool, show_chosen: bool
) -> Page:
    """A product. A value that two options share belongs to the later one, as in the original.

    `show_chosen` adds what is chosen to each option; the original's text does not show it.
    """
    pieces = list(visible("Instruction:", instruction, BACK, PREV))
    for name, values in product.options.items():
        pieces += visible(name, *values)
        if show_chosen and name in chosen:
            pieces.append(f"chosen: {chosen[name]}")
    subs = SUB_PAGES if show_attributes else SUB_PAGES[:3]
    pieces += visible(product.title, f"Price: {product.price_tag}", f"Rating: {product.rating}", *subs, BUY)
    options = {value: name for name, values in product.options.items() for value in values if value not in _NO_CLICK}
    return Page(tuple(pieces), buttons(BACK, PREV, *subs, BUY) | options)


def sub_page(instruction: str, product: Product, which: str) -> Page:
    """One of `SUB_PAGES`."""
    texts: list[str] = []
    if which == "Description":
        texts = [product.description]
    elif which == "Features":
        texts = [f" {bullet}" for bullet in product.bullets]
    elif which == "Reviews":
        texts = [part for r in product.reviews for part in (f'"{r.title}"', r.score, r.body)]
    else:
        texts = [f" {a}" for a in product.attributes] + [product.category, product.query, product.product_category]
    return Page(visible("Instruction:", instruction, BACK, PREV, *texts), buttons(BACK, PREV))


def done_page(asin: str, chosen: Mapping[str, str], earned: Reward, show_parts: bool) -> Page:
    """The end. The original leaves most of its fields empty; `show_parts` fills in the parts of the reward."""
    options = json.dumps(dict(chosen), sort_keys=True)
    for sign in "<>&'":
        options = options.replace(sign, f"\\u{ord(sign):04x}")
    purchase = ("Purchased", "asin", asin, "options", options, "attrs", "None", "category", "None", "query", "None")
    target = ("Target", "asin", "options", "attrs", "price upper", "instuction text", "category", "product category")
    return Page(
        visible(
            "Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)",
            *purchase, "product category", "None", *target, "query", "Goal", "None", "Reward",
            "Your score (min 0.0, max 1.0)", str(earned.total), "Reward Details",
            parts(earned) if show_parts else "None",
        ),
        {},
    )  # fmt: skip


def parts(earned: Reward) -> str:
    """The parts of a reward in one line."""
    option = "none asked" if earned.r_option is None else f"{earned.r_option:.2f}"
    price = "within the bound" if earned.r_price else "above the bound"
    return f"type {earned.r_type:g}, attributes {earned.r_att:.2f}, options {option}, price {price}"
