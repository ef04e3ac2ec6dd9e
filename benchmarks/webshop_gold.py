"""What buying the goals' own products earns in the original's shop, and why it sometimes earns less than everything.

    python benchmarks/webshop_gold.py [DATA] [--every 23]

`DATA` is the folder of the original's files (else RAGDISTILL_WEBSHOP_DATA names it). Every 23rd synthetic goal, every
human goal and every goal that the catalogue calls infeasible is played through the shop's pages: search, open the
goal's own product, choose its options, buy. The second table says of the infeasible ones which option is not counted
and why: the reward takes a colour word out of the middle of another word ("tan" of "rectangular") and no longer finds
it among the words of what was asked for.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from thefuzz.utils import full_process

from ragdistill.envs.webshop.catalogue import SOURCES, Catalogue, GoalRow
from ragdistill.envs.webshop.goals import gold_options
from ragdistill.envs.webshop.reward import COLOURS, Reward, normalise_colour, option_hits
from ragdistill.envs.webshop.shop import Visit
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder
from ragdistill.errors import DataError

EVERY = 23
PAGES = 5
"""Of results, at most, that are looked through for the product."""
Missed = tuple[str, str]
"""(colour word, the longer word it was found in) of an option that was chosen and not counted; ("", value) if it is
for another reason."""


def purchase(catalogue: Catalogue, row: GoalRow) -> Reward:
    """Find the goal's own product, choose the goal's options, buy."""
    goal = catalogue.goal(row.source, row.number)
    gold = catalogue.product(goal.asin)
    visit = Visit(catalogue, goal)
    for query in (goal.instruction.split(", and price")[0], gold.title, f"{gold.title} {gold.description}"):
        visit.act(f"search[{query}]")
        for _ in range(PAGES - 1):
            if goal.asin.lower() in visit.page.clickables:
                break
            visit.act("click[next >]")
        if goal.asin.lower() in visit.page.clickables:
            break
    for label in (goal.asin, *gold_options(goal, gold).values(), "buy now"):
        if not visit.act(f"click[{label}]"):
            raise DataError(f"The shop refuses click[{label}] for {row.source} goal {row.number}.")
    if visit.earned is None:
        raise DataError(f"The purchase for {row.source} goal {row.number} did not end the visit.")
    return visit.earned


def missed(catalogue: Catalogue, row: GoalRow) -> list[Missed]:
    """The options that the purchase of `row` does not earn."""
    goal = catalogue.goal(row.source, row.number)
    chosen = list(gold_options(goal, catalogue.product(goal.asin)).values())
    return [hidden(pair[1]) for pair in goal.options if not option_hits(chosen, [pair if pair[0] else pair[1]])]


def hidden(value: str) -> Missed:
    """The colour word that the reward takes `value` for, and the word in which it is no word of its own."""
    colour = normalise_colour(value)
    words = full_process(value, force_ascii=True).split()  # as they are compared: a no-break space joins two words
    if colour not in COLOURS or colour in words:
        return "", value
    return colour, next((word for word in words if colour in word), value)


def classes(losses: Sequence[Sequence[Missed]]) -> list[tuple[str, str, int]]:
    """(colour words, the words they are in with the goals of each, goals), most goals first."""
    groups: dict[str, Counter[str]] = {}
    for goal in losses:
        colours = " and ".join(sorted({colour or "no colour word" for colour, _ in goal}))
        groups.setdefault(colours, Counter())[" and ".join(sorted({word for _, word in goal}))] += 1
    found = [(c, ", ".join(f"{w} {n}" for w, n in words.most_common()), words.total()) for c, words in groups.items()]
    return sorted(found, key=lambda row: (-row[2], row[0]))


def report(catalogue: Catalogue, every: int) -> str:
    """Both tables."""
    rows = {source: catalogue.goal_rows(source) for source in SOURCES}
    made, infeasible = rows["synthetic"], [r for r in rows["synthetic"] if not r.feasible]
    lines = ["| what | found |", "|---|---:|", f"| products | {len(catalogue):,} |"]
    lines += [f"| synthetic goals, of products | {len(made):,} of {len({r.asin for r in made}):,} |"]
    lines += [f"| of them infeasible | {len(infeasible):,} ({len(infeasible) / len(made):.1%}) |"]
    short = [purchase(catalogue, r) for r in infeasible]
    for name, earned in (
        (f"1 in {every} synthetic goals", [purchase(catalogue, r) for r in made[::every]]),
        ("all human goals", [purchase(catalogue, r) for r in rows["human"]]),
        ("all infeasible synthetic goals", short),
    ):
        full = sum(e.total >= 1.0 for e in earned)
        lines += [f"| gold purchases that earn 1.0, {name} | {full:,} of {len(earned):,} |"]
    rest = sum(e.r_type == e.r_att == 1.0 and e.r_price for e in short)
    lines += [f"| … with type, attributes and price in full | {rest:,} of {len(short):,} |"]
    losses = [missed(catalogue, r) for r in infeasible]
    lines += ["", "| colour word | found in (goals) | infeasible goals |", "|---|---|---:|"]
    lines += [f"| {colour} | {words} | {count:,} |" for colour, words, count in classes(losses)]
    return "\n".join(lines)


def main() -> None:
    """Build the catalogue, play, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", nargs="?", type=Path, help="folder of the original's files")
    parser.add_argument("--every", type=int, default=EVERY, help="of the synthetic goals, every so many is played")
    args = parser.parse_args()
    if args.data:
        os.environ[VARIABLE] = str(args.data)
    if not os.environ.get(VARIABLE):
        parser.error(f"name the folder of WebShop's files, or set {VARIABLE}")
    with tempfile.TemporaryDirectory(prefix="webshop-gold-") as cache:
        catalogue = Catalogue(catalogue_folder(Path(cache), None))
        print(report(catalogue, args.every))
        catalogue.close()


if __name__ == "__main__":
    main()
