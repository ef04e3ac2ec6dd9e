"""WebShop as a `Domain`: its tasks, its environments and its cold-start demonstrations. Knows no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from ragdistill.envs import Defaults, Demo, Env, Turn
from ragdistill.envs.webshop.buckets import CATEGORIES
from ragdistill.envs.webshop.catalogue import SOURCES, Catalogue, GoalRow
from ragdistill.envs.webshop.demonstrator import Mood, Shopper
from ragdistill.envs.webshop.engine import WebshopEnv, fingerprint
from ragdistill.envs.webshop.examples import SHOPPING, played, variant
from ragdistill.envs.webshop.goals import goals_of, official_order, official_range
from ragdistill.envs.webshop.houserules import HouseShelves, draw_groups, draw_hints
from ragdistill.envs.webshop.products import Product
from ragdistill.envs.webshop.shop import Visit, selection
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder, catalogue_key, original_files
from ragdistill.envs.webshop.splits import draw, family_of, split_of
from ragdistill.errors import ConfigError, DataError
from ragdistill.journal import cache_dir
from ragdistill.params import ColdstartParams, WebshopParams
from ragdistill.progress import track
from ragdistill.records import Task, digest, read_json, seed_of, write_json

OWN_SPLITS = ("train", "dev", "test")
WITH_OPTIONS = tuple(f"{category} with options" for category in CATEGORIES)
KINDS = (*CATEGORIES, *WITH_OPTIONS)
"""Task types: the category of the product, and whether the goal names options."""
COUNTS = "catalogue.json"
"""Beside the tasks: which catalogue they are of, its goals, and how many of them cannot earn the full reward."""
IGNORES = 0.5
"""Share of the untold demonstrations that leave the options alone."""
MAX_TURNS = 15
"""As the paper limits an episode; a demonstration takes three to five."""
CANDIDATES = 4096
"""Products, at most, that are tried for demonstrations and kept in memory for them."""
TRIES = 20
"""Products tried for each demonstration before the catalogue counts as too hard for the demonstrator."""


class WebshopDomain:
    """See `ragdistill.envs.Domain`."""

    name = "webshop"
    evaluation_splits: tuple[str, ...] = ("test", "dev", "official_test", "official_eval")
    defaults = Defaults(
        max_steps=15, attempts=6, reply_tokens=112, kinds=KINDS, primary=WITH_OPTIONS, buckets=len(CATEGORIES),
        group="product",
    )  # fmt: skip
    """Steps as in the paper; an episode is short, and a lucky choice of options rare; a thought restates what the
    instruction asks for, and a search repeats it. That options are to be chosen is what the demonstrations withhold."""

    def __init__(self, params: WebshopParams) -> None:
        self._params = params

    def fingerprint(self) -> str:
        p = self._params
        return f"{fingerprint(catalogue_key(p.products))}/{p.observation}{'+attributes' if p.attributes_page else ''}"

    def env_factory(self, cache: Path, admissible: bool) -> Callable[[], Env]:
        return partial(open_env, catalogue_folder(cache, self._params.products), self._params, admissible)

    def tasks(self, split: str, count: int, seed: int, out: Path) -> list[Task]:
        """Own splits are by product family; `official_*` are the original's, by goal order, first `count` goals."""
        folder = catalogue_folder(cache_dir("env"), self._params.products)
        catalogue = Catalogue(folder)
        rows = catalogue.goal_rows(self._params.goals)
        if not rows:
            raise DataError(f"This catalogue has no {self._params.goals} goals; change env.webshop.goals.")
        usable = [r for r in rows if r.feasible or self._params.infeasible == "keep"]
        if split in OWN_SPLITS:
            chosen = draw(usable, count, seed, split)
        else:
            chosen = _official(catalogue, rows, split, {r.number for r in usable})[:count]
        if not chosen:
            raise DataError(f"This catalogue has no {split} goals; choose another split or a larger catalogue.")
        infeasible = sum(not r.feasible for r in rows)
        write_json(out / COUNTS, {"key": folder.name, "goals": len(rows), "infeasible": infeasible})
        tasks = [_task(catalogue, r, split, folder.name) for r in chosen]
        catalogue.close()
        return tasks

    def task_note(self, games: Path) -> str:
        """How many goals the shop itself cannot reward in full; they are counted over all splits."""
        found = read_json(games / COUNTS)
        if not found["infeasible"]:
            return ""
        done = "left out" if self._params.infeasible == "exclude" else "kept"
        return (
            f"{found['infeasible']:,} of the {found['goals']:,} goals of this catalogue cannot earn the full reward; "
            f"they are {done} (env.webshop.infeasible)."
        )

    def examples(self) -> Mapping[str, Sequence[Demo]]:
        """See `ragdistill.envs.HasExamples`; on pages as this shop shows them."""
        return {SHOPPING: played()[variant(self._params)]}

    def example_type(self, first_observation: str) -> str:
        return SHOPPING

    def demonstrations(self, params: ColdstartParams, seed: int, out: Path) -> list[Demo]:
        """See `demonstrator` for what they teach and what they withhold.

        Only products of the cold-start split, and of them none that an official evaluation asks for, whichever split
        is evaluated: the base is the same for all.
        """
        catalogue = Catalogue(catalogue_folder(cache_dir("env"), self._params.products))
        rng = random.Random(seed_of("webshop demonstrations", seed))
        held = _held(catalogue)
        products = _candidates(catalogue, held, seed)
        # Titles of a real catalogue often hide what was asked for; demonstrate where the need leads to the product.
        products = [p for p in products if play(catalogue, p, "plain", "", params, rng, self._params, held)[1]]
        if not products:
            raise DataError("This catalogue has no products that suit demonstrations; use a larger one.")
        plain = round(params.demos * params.plain)
        told_share = params.hinted / max(1.0 - params.plain, 1e-9)
        demos: list[Demo] = []
        drawn = islice(_again_and_again(products, rng, params.demos), params.demos)
        for number, product in enumerate(track(drawn, "demonstrations", params.demos)):
            untold: Mood = "ignores" if rng.random() < IGNORES else "explores"
            mood: Mood = "plain" if number < plain else "told" if rng.random() < told_share else untold
            demos.append(self._demonstrate(catalogue, product, mood, number, params, rng, products, held))
        rng.shuffle(demos)
        catalogue.close()
        return demos

    def _demonstrate(
        self,
        catalogue: Catalogue,
        product: Product,
        mood: Mood,
        number: int,
        params: ColdstartParams,
        rng: random.Random,
        others: list[Product],
        held: Collection[str],
    ) -> Demo:
        """Play until the purchase is right in all that the demonstration speaks of (options fail where untold)."""
        for _ in range(TRIES):
            demo, ok = play(catalogue, product, mood, f"coldstart/{number}", params, rng, self._params, held)
            if ok:
                return demo
            product = rng.choice(others)
        raise DataError(f"The demonstrator failed on {TRIES} products in a row; this catalogue does not suit it.")


def play(
    catalogue: Catalogue,
    product: Product,
    mood: Mood,
    name: str,
    params: ColdstartParams,
    rng: random.Random,
    env: WebshopParams,
    held: Collection[str],
) -> tuple[Demo, bool]:
    """One demonstration, and whether product and, where they are told or there are none, options are right."""
    groups = {} if mood == "plain" else draw_groups(rng)
    shelves = HouseShelves(catalogue, groups)
    asked = shelves.product(product.asin)
    human = mood == "plain" and any(w.attributes and not w.options for w in product.wishes) and rng.random() < 0.5
    made = goals_of(asked, catalogue.price(product.asin), "human" if human else "synthetic", rng)
    goal = rng.choice([g for g in made if len(g.options) == len(groups)])
    visit = Visit(shelves, goal, show_attributes=env.attributes_page, show_chosen=env.observation == "chosen")
    first, shopper, turns = visit.page.text, Shopper(mood, rng), list[Turn]()
    while visit.earned is None and len(turns) < MAX_TURNS:
        thought, action = shopper.act(visit.page.text)
        state = {"goal": goal.instruction, "current selection": selection(visit)}
        visit.act(action)
        turns.append(Turn(thought=thought, action=action, observation=visit.page.text, state=state))
    fits = won = False
    if visit.earned is not None:
        e, bought = visit.earned, shelves.product(visit.asin)
        fits = _demonstrable(bought, held) and e.r_type == e.r_att == 1.0 and e.r_price
        won = fits and e.total >= 1.0
    hints = draw_hints(mood == "told", params.irrelevant, rng)
    demo = Demo(
        task_id=name, kind="plain" if mood == "plain" else "house", hints=hints, first_observation=first,
        turns=tuple(turns), won=won,
    )  # fmt: skip
    return demo, won or (fits and mood in ("explores", "ignores"))


def open_env(folder: Path, params: WebshopParams, admissible: bool) -> WebshopEnv:
    """Made inside a worker process; the catalogue is built before."""
    return WebshopEnv(
        folder, show_chosen=params.observation == "chosen", show_attributes=params.attributes_page, offer=admissible
    )


def _official(catalogue: Catalogue, rows: list[GoalRow], split: str, usable: set[int]) -> list[GoalRow]:
    """Goals of an official split, in its order; only of the original's files: those of another catalogue are others.

    Left out of training are goals that an evaluation split repeats, and the products of our own `dev` split, on which
    settings are tuned.
    """
    name = split.removeprefix("official_")
    if name not in ("train", "eval", "test") or name == split:
        raise ConfigError(
            f"WebShop has no split {split!r}; choose one of {', '.join(WebshopDomain.evaluation_splits)}."
        )
    if original_files() is None:
        raise ConfigError(f"tasks ask for official WebShop goals ({split}); set {VARIABLE} or choose an own split.")
    order = official_order(len(rows))
    wanted = [rows[order[i]] for i in official_range(name, len(rows)) if order[i] in usable]
    if name != "train":
        return wanted
    held = {_content(catalogue, rows[n]) for n in _evaluated(len(rows))}
    return [r for r in wanted if split_of(r.family) != "dev" and _content(catalogue, r) not in held]


def _evaluated(count: int) -> list[int]:
    """Numbers of the goals of the official evaluation splits, feasible or not, out of `count`."""
    order = official_order(count)
    return [order[i] for part in ("test", "eval") for i in official_range(part, count)]


def _held(catalogue: Catalogue) -> frozenset[str]:
    """Families that official evaluations ask for, by goals of either source; the embedded catalogue has no such."""
    if original_files() is None:
        return frozenset()
    asked = (catalogue.families(source, _evaluated(catalogue.goal_count(source))) for source in SOURCES)
    return frozenset[str]().union(*asked)


def _content(catalogue: Catalogue, row: GoalRow) -> str:
    return digest("webshop goal", catalogue.goal(row.source, row.number))


def _task(catalogue: Catalogue, row: GoalRow, split: str, key: str) -> Task:
    return Task(
        id=f"webshop/{key[:8]}/{row.source}/{row.number}", env="webshop", split=split,
        kind=f"{row.category} with options" if row.options else row.category,
        group=digest("webshop family", row.family)[:12], data=f"{key}/{row.source}/{row.number}",
        sha256=_content(catalogue, row), feasible=row.feasible,
    )  # fmt: skip


def _demonstrable(product: Product, held: Collection[str]) -> bool:
    family = family_of(product)
    return split_of(family) == "coldstart" and family not in held


def _candidates(catalogue: Catalogue, held: Collection[str], seed: int) -> list[Product]:
    """Products to demonstrate, in the catalogue's order; of a large one an even sample, drawn as it streams by."""
    suitable = (p for p in catalogue.products() if _demonstrable(p, held) and _asked_for(p))
    drawn = list(islice(suitable, CANDIDATES))
    rng = random.Random(seed_of("webshop candidates", seed))
    for place, product in enumerate(suitable, CANDIDATES):
        chosen = rng.randrange(place + 1)
        if chosen < CANDIDATES:
            drawn[chosen] = product
    return drawn


def _asked_for(product: Product) -> bool:
    return bool(product.instruction and product.instruction_attributes)


def _again_and_again(products: list[Product], rng: random.Random, count: int) -> Iterator[Product]:
    """All products in random order, then all again in another one, until there are `count`."""
    for _ in range(-(-count // len(products))):
        yield from rng.sample(products, len(products))
