"""Example episodes: true of the real environments, shown in the agent's own form, and nowhere in what is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from ragdistill import envs
from ragdistill.agents import make_agent
from ragdistill.agents.examples import HEADER, Example, FewShot
from ragdistill.commands import promote
from ragdistill.envs import Demo
from ragdistill.envs.alfworld import examples as alfworld
from ragdistill.envs.alfworld.engine import AlfworldEnv
from ragdistill.envs.alfworld.games import prove
from ragdistill.envs.alfworld.generator import generate_game
from ragdistill.envs.alfworld.goals import DEV, FORBIDDEN, KINDS, TEMPLATES, TEST
from ragdistill.envs.gymnasium import GymnasiumDomain
from ragdistill.envs.webshop import examples as webshop
from ragdistill.envs.webshop.catalogue import Catalogue
from ragdistill.envs.webshop.shop import Visit
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder
from ragdistill.envs.webshop.splits import family_of, split_of
from ragdistill.errors import ConfigError, ContaminationError
from ragdistill.params import Params, StripParams, load_params
from ragdistill.records import Message, Step, Trajectory, write_json, write_jsonl
from ragdistill.rollout import fit
from ragdistill.stages import evaluate
from ragdistill.stages.playing import Work, agent_of
from ragdistill.stages.strip import renderer
from ragdistill.strip import strip
from tests.test_agents import STYLES, TASK
from tests.test_rollout import TASKS, ToyModel, play, setting

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
EVERY = [p.demo for p in alfworld.played()] + [d for demos in webshop.played().values() for d in demos]


def params(style: str = "react", env: str = "alfworld", count: int = 2) -> Params:
    agent = msgspec.structs.replace(PARAMS.agent, name=style, examples=count)
    return msgspec.structs.replace(PARAMS, agent=agent, env=msgspec.structs.replace(PARAMS.env, name=env))


def opening(goal: str) -> str:
    return f"A room.\n\nYour task is to: {goal}."


def system(goal: str, style: str = "react", env: str = "alfworld") -> str:
    """The system message that an agent with two examples begins a task with."""
    return agent_of(params(style, env), student=False).render(opening(goal), (), ())[0].content


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> AlfworldEnv:
    return AlfworldEnv(tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("example", alfworld.played(), ids=lambda p: p.demo.task_id.split("/")[1])
def test_each_alfworld_example_is_won_on_the_real_engine_as_it_is_told(
    example: alfworld.Played, engine: AlfworldEnv
) -> None:
    demo = example.demo
    game = prove(generate_game(demo.kind, example.plan, example.seed), engine)
    assert (game.target, game.destination) == (example.object, example.place)
    first = engine.load(game.data)
    assert first.text == demo.first_observation
    for turn in demo.turns:
        seen = engine.step(turn.action)
        assert (seen.text, seen.valid, seen.done) == (turn.observation, True, turn is demo.turns[-1])
        assert turn.state["goal"] == first.goal


def test_webshop_s_examples_earn_the_full_reward_in_the_real_shop_on_every_variant_of_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    catalogue = Catalogue(catalogue_folder(tmp_path, None))
    assert len(webshop.played()) == 4
    for variant, demos in webshop.played().items():
        for demo in demos:
            source, number = demo.task_id.split("/")
            goal = catalogue.goal(source, int(number))
            marks, gold = variant.startswith("chosen"), variant.endswith("attributes")
            visit = Visit(catalogue, goal, show_chosen=marks, show_attributes=gold)
            assert visit.page.text == demo.first_observation
            for turn in demo.turns:
                assert visit.act(turn.action) and visit.page.text == turn.observation
            assert visit.earned is not None and visit.earned.total == 1.0
            assert split_of(family_of(catalogue.product(goal.asin))) == "coldstart", "no task asks for it"
    catalogue.close()


def test_no_example_is_of_a_room_that_is_evaluated_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {p.plan for p in alfworld.played()} & (FORBIDDEN | TEST | DEV)
    one = alfworld.played()[0]
    monkeypatch.setattr(alfworld, "__file__", str(tmp_path / "examples.py"))
    for plan in (min(FORBIDDEN), min(TEST)):
        write_json(tmp_path / "examples.json", [msgspec.structs.replace(one, plan=plan)])
        alfworld.played.cache_clear()
        with pytest.raises(ContaminationError, match="choose"):
            alfworld.played()
    alfworld.played.cache_clear()


def test_examples_say_nothing_of_hints_and_speak_the_pinned_grammar() -> None:
    for demo in EVERY:
        text = " ".join((demo.first_observation, *(f"{t.thought} {t.action}" for t in demo.turns)))
        assert not re.search(r"hint|advice|\{", text, re.IGNORECASE) and demo.hints == () and demo.won
        assert all(t.thought and "\n" not in t.thought + t.action for t in demo.turns)
    verbs = {t.action.split()[0] for p in alfworld.played() for t in p.demo.turns}
    assert verbs == {"go", "open", "take", "move", "clean", "heat", "cool", "use"}


@pytest.mark.parametrize("kind", KINDS)
def test_two_examples_of_the_type_that_the_goal_says_are_shown(kind: str) -> None:
    own = [p.demo for p in alfworld.played() if p.demo.kind == kind]
    for template in TEMPLATES[kind]:
        text = system(template.format(obj="mug", recep="shelf", toggle="desklamp"))
        shown = [p.demo for p in alfworld.played() if p.demo.first_observation in text]
        assert shown == own and len(own) == 2
        assert "Example 2" in text and "Example 3" not in text


def test_a_goal_of_no_known_type_is_shown_the_first_type() -> None:
    assert system("paint the wall") == system("put a mug in shelf")


def test_the_shop_s_examples_are_those_of_its_own_pages() -> None:
    marked, plain = (
        agent_of(
            msgspec.structs.replace(
                params(env="webshop"),
                env=msgspec.structs.replace(
                    PARAMS.env, name="webshop", webshop=msgspec.structs.replace(PARAMS.env.webshop, observation=which)
                ),
            ),
            student=False,
        )
        for which in ("chosen", "original")
    )
    texts = [a.render("WebShop [SEP] Instruction:", (), ())[0].content for a in (marked, plain)]
    assert ["chosen: " in t for t in texts] == [True, False]
    assert marked.version != plain.version


@pytest.mark.parametrize("env", ["alfworld", "webshop"])
@pytest.mark.parametrize("style", STYLES)
def test_examples_are_written_in_the_agent_s_own_form_and_read_back(style: str, env: str) -> None:
    goal, agent = "clean some mug and put it in shelf", make_agent(style)
    text = system(goal, style=style, env=env)
    assert text.startswith(agent.render("", (), ())[0].content)
    demos = webshop.played()["chosen"] if env == "webshop" else alfworld.library()[KINDS[2]]
    for demo in demos:
        _, _, rest = text.partition(demo.first_observation)
        for turn, after in zip(demo.turns, (*demo.turns[1:], None), strict=True):
            said, _, rest = rest.partition("\nObservation: ") if after else rest.partition("\n\n")
            parsed = agent.parse(said.strip())
            assert parsed.action == turn.action
            assert parsed.thought == ("" if style == "act" else turn.thought)
            assert list(parsed.state.items()) == (list(turn.state.items()) if style == "stateact" else [])
            assert rest.startswith(turn.observation) == (after is not None), "the last answer is not shown"
            rest = rest.removeprefix(turn.observation)


@pytest.mark.parametrize("style", STYLES)
def test_nothing_but_the_system_message_differs_and_replies_are_the_agent_s(style: str) -> None:
    agent, shown = make_agent(style), agent_of(params(style), student=False)
    steps = [Step(reply="Action: look", thought="", action="look", observation="Ok.")]
    plain, chat = (a.render(TASK, ("Look first.",), steps) for a in (agent, shown))
    assert chat[1:] == plain[1:] and chat[0].content.startswith(plain[0].content) and HEADER in chat[0].content
    assert agent.parse(shown.reply("t", "look", {"goal": "g"})) == shown.parse(agent.reply("t", "look", {"goal": "g"}))
    assert shown.name == style


def test_a_full_context_loses_turns_and_never_examples() -> None:
    agent = agent_of(params(), student=False)
    steps = [
        Step(reply=f"Action: go to shelf {i}", thought="", action="x", observation=f"Shelf {i}.") for i in range(30)
    ]

    def count(chat: Sequence[Message]) -> int:
        return sum(len(m.content.split()) for m in chat)

    whole = agent.render(TASK, (), steps)
    least = count([*whole[:2], *whole[-2:]])
    cut = fit(whole, least + 50, count)
    assert cut is not None and cut[:2] == whole[:2] and HEADER in cut[0].content and len(cut) < len(whole)
    assert fit(whole, least - 1, count) is None


@pytest.mark.parametrize("style", STYLES)
def test_no_text_of_an_example_is_in_what_is_learnt(style: str, tmp_path: Path) -> None:
    """Played with examples through the event loop, then stripped: the first observation stays, every example goes."""
    agent, bare = agent_of(params(style), student=False), make_agent(style)
    model = ToyModel(lambda messages, _: bare.reply("I end it.", "win", {"goal": "win"}))
    done = play(tmp_path, lambda *_: "", TASKS, model=model, agent=agent)
    assert all(HEADER in chat[0].content for _, chat, _ in model.seen), "they were shown"
    kept, _ = strip(done, StripParams(None, None, "drop_thought", 1), renderer(make_agent(done[0].agent)))
    assert len(kept) == len(TASKS)
    told = {HEADER} | {d.first_observation for d in EVERY}
    told |= {text for d in EVERY for t in d.turns for text in (t.thought, t.action, t.observation)}
    for example in kept:
        learnt = "\n".join(m.content for m in example.messages)
        assert not [text for text in told if text in learnt]
        assert example.messages[0] == bare.render("", (), ())[0]
        assert example.messages[1].content == next(t for t in done if t.id == example.trajectory_id).first_observation


def test_without_examples_prompts_versions_and_journal_keys_are_what_they_were_before_there_were_any() -> None:
    limits = msgspec.structs.replace(PARAMS.agent, name="react", context_tokens=6000, max_reply_tokens=64, examples=0)
    key = setting(limits=limits, run="0/evaluate", max_steps=50).key(TASKS[0], 0)
    assert key == "53f3c6a8e0a4a8c2b8e5d7b637226873"
    for student, count in ((False, 0), (True, 0), (True, 2)):
        agent = agent_of(params(count=count), student=student)
        assert agent.version == "react-2" and HEADER not in agent.render(TASK, (), ())[0].content
        shown = msgspec.structs.replace(limits, examples=count)
        assert setting(agent=agent, limits=shown, run="0/evaluate", max_steps=50).key(TASKS[0], 0) == key


def test_untrained_policies_are_evaluated_with_examples_and_students_as_they_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("data/tasks/train.jsonl"), [])
    write_jsonl(Path("data/tasks/eval.jsonl"), TASKS)
    write_json(Path("data/identity.json"), {"environment": "e"})
    Path("models/students/distilled-0").mkdir(parents=True)
    played: dict[str, str] = {}

    def caught(_: Params, work: Sequence[Work], model: object) -> list[list[Trajectory]]:
        played.update({s.policy: s.agent.version for s, _ in work})
        return [[]]

    for module in (evaluate, promote):
        monkeypatch.setattr(module, "open_model", lambda *_: ToyModel(lambda *_: ""))
        monkeypatch.setattr(module, "play_each", caught)
    monkeypatch.setattr(promote, "fetch_adapter", lambda *_: Path("models/students/distilled-0"))
    for policy in ("raw", "base", "distilled"):
        evaluate.body(params(), policy, 0)
    shown = agent_of(params(), student=False).version
    assert played == {"raw": shown, "base": shown, "distilled": "react-2"}
    for who in ("challenger", "base"):
        promote._evaluate(params(), who)
    assert (played["challenger"], played["base"]) == ("react-2", shown)


def test_other_examples_are_another_agent_to_the_journal() -> None:
    def agent(count: int, thought: str = "I look.") -> FewShot:
        step = Step(reply="", thought=thought, action="look", observation="Ok.")
        library = {"k": [Example(first_observation="A room.", steps=(step,))] * 2}
        return FewShot(make_agent("react"), library, lambda _: "k", count)

    made = (agent(1), agent(2), agent(1, "I see."), make_agent("react"))
    assert agent(1).version == made[0].version
    assert len({a.version for a in made}) == 4
    assert len({setting(agent=a).key(TASKS[0], 0) for a in made}) == 4


def test_too_many_or_no_examples_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"agent\.examples is 3, but there are 2 for each task type; set it to 2"):
        agent_of(params(count=3), student=False)
    assert not isinstance(GymnasiumDomain, envs.HasExamples)
    monkeypatch.setattr("ragdistill.stages.playing.make_domain", lambda _: Bare())
    with pytest.raises(ConfigError, match=r"the environment bare has none; set it to 0"):
        agent_of(params(), student=False)


class Bare:
    """As much of a domain as is asked for."""

    name = "bare"


def test_a_plug_in_may_bring_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Bare):
        def examples(self) -> dict[str, list[Demo]]:
            return {"own": [msgspec.structs.replace(EVERY[0], first_observation="A door.")]}

        def example_type(self, first_observation: str) -> str:
            return "own"

    monkeypatch.setattr("ragdistill.stages.playing.make_domain", lambda _: Own())
    assert "A door." in agent_of(params(count=1), student=False).render(TASK, (), ())[0].content
