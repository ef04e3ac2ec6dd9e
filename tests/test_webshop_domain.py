"""WebShop as a domain: no product in two splits, tasks that load anywhere, demonstrations that withhold the rule."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.agents import make_agent
from ragdistill.contamination import check_disjoint
from ragdistill.envs import Demo, make_domain, note_of
from ragdistill.envs.pool import EnvPool
from ragdistill.envs.webshop import generator
from ragdistill.envs.webshop.catalogue import Catalogue, ensure_catalogue
from ragdistill.envs.webshop.demonstrator import Mood, choose, need_of
from ragdistill.envs.webshop.domain import KINDS, MAX_TURNS, WITH_OPTIONS, WebshopDomain, play
from ragdistill.envs.webshop.goals import Source, gold_options
from ragdistill.envs.webshop.houserules import GENERIC, GROUPS, RULE_WORDINGS
from ragdistill.envs.webshop.products import Product
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder
from ragdistill.envs.webshop.splits import family_of, split_of
from ragdistill.errors import ConfigError, DataError
from ragdistill.hints.mine import mine
from ragdistill.journal import cache_dir
from ragdistill.params import ColdstartParams, WebshopParams, load_params
from ragdistill.records import Hint, Step, StopReason, Task, Trajectory
from tests.webshop_small import product, write_original

PARAMS = WebshopParams(
    goals="synthetic", infeasible="exclude", observation="chosen", attributes_page=False, products=None
)
COLDSTART = msgspec.structs.replace(load_params(Path(__file__).parents[1] / "params.yaml").coldstart, demos=60)
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        patch.setenv("RAGDISTILL_CACHE", str(folder))
        catalogue_folder(folder / "env", PARAMS.products)
    return folder / "env"


@pytest.fixture(autouse=True)
def _embedded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("RAGDISTILL_CACHE", str(cache.parent))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded products as if they were the original's."""
    return write_original(tmp_path_factory.mktemp("files"), 1200)


@pytest.fixture
def original(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(files))


def tasks(split: str, count: int, out: Path, **changed: str) -> list[Task]:
    return WebshopDomain(msgspec.structs.replace(PARAMS, **changed)).tasks(split, count, 1, out)


def demos(shop: WebshopParams = PARAMS, **changed: float) -> list[Demo]:
    params = msgspec.structs.replace(COLDSTART, **changed)
    assert isinstance(params, ColdstartParams)
    return WebshopDomain(shop).demonstrations(params, 3, Path())


def bought(made: list[Demo]) -> set[str]:
    """Products that were opened, and so bought."""
    return {t.action[6:-1] for d in made for t in d.turns if re.fullmatch(r"click\[[A-Z0-9]{10}\]", t.action)}


def test_it_is_resolved_by_name_as_any_other() -> None:
    env = load_params(Path(__file__).parents[1] / "params.yaml").env
    assert make_domain(msgspec.structs.replace(env, name="webshop")).name == "webshop"
    with pytest.raises(ConfigError, match="alfworld, webshop"):
        make_domain(msgspec.structs.replace(env, name="webshp"))


def test_splits_share_no_product_and_are_balanced(tmp_path: Path) -> None:
    made = {split: tasks(split, 50, tmp_path) for split in SPLITS}
    groups = [{t.group for t in made[s]} for s in SPLITS]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for split in SPLITS:
        assert len({t.id for t in made[split]}) == len(made[split]) == 50
        assert set(Counter(t.kind.split()[0] for t in made[split]).values()) == {10}
        assert {t.kind for t in made[split]} <= set(KINDS)
        assert len({t.group for t in made[split]}) > 45, "products come in turn"
    assert tasks("train", 50, tmp_path) == made["train"]
    assert [t.id for t in WebshopDomain(PARAMS).tasks("train", 50, 2, tmp_path)] != [t.id for t in made["train"]]


def test_how_many_goals_cannot_be_won_is_said_and_what_is_done_with_them(tmp_path: Path, cache: Path) -> None:
    catalogue = Catalogue(catalogue_folder(cache, PARAMS.products))
    rows = catalogue.goal_rows("synthetic")
    lost = {r.number for r in rows if not r.feasible}
    catalogue.close()
    for done, infeasible in (("left out", "exclude"), ("kept", "keep")):
        made = tasks("test", 500, tmp_path, infeasible=infeasible)
        assert bool(lost & {int(t.data.split("/")[-1]) for t in made}) == (done == "kept")
        said = note_of(WebshopDomain(msgspec.structs.replace(PARAMS, infeasible=infeasible)), tmp_path)
        assert said.startswith(f"{len(lost)} of the {len(rows):,} goals") and f"they are {done}" in said
    assert all(r.options for r in rows if not r.feasible), "so that all of them are primary"
    assert (len(lost), len(rows)) == (234, 4008), "as README.md says"
    tasks("test", 5, tmp_path, goals="human")
    assert note_of(WebshopDomain(PARAMS), tmp_path) == "", "there is nothing to say where all can be won"
    alfworld = load_params(Path(__file__).parents[1] / "params.yaml").env
    assert note_of(make_domain(alfworld), tmp_path) == ""


def test_goals_with_options_are_types_of_their_own_and_the_primary_ones(tmp_path: Path, cache: Path) -> None:
    catalogue = Catalogue(catalogue_folder(cache, PARAMS.products))
    made = tasks("test", 120, tmp_path)
    for task in made:
        _, source, number = task.data.split("/")
        assert (task.kind in WITH_OPTIONS) == bool(catalogue.goal(source, int(number)).options)
    assert WebshopDomain.defaults.primary == WITH_OPTIONS
    assert 0.6 < sum(t.kind in WITH_OPTIONS for t in made) / 120 < 0.9
    catalogue.close()


def test_a_second_listing_of_a_product_goes_where_the_first_one_is() -> None:
    listings = [product(title=title) for title in ("Acme Cotton Shirt", "ACME  cotton\tshirt ", "Acme Cotton Shirts")]
    same, again, other = map(family_of, listings)
    assert same == again != other, "capitals and white space make no other product"
    shares = Counter(split_of(f"title {i}") for i in range(2000))
    assert 0.15 < shares["test"] / 2000 < 0.25 and 0.05 < shares["dev"] / 2000 < 0.11


@pytest.mark.usefixtures("original")
def test_official_splits_keep_the_originals_order_and_share_no_goal(tmp_path: Path) -> None:
    test, train = tasks("official_test", 500, tmp_path), tasks("official_train", 10_000, tmp_path)
    assert tasks("official_test", 20, tmp_path) == test[:20]
    assert not {t.sha256 for t in test} & {t.sha256 for t in train}
    with pytest.raises(ConfigError, match="official_test"):
        tasks("valid_unseen", 5, tmp_path)


@pytest.mark.parametrize("split", ["official_train", "official_test", "official_eval"])
def test_official_splits_of_another_catalogue_than_the_originals_are_refused(split: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"official WebShop goals \({split}\); set {VARIABLE}"):
        tasks(split, 5, tmp_path)


@pytest.mark.usefixtures("original")
def test_official_training_goals_and_our_own_development_goals_share_no_product(tmp_path: Path) -> None:
    train, dev = tasks("official_train", 10_000, tmp_path), tasks("dev", 36, tmp_path)
    check_disjoint(train, dev, "product")
    assert len(dev) == 36 and len(train) > 500
    for split in ("test", "eval"):
        assert {t.group for t in tasks(f"official_{split}", 10_000, tmp_path)} & {t.group for t in dev}, "as they are"


def test_infeasible_goals_are_counted_and_excluded_by_a_parameter(tmp_path: Path, cache: Path) -> None:
    catalogue = Catalogue(catalogue_folder(cache, PARAMS.products))
    bad = {f"synthetic/{r.number}" for r in catalogue.goal_rows("synthetic") if not r.feasible}
    assert bad
    kept = {t.data.split("/", 1)[1] for t in tasks("train", 10**6, tmp_path, infeasible="keep")}
    left = {t.data.split("/", 1)[1] for t in tasks("train", 10**6, tmp_path)}
    assert kept - left == kept & bad and not left & bad
    told = {t.data.split("/", 1)[1] for t in tasks("train", 10**6, tmp_path, infeasible="keep") if not t.feasible}
    assert told == kept & bad, "so that results can be given without them"
    assert msgspec.json.decode((tmp_path / "catalogue.json").read_bytes())["infeasible"] == len(bad)


def test_worker_processes_play_tasks_to_full_reward(tmp_path: Path, cache: Path) -> None:
    chosen = [*tasks("test", 5, tmp_path), *tasks("test", 2, tmp_path, goals="human")]
    catalogue = Catalogue(catalogue_folder(cache, PARAMS.products))

    async def run() -> list[tuple[str, bool, float]]:
        pool = EnvPool(WebshopDomain(PARAMS).env_factory(cache, True), workers=1, slots=1)
        ends = []
        try:
            for task in chosen:
                _, source, number = task.data.split("/")
                goal = catalogue.goal(source, int(number))
                gold = catalogue.product(goal.asin)
                async with pool.lease() as env:
                    first = await env.reset(task)
                    assert first.goal == goal.instruction and not first.done
                    refused = await env.step("click[nothing]")
                    assert not refused.valid and refused.text == first.text
                    await env.step(f"search[{gold.title}]")
                    await env.step(f"click[{goal.asin}]")
                    for value in gold_options(goal, gold).values():
                        seen = await env.step(f"click[{value}]")
                        assert f"chosen: {value}" in seen.text and "click[buy now]" in seen.admissible
                    last = await env.step("click[Buy Now]")
                    asked = ["options"] if goal.options else []
                    assert last.parts == dict.fromkeys(["type", "attributes", *asked, "price"], 1.0)
                    assert refused.parts is msgspec.UNSET
                    ends.append((first.bucket, last.done, last.reward))
        finally:
            await pool.close()
        return ends

    ends = asyncio.run(run())
    assert [(done, reward) for _, done, reward in ends] == [(True, 1.0)] * 7
    assert sum(bucket == task.kind.split()[0] for (bucket, _, _), task in zip(ends, chosen, strict=True)) >= 6


def test_a_task_of_another_catalogue_is_refused(tmp_path: Path, cache: Path) -> None:
    task = msgspec.structs.replace(tasks("test", 1, tmp_path)[0], data="0/synthetic/1")
    env = WebshopDomain(PARAMS).env_factory(cache, False)()
    with pytest.raises(DataError, match="another WebShop catalogue"):
        env.reset(task)
    with pytest.raises(DataError, match="call reset first"):
        env.step("search[x]")
    env.close()


def test_the_fingerprint_names_all_that_changes_what_is_seen() -> None:
    prints = {
        WebshopDomain(msgspec.structs.replace(PARAMS, **c)).fingerprint()
        for c in ({}, {"observation": "original"}, {"attributes_page": True}, {"products": 300})
    }
    assert len(prints) == 4


# demonstrations


def pieces(text: str) -> list[str]:
    return text.split(" [SEP] ")


def test_house_groups_are_in_no_catalogue() -> None:
    categories = generator.lexicon().categories.values()
    names = {name for c in categories for name in c.options}
    values = {w for c in categories for options in c.options.values() for v in options for w in v.split()}
    assert not names & set(GROUPS)
    assert not values & {w for group in GROUPS.values() for v in group for w in v.split()}


def test_no_demonstration_shows_or_clicks_a_real_option() -> None:
    names = {name for c in generator.lexicon().categories.values() for name in c.options}
    for demo in demos():
        for turn in demo.turns:
            assert not names & set(pieces(turn.observation)), turn.observation
            assert re.fullmatch(r"search\[.+\]|click\[.+\]", turn.action)
            clicked = turn.action.removeprefix("click[").removesuffix("]")
            known = clicked == "Buy Now" or re.fullmatch("[A-Z0-9]{10}", clicked)
            assert turn.action.startswith("search") or known or clicked in {v for g in GROUPS.values() for v in g}
            assert "price" not in turn.thought.lower() and "$" not in turn.thought


def test_a_hint_is_acted_on_and_without_one_nothing_is_read_from_the_need() -> None:
    made = [d for d in demos(demos=200, irrelevant=0.5) if d.kind == "house"]
    told = [d for d in made if set(d.hints) & set(RULE_WORDINGS)]
    untold = [d for d in made if not set(d.hints) & set(RULE_WORDINGS)]
    assert len(told) > 20 and len(untold) > 20
    assert all(d.won for d in told)
    assert 0.05 < sum(d.won for d in untold) / len(untold) < 0.4, "an explorer wins by luck"
    left_alone = sum(len(d.turns) == 3 for d in untold) / len(untold)
    assert 0.3 < left_alone < 0.7, "some leave the options alone: that they are to be chosen is not to be learnt here"
    assert not any(len(d.turns) == 3 for d in told)
    assert all("choose" in t.thought for d in told for t in d.turns[2:-1])
    assert all("try" in t.thought for d in untold for t in d.turns[2:-1])


def test_every_thought_restates_the_whole_need_and_speaks_of_no_hint() -> None:
    for demo in demos():
        need = need_of(pieces(demo.first_observation)[2])
        assert all(need in t.thought and "hint" not in t.thought.lower() for t in demo.turns)
        assert "price lower" not in need


def test_demonstrations_are_reproducible_short_and_of_their_own_products(tmp_path: Path, cache: Path) -> None:
    first = demos()
    assert first == demos()
    assert {len(d.turns) for d in first} <= {3, 4, 5}
    catalogue = Catalogue(catalogue_folder(cache, PARAMS.products))
    assert {split_of(family_of(catalogue.product(a))) for a in bought(first)} == {"coldstart"}


@pytest.mark.usefixtures("original")
@pytest.mark.parametrize(
    ("source", "split"), [("synthetic", "official_test"), ("synthetic", "official_eval"), ("human", "official_test")]
)
def test_no_demonstration_buys_a_product_that_an_official_evaluation_asks_for(
    source: Source, split: str, tmp_path: Path
) -> None:
    catalogue = Catalogue(catalogue_folder(cache_dir("env"), PARAMS.products))
    family = {r.number: r.family for r in catalogue.goal_rows(source)}
    evaluated = tasks(split, 10_000, tmp_path, goals=source, infeasible="keep")
    asked = {family[int(task.data.rpartition("/")[2])] for task in evaluated}
    assert [f for f in asked if split_of(f) == "coldstart"], "evaluations ask for products of every split of ours"
    made = {family_of(catalogue.product(asin)) for asin in bought(demos())}
    assert len(made) > 20 and not made & asked
    catalogue.close()


@pytest.mark.usefixtures("original")
def test_demonstrations_do_not_read_all_goals_of_a_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    before = demos()
    monkeypatch.setattr(Catalogue, "goal_rows", lambda *_: pytest.fail("millions in a full catalogue"))
    assert demos() == before


def test_of_a_large_catalogue_a_sample_is_tried_for_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def counted(catalogue: Catalogue, asked: Product, mood: Mood, name: str, *rest: Any) -> tuple[Demo, bool]:
        tried.extend([asked.asin] if not name else [])
        return play(catalogue, asked, mood, name, *rest)

    monkeypatch.setattr("ragdistill.envs.webshop.domain.play", counted)
    whole = demos()
    everything, tried = tried, []
    monkeypatch.setattr("ragdistill.envs.webshop.domain.CANDIDATES", len(everything))
    assert demos() == whole, "a catalogue that fits is tried whole, in its order"
    tried = []
    monkeypatch.setattr("ragdistill.envs.webshop.domain.CANDIDATES", 40)
    assert len(demos()) == len(whole) and len(tried) == len(set(tried)) == 40
    later = set(everything[len(everything) // 2 :])
    assert 8 < len(later & set(tried)) < 32, "from all of it, not its beginning"


@pytest.mark.parametrize("style", ["react", "stateact"])
def test_turns_parse_back_as_an_agent_reads_them(style: str) -> None:
    agent = make_agent(style)
    for demo in demos():
        for turn in demo.turns:
            parsed = agent.parse(agent.reply(turn.thought, turn.action, turn.state))
            assert (parsed.thought, parsed.action) == (turn.thought, turn.action)
            assert list(parsed.state) == (["goal", "current selection"] if style == "stateact" else [])


def test_the_stated_selection_is_what_was_clicked_so_far_and_the_goal_the_instruction() -> None:
    group_of = {value: group for group, values in GROUPS.items() for value in values}
    stated: set[str] = set()
    for demo in demos():
        clicked: list[str] = []
        for turn in demo.turns:
            assert turn.state == {
                "goal": pieces(demo.first_observation)[2],
                "current selection": "; ".join(clicked) or "nothing",
            }
            label = turn.action.removeprefix("click[").removesuffix("]")
            if turn.action.startswith("click["):
                clicked.append(f"{group_of[label]}: {label}" if label in group_of else label)
        stated.update(";".join(clicked[:-1]).split(";")[1:])
    assert len(stated) > 10, "options are stated too, where there are some"


@pytest.mark.parametrize("shown", [False, True])
def test_demonstrations_show_the_pages_that_the_game_shows(shown: bool) -> None:
    made = demos(msgspec.structs.replace(PARAMS, attributes_page=shown))
    items = [pieces(t.observation) for d in made for t in d.turns if "Buy Now" in t.observation]
    assert items and {"Attributes" in page for page in items} == {shown}


def test_a_product_whose_need_finds_nothing_is_left_out(tmp_path: Path) -> None:
    lost, found = product(instruction="Find me of the"), product(asin="B0SHIRT002", instruction="Find me cotton shirts")
    asked = [msgspec.structs.replace(p, instruction_attributes=("easy care",)) for p in (lost, found)]
    catalogue = Catalogue(ensure_catalogue(tmp_path / "c", lambda: asked, tuple))
    assert catalogue.search("of the") == []
    demo, suits = play(catalogue, asked[0], "plain", "", COLDSTART, random.Random(0), PARAMS, ())
    assert not suits and not demo.won and len(demo.turns) == MAX_TURNS
    demo, _ = play(catalogue, asked[1], "plain", "", COLDSTART, random.Random(0), PARAMS, ())
    assert demo.turns[-1].action == "click[Buy Now]"
    catalogue.close()


def test_hint_wordings_are_as_short_as_mined_ones() -> None:
    assert all(len(h) <= 120 for h in (*RULE_WORDINGS, *GENERIC))


@pytest.mark.parametrize(
    ("instruction", "need"),
    [
        ("Find me soft rugs with color: red, and price lower than 30.00 dollars", "soft rugs with color: red"),
        ("i am looking for a hat.", "a hat"),
        ("i'm looking for a hat", "a hat"),
        ("I would like to buy some tea", "some tea"),
        ("where can [i] get tea", "where can (i) get tea"),
    ],
)
def test_the_need_is_the_instruction_without_its_phrases(instruction: str, need: str) -> None:
    assert need_of(instruction) == need


def test_the_title_with_most_words_of_the_need_is_chosen_and_the_first_of_equals() -> None:
    page = ["x", "Next >", "A1", "red hat", "$1", "A2", "soft red hat", "$2", "A3", "hat, soft, red", "$3"]
    assert choose("a soft red hat", page) == "A2"


# what the miner makes of it


def trajectory(goal: str, bucket: str, actions: list[str], won: bool, number: int) -> Trajectory:
    steps = tuple(Step(reply=a, thought="", action=a, observation=f"page {i}") for i, a in enumerate(actions))
    return Trajectory(
        id=f"{bucket}{number}{won}", task_id=f"{bucket}{number}", policy="base", agent="react", attempt=0, seed=0,
        goal=goal, bucket=bucket, group="g", kind=bucket, steps=steps, reward=1.0 if won else 0.6,
        stop=StopReason.SUCCESS if won else StopReason.FAILURE,
    )  # fmt: skip


def test_the_rule_that_all_categories_share_is_mined_from_wrong_purchases() -> None:
    goal = "find me soft hats with color: red"
    start = ["search[soft hats with color: red]", "click[b0abcd1234]"]
    games = [
        trajectory(goal, bucket, [*start, f"click[{value}]", "click[buy now]"], value == "red", n)
        for bucket in ("beauty", "fashion", "garden")
        for n in range(3)
        for value in ("red", "blue")
    ]
    hints: list[Hint] = mine(games, load_params(Path(__file__).parents[1] / "params.yaml").hints)
    for bucket in ("beauty", "fashion", "garden"):
        texts = [h.text for h in hints if h.bucket == bucket]
        assert texts and all("click[{object}]" in t for t in texts)
