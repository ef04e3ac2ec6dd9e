"""One visit to the shop: a state machine over pages, with the original's rules of what an action does where.

`search[…]` is accepted on every page; `click[…]` must name something clickable on the present one; anything else leaves
the page as it is. The original's hidden queries (`<r>`, `<a>`, `<c>`, `<q>`: random products, products by gold
attribute, category or query) are searched as ordinary text: they would read the answers. Knows no database.
"""

from __future__ import annotations

import re
from typing import Protocol

from ragdistill.envs.webshop.pages import (
    BACK,
    BUTTON,
    BUY,
    NEXT,
    PREV,
    PRODUCT,
    SUB_PAGES,
    WINDOW,
    Page,
    done_page,
    item_page,
    results_page,
    start_page,
    sub_page,
)
from ragdistill.envs.webshop.products import Product
from ragdistill.envs.webshop.reward import Goal, Reward, reward

_ACTION = re.compile(r"(.+)\[(.+)\]")
_SUB_PAGES = {name.lower(): name for name in SUB_PAGES}


class Shelves(Protocol):
    """Where products come from."""

    def product(self, asin: str) -> Product: ...
    def price(self, asin: str) -> float: ...
    def search(self, query: str) -> list[str]:
        """ASINs, best first, at most 50."""
        ...


def parse(action: str) -> tuple[str, str]:
    """(name, argument in lower case); the argument is empty when there is none."""
    match = _ACTION.match(action)
    return (match.group(1), match.group(2).lower()) if match else (action, "")


class Visit:
    """A visit for one goal. `page` is what is shown; `earned` is set by the purchase that ends the visit."""

    def __init__(
        self, shelves: Shelves, goal: Goal, *, show_attributes: bool = False, show_chosen: bool = False
    ) -> None:
        self._shelves, self.goal = shelves, goal
        self._show_attributes, self._show_chosen = show_attributes, show_chosen
        self._where = "start"
        self._query, self._number, self._hits = "", 1, list[str]()
        self.asin = ""
        self.chosen: dict[str, str] = {}
        self.earned: Reward | None = None
        self.page = start_page(goal.instruction)

    @property
    def over(self) -> bool:
        """Whether the last action was a purchase."""
        return self._where == "done"

    def act(self, action: str) -> bool:
        """Play one action; False when it was refused and nothing changed."""
        name, argument = parse(action)
        if name == "search" and argument:
            self._query, self._hits = argument, self._shelves.search(argument)
            self._show_results(1)
        elif name == "click" and argument in self.page.clickables:
            self._click(argument)
        else:
            return False
        return True

    def _click(self, label: str) -> None:
        """Labels are told apart in the original's order: an option called "reviews" opens the reviews."""
        if label == BUY.lower():
            self._buy()
        elif label == BACK.lower():
            self._where, self.asin, self.chosen = "start", "", {}
            self.page = start_page(self.goal.instruction)
        elif label == NEXT.lower() and self._where == "results":
            self._show_results(self._number + 1)
        elif label == PREV.lower() and self._where == "results":
            self._show_results(self._number - 1)
        elif label == PREV.lower() and self._where == "item":
            self._show_results(self._number)
        elif label in _SUB_PAGES:
            self._where = "sub"
            self.page = sub_page(self.goal.instruction, self._shelves.product(self.asin), _SUB_PAGES[label])
        else:
            kind = self.page.clickables[label]
            if kind == PRODUCT:
                self.asin = next(asin for asin in self._hits if asin.lower() == label)
            elif kind != BUTTON:
                self.chosen[kind] = label
            self._show_item()

    def _show_results(self, number: int) -> None:
        """A new look at the results forgets product and options."""
        self._where, self._number, self.asin, self.chosen = "results", number, "", {}
        shown = [self._shelves.product(a) for a in self._hits[(number - 1) * WINDOW : number * WINDOW]]
        self.page = results_page(self.goal.instruction, shown, number, len(self._hits))

    def _show_item(self) -> None:
        self._where = "item"
        self.page = item_page(
            self.goal.instruction, self._shelves.product(self.asin), self.chosen,
            self._show_attributes, self._show_chosen,
        )  # fmt: skip

    def _buy(self) -> None:
        self._where = "done"
        bought, gold = self._shelves.product(self.asin), self._shelves.product(self.goal.asin)
        self.earned = reward(bought, self._shelves.price(self.asin), self.chosen, self.goal, gold)
        self.page = done_page(self.asin, self.chosen, self.earned, show_parts=self._show_chosen)


def selection(visit: Visit) -> str:
    """The product that is open and what is chosen on it, before the next action: "B0ABCD1234; color: red"."""
    return "; ".join([visit.asin, *(f"{name}: {value}" for name, value in visit.chosen.items())]) or "nothing"


def admissible(page: Page) -> tuple[str, ...]:
    """Every click that the page accepts."""
    return tuple(f"click[{label}]" for label in page.clickables)
