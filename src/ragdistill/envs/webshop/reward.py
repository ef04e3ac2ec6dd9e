"""WebShop's reward for a purchase, its parts apart.

    r_type × (attribute hits + option hits + [price ≤ bound]) / (|attributes| + |options| + 1)

As in the original (arXiv 2207.01206 §3, `engine/goal.py`, MIT licence), peculiarities included: colour normalisation
takes the first colour word found anywhere in an option ("tan" in "rectangular"), and of a synthetic goal it sees
(name, value) pairs, where only a value that *is* a colour word is found. Knows no page and no session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from thefuzz import fuzz

from ragdistill.envs.webshop.products import Product

MATCH = 85
"""Token-set ratio (0–100) above which two texts are the same attribute or option."""
_COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo "
    "caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream "
    "crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather "
    "indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha "
    "multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal "
    "rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise "
    "violet walnut wheat white wine yellow"
)
COLOURS = tuple(_COLOURS.split())
"""In the original's order, on which the result depends."""


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What an instruction asks for. The instruction is all that a policy ever sees of it."""

    asin: str
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    """(name, value); the name is empty in human goals, which list values only."""
    price_upper: float

    def wanted(self) -> list[str | tuple[str, str]]:
        """The options as the original compares them: values of human goals, pairs of synthetic ones."""
        return [pair if pair[0] else pair[1] for pair in self.options]


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """A reward and its parts; each part is a share in [0, 1] with its weight in the sum that `r_type` scales."""

    total: float
    r_type: float
    query_match: bool
    category_match: bool
    title_score: float
    r_att: float
    w_att: float
    r_option: float | None
    """None for goals without options."""
    w_option: float
    r_price: bool
    w_price: float


def reward(bought: Product, price: float, chosen: Mapping[str, str], goal: Goal, gold: Product) -> Reward:
    """What buying `bought` at `price` with the `chosen` options (name → value) earns; `gold` is the goal's product."""
    r_type, query_match, category_match, title_score = type_reward(bought, gold)
    attributes = attribute_hits(bought, goal.attributes)
    options = option_hits(list(chosen.values()), goal.wanted())
    affordable = price <= goal.price_upper
    parts = len(goal.attributes) + len(goal.options) + 1
    return Reward(
        total=(attributes + options + affordable) / parts * r_type,
        r_type=r_type,
        query_match=query_match,
        category_match=category_match,
        title_score=title_score,
        r_att=attributes / len(goal.attributes),
        w_att=len(goal.attributes) / parts,
        r_option=options / len(goal.options) if goal.options else None,
        w_option=len(goal.options) / parts,
        r_price=affordable,
        w_price=1 / parts,
    )


def shares(earned: Reward) -> dict[str, float]:
    """The parts that reports tell apart; options only where some were asked for."""
    option = {} if earned.r_option is None else {"options": earned.r_option}
    return {"type": earned.r_type, "attributes": earned.r_att, **option, "price": float(earned.r_price)}


def type_reward(bought: Product, gold: Product) -> tuple[float, bool, bool, float]:
    """(r_type, same query, at least two shared categories, shared nouns / nouns of the goal's title)."""
    query_match = bought.query == gold.query
    category_match = len(_categories(bought) & _categories(gold)) >= 2
    shared = len(set(bought.nouns) & set(gold.nouns))
    title_score = shared / len(gold.nouns) if gold.nouns else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:
        r_type = 0.1 if title_score > 0 else 0.0
    return r_type, query_match, category_match, title_score


def _categories(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split("›")}


def attribute_hits(bought: Product, wanted: Sequence[str]) -> int:
    """How many of the wanted attributes the product has, by name or in its texts."""
    texts = (bought.title.lower(), " ".join(bought.bullets).lower(), bought.description.lower())
    return sum(
        any(fuzz.token_set_ratio(has, attribute) > MATCH for has in bought.attributes)
        or any(attribute in text for text in texts)
        for attribute in wanted
    )


def option_hits(chosen: Sequence[str], wanted: Sequence[str | tuple[str, str]]) -> int:
    """How many of the wanted options some chosen option matches."""
    have = [normalise_colour(c) for c in chosen]
    need = [normalise_colour(w) for w in wanted]
    return sum(any(fuzz.token_set_ratio(h, n) > MATCH for h in have) for n in need)


def normalise_colour(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first colour word in `option`, or `option`; in a pair only a whole name or value counts."""
    return next((colour for colour in COLOURS if colour in option), option)
