"""ALFWorld: the fast engine answers like the stock one; generated games are winnable, separate and hide the rules."""

from __future__ import annotations

import json
import os
import random
import re
import tarfile
import time
from pathlib import Path

import pytest

from ragdistill.envs.alfworld import assets, goals, houserules
from ragdistill.envs.alfworld.engine import AlfworldEnv, clean_action
from ragdistill.envs.alfworld.games import Game, prove, read_game, write_game
from ragdistill.envs.alfworld.generator import available_targets, generate_game
from ragdistill.envs.alfworld.goals import HOUSE_AT, HOUSE_KINDS, HOUSE_WITH, KINDS, LOOK, PICK
from ragdistill.envs.alfworld.houserules import HouseRule
from ragdistill.envs.alfworld.official import PREFIX, official_root, official_tasks
from ragdistill.envs.alfworld.rooms import load_room
from ragdistill.envs.alfworld.splits import generate_split, plan_split
from ragdistill.errors import ConfigError, ContaminationError, DataError, EnvironmentFault, IdentityError
from ragdistill.records import Task

ALL_KINDS = KINDS + HOUSE_KINDS
PLAN = dict.fromkeys(ALL_KINDS, 21) | {LOOK: 302, PICK: 403, HOUSE_WITH: 304, HOUSE_AT: 209}
"""A small room that can host the kind."""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> AlfworldEnv:
    return AlfworldEnv(tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def games(env: AlfworldEnv) -> dict[str, Game]:
    return {kind: prove(generate_game(kind, PLAN[kind], seed=3), env) for kind in ALL_KINDS}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of official games: `ALFWORLD_DATA`, or the tarball under `RAGDISTILL_SHARED_DATA`."""
    if root := official_root():
        return root
    shared = Path(os.environ.get("RAGDISTILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    archives = sorted(shared.glob("alfworld_json_2.1.1*.tar.xz"))
    if not archives:
        pytest.skip("no official games: set ALFWORLD_DATA, or RAGDISTILL_SHARED_DATA to the folder of their tarball")
    folder = tmp_path_factory.mktemp("official")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(p.parent for p in folder.rglob("valid_seen"))


def written(game: Game, env: AlfworldEnv) -> Task:
    path = write_game(game, env.root / game.sha256[:8])
    return Task(
        id=game.sha256[:8], env="alfworld", split="train", kind=game.kind, group=goals.group_of(game.plan),
        data=path.relative_to(env.root).as_posix(), sha256=game.sha256,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_walkthrough_of_a_generated_game_wins_and_doing_nothing_does_not(
    kind: str, games: dict[str, Game], env: AlfworldEnv
) -> None:
    first = env.reset(written(games[kind], env))
    assert "Welcome to TextWorld" not in first.text and first.goal in first.text
    assert first.bucket == kind
    assert not env.step("inventory").done
    last = [env.step(command) for command in games[kind].walkthrough][-1]
    assert last.done and last.reward == 1.0
    with pytest.raises(EnvironmentFault, match="reset"):
        env.step("look")


def test_the_same_seed_gives_the_same_game_and_another_seed_another(games: dict[str, Game]) -> None:
    for kind in ALL_KINDS:
        again, other = (generate_game(kind, PLAN[kind], seed).data["pddl_problem"] for seed in (3, 4))
        assert again == games[kind].data["pddl_problem"] != other


@pytest.mark.parametrize("plan", sorted(goals.FORBIDDEN))
def test_rooms_of_valid_unseen_are_refused(plan: int) -> None:
    with pytest.raises(ContaminationError, match="valid_unseen"):
        generate_game(PICK, plan, seed=0)
    with pytest.raises(ContaminationError):
        plan_split("train", {PICK: 1}, 0, plans=frozenset({plan}))


def test_splits_share_no_room_and_every_split_hosts_every_kind() -> None:
    sets = [goals.FORBIDDEN, goals.TEST, goals.DEV, goals.TRAIN]
    assert [len(s) for s in sets] == [4, 8, 8, 100] and frozenset.union(*sets) == goals.ALL_PLANS
    for split in ("train", "dev", "test"):
        for kind in KINDS:
            assert any(available_targets(kind, load_room(p)) for p in goals.split_plans(split)), (split, kind)
    with pytest.raises(ContaminationError, match="not in this split"):
        plan_split("dev", {PICK: 1}, 0, plans=frozenset({9}))


def test_a_split_is_balanced_and_varied() -> None:
    specs = plan_split("train", dict.fromkeys(KINDS, 40), seed=1)
    for kind in KINDS:
        mine = [s for s in specs if s.kind == kind]
        assert len(mine) == 40 and len({s.plan for s in mine}) >= 20 and len({s.target.obj for s in mine}) >= 8


def test_generated_files_are_what_the_tasks_name(tmp_path: Path) -> None:
    counts = {PICK: 2, HOUSE_AT: 1}
    tasks = generate_split("train", counts, 5, tmp_path / "a", plans=frozenset({403, 209}), processes=1)
    assert tasks == generate_split("train", counts, 5, tmp_path / "b", plans=frozenset({403, 209}), processes=1)
    env = AlfworldEnv(tmp_path / "a")
    for task in tasks:
        game = read_game(tmp_path / "a" / task.data)
        env.reset(task)
        assert [env.step(c) for c in game.walkthrough][-1].done and game.sha256 == task.sha256


def test_changed_missing_and_foreign_files_are_refused(games: dict[str, Game], env: AlfworldEnv) -> None:
    task = written(games[PICK], env)
    path = env.root / task.data
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(IdentityError, match="not the game"):
        env.reset(task)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        env.reset(task)
    for data in ("../secret", "/etc/passwd", "official:../../secret"):
        with pytest.raises(DataError, match="outside"):
            AlfworldEnv(env.root, official=env.root).reset(
                Task(id="x", env="alfworld", split="s", kind="k", group="g", data=data, sha256="")
            )


def test_a_game_of_the_old_grammar_is_refused(games: dict[str, Game], env: AlfworldEnv) -> None:
    old = games[PICK].data | {"grammar": games[PICK].data["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")}
    with pytest.raises(IdentityError, match="move X to Y"):
        env.load(old)


@pytest.mark.parametrize("command", ["help", "HELP", "  Help\n", "\thelp ", "help\u00a0"])
def test_help_is_blocked_in_every_spelling(command: str, games: dict[str, Game], env: AlfworldEnv) -> None:
    env.load(games[PICK].data)
    seen = env.step(command)
    assert (seen.text, seen.valid) == ("Nothing happens.", False)


def test_actions_are_one_bounded_lower_case_line(games: dict[str, Game], env: AlfworldEnv) -> None:
    assert clean_action("  Go  TO\n shelf 1 ") == "go to shelf 1"
    assert len(clean_action("x" * 10_000_000)) <= 200
    env.load(games[PICK].data)
    assert env.step(games[PICK].walkthrough[0].upper()).valid


def test_a_repeated_reset_translates_nothing(games: dict[str, Game], env: AlfworldEnv) -> None:
    task, calls = written(games[LOOK], env), env.translate.calls
    started = time.perf_counter()
    env.reset(task)
    print(f"repeated reset: {1e3 * (time.perf_counter() - started):.0f} ms")
    assert env.translate.calls == calls


def test_another_process_reads_the_translation_from_disk(
    games: dict[str, Game], env: AlfworldEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragdistill.envs.alfworld import translation

    game = games[LOOK]
    fresh = AlfworldEnv(env.root, env.translate.cache)
    monkeypatch.setattr(translation, "_MEMORY", type(translation._MEMORY)())
    fresh.load(game.data)
    assert fresh.translate.calls == 0 and [fresh.step(c) for c in game.walkthrough][-1].done


def test_stock_textworld_answers_the_same(games: dict[str, Game], tmp_path: Path) -> None:
    textworld = pytest.importorskip("textworld")
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl import PddlEnv

    rng = random.Random(0)
    stock = AlfredDemangler(PddlEnv(textworld.EnvInfos(admissible_commands=True)))
    mine = AlfworldEnv(tmp_path, admissible=True)
    for kind in (LOOK, HOUSE_WITH):
        path = tmp_path / f"{kind}.tw-pddl"
        path.write_bytes(games[kind].encoded)
        stock.load(str(path))
        theirs, seen = stock.reset(), mine.load(games[kind].data)
        assert theirs.feedback.split("=-", 1)[1].strip() == seen.text
        for _ in range(12):
            assert tuple(c for c in theirs["admissible_commands"] if c != "help") == seen.admissible
            command = rng.choice(seen.admissible)
            theirs, reward, done = stock.step(command)
            seen = mine.step(command)
            assert (theirs.feedback, float(reward), done) == (seen.text, seen.reward, seen.done)
            if done:
                break


def test_the_placement_told_to_the_demonstrator_is_true(games: dict[str, Game], env: AlfworldEnv) -> None:
    for game in (games[PICK], games[LOOK]):
        meta = game.meta
        assert meta is not None
        for receptacle in meta.receptacles:
            env.load(game.data)
            seen = env.step(f"go to {receptacle}")
            if receptacle in meta.openable:
                assert seen.text.endswith("is closed.")
                seen = env.step(f"open {receptacle}")
            inside = sorted(o for o, r in meta.placement.items() if r == receptacle)
            assert sorted(re.findall(r"(?:a|and a) (\w+ \d+)", seen.text.split("you see", 1)[1])) == inside


WITHHELD = re.compile(r"\b(?:clean|cleaned|heat|heated|hot|cool|cooled|cold|use|slice|light|lamp)\b", re.IGNORECASE)


@pytest.mark.parametrize("kind", HOUSE_KINDS)
def test_house_rule_games_never_mention_or_accept_the_withheld_commands(
    kind: str, games: dict[str, Game], tmp_path: Path
) -> None:
    game = games[kind]
    assert game.meta is not None
    env = AlfworldEnv(tmp_path, admissible=True)
    texts = [(seen := env.load(game.data)).text, *game.walkthrough, *seen.admissible]
    for command in game.walkthrough:
        assert not env.step(f"clean {game.meta.target} 1 with {game.meta.tools[0]}").valid
        seen = env.step(command)
        texts += [seen.text, *seen.admissible]
        if not seen.done and command.startswith("take"):
            texts.append(env.step(f"examine {command.split(' from ')[0][5:]}").text)
    assert not [t for t in texts if WITHHELD.search(t)]
    strings = re.findall(r'(?:template|"rhs")"? ?::? ?"([^"]*)"', game.data["grammar"])
    assert len(strings) > 20 and not [s for s in strings if WITHHELD.search(s)]


@pytest.mark.parametrize(("kind", "form"), [(HOUSE_WITH, "with"), (HOUSE_AT, "at")])
def test_house_rule_needs_its_own_tool_and_place(kind: str, form: houserules.Form, env: AlfworldEnv) -> None:
    target = available_targets(kind, load_room(304))[0]
    tool = "Bed" if kind == HOUSE_WITH else target.place
    rule = HouseRule(verb="shrink", adjective="tiny", tool_type=tool, form=form)
    game = prove(generate_game(kind, 304, 1, rule, target), env)
    goal = env.load(game.data).goal
    assert game.meta is not None and game.meta.target in goal
    assert kind == HOUSE_AT or "tiny" in goal or "shrink" in goal
    taken = next(c for c in game.walkthrough if c.startswith("take"))
    for command in game.walkthrough[: game.walkthrough.index(taken) + 1]:
        env.step(command)
    obj, name = taken.removeprefix("take ").split(" from ")[0], game.meta.tools[0]
    home = name if kind == HOUSE_WITH else game.meta.placement[name]
    where = game.meta.locations
    wrong = next(r for r in where if where[r] != where[home] and r.split()[0] != home.split()[0])
    env.step(f"go to {wrong}")
    assert not env.step(rule.command(obj, wrong)).valid
    assert not env.step(rule.command(obj, name)).valid
    env.step(f"go to {home}")
    env.step(f"open {home}")
    assert env.step(rule.command(obj, name)).valid


def test_impossible_house_rules_are_refused() -> None:
    rule = HouseRule(verb="polish", adjective="polished", tool_type="Fridge", form="with")
    with pytest.raises(ConfigError, match="does not fit"):
        generate_game(HOUSE_WITH, 304, 1, rule)
    with pytest.raises(ConfigError, match="takes no house rule"):
        generate_game(PICK, 304, 1, rule)
    with pytest.raises(ConfigError, match="cannot be a house-rule word"):
        houserules.house_grammar(HouseRule(verb="clean", adjective="clean", tool_type="Bed", form="with"))


def test_the_vocabulary_is_large_mixed_and_disjoint_from_the_real_rules() -> None:
    pairs = houserules.VOCABULARY
    assert len(pairs) >= 60 and len({v for v, _ in pairs}) == len(pairs) == len({a for _, a in pairs})
    assert 0.25 <= len(houserules.IRREGULAR) / len(pairs) <= 0.4
    assert not {w for pair in pairs for w in pair} & set(houserules.WITHHELD)
    engine = {"go", "open", "close", "take", "move", "put", "inventory", "slice", "help"}
    assert not {v for v, _ in pairs} & engine


def test_sentence_templates_are_those_of_the_goal_library() -> None:
    for kind in KINDS:
        assert list(goals.TEMPLATES[kind]) == assets.goal_library()[kind]["templates"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_infer_kind_reads_every_template_in_any_dress(kind: str) -> None:
    for template in goals.TEMPLATES[kind]:
        for verb, adjective in (("polish", "polished"), ("shrink", "tiny")):
            goal = template.format(obj="mug", recep="shelf", toggle="desklamp", verb=verb, adjective=adjective)
            for text in (goal, f"Your task is to: {goal.upper()}.", f"  {goal}. \n"):
                assert goals.infer_kind(text) == kind
    assert goals.infer_kind("sing a song") == goals.OTHER
    assert goals.infer_kind("") == goals.OTHER


@pytest.mark.data
def test_infer_kind_is_right_on_every_official_sentence(official: Path) -> None:
    seen = 0
    for path in official.glob("*/*/*/game.tw-pddl"):
        goal = re.search(r"Your task is to: ([^\"]*)", json.loads(path.read_bytes())["grammar"])
        kind = json.loads((path.parent / "traj_data.json").read_bytes())["task_type"]
        assert goal and goals.infer_kind(goal.group(1)) == kind, path
        seen += 1
    assert seen >= 140


@pytest.mark.data
def test_official_games_win_with_their_walkthrough(official: Path) -> None:
    tasks = official_tasks(official, "valid_seen")
    assert len(tasks) == 140
    env = AlfworldEnv(official, official=official)
    for task in random.Random(1).sample(tasks, 6):
        walkthrough = json.loads((official / task.data.removeprefix(PREFIX)).read_bytes())["walkthrough"]
        assert env.reset(task).bucket == task.kind
        assert [env.step(c) for c in walkthrough][-1].reward == 1.0


def test_only_official_split_names_are_accepted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="valid_train"):
        official_tasks(tmp_path, "valid_train")
    with pytest.raises(DataError, match="ragdistill data alfworld"):
        official_tasks(tmp_path, "valid_unseen")
