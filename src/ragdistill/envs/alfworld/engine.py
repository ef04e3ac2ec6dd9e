"""`AlfworldEnv`: one ALFWorld game at a time on the real TextWorld engine (PDDL state, grammar, Fast Downward).

Same texts and rules as the stock environment (a test plays both side by side), but it translates a game once, not four
times, and it does not derive the text of every admissible command at every step: the stock engine spends 85 % of a
step there. Not thread-safe (global translator options, stdout): one process, one thread. Knows no model; never shows
the walkthrough or the placement.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import fast_downward
from textworld.envs.pddl.logic import Atom, GameLogic, PddlState
from textworld.generator.game import EntityInfo
from textworld.logic import Placeholder, Proposition, Type, Variable

from ragdistill.envs import check_game
from ragdistill.envs.alfworld import assets
from ragdistill.envs.alfworld.goals import infer_kind
from ragdistill.envs.alfworld.official import PREFIX, VARIABLE, official_root
from ragdistill.envs.alfworld.translation import Translation, Translator
from ragdistill.errors import DataError, EnvironmentFault
from ragdistill.records import Observation, Task, digest

REFUSED = "Nothing happens."
MAX_ACTION = 200
"""Characters of a command; the longest real command has about 60."""
_WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
_TASK = re.compile(r'"rhs": "Your task is to: ([^"]*)"')
_ANY_TASK = '"rhs": "Your task is to: UNKNOWN GOAL."'
_LISTED = re.compile(r"\[\{(\w+)\.name \|[^\]]*\]")


def display_names(ids: Iterable[str]) -> dict[str, str]:
    """In-game names ("drawer 2") of entity ids, numbered as alfworld's unshuffled demangler does.

    Ids of one type are numbered downwards in sorted order; ids without a position keep their bare name.
    """
    ordered = sorted(ids)
    bases = {i: i.split("_bar_", 1)[0] + ("basin" if "basin" in i else "") for i in ordered if "_bar_" in i}
    left = Counter(bases.values())
    names: dict[str, str] = {}
    for i in ordered:
        if i not in bases:
            names[i] = i
            continue
        names[i] = f"{bases[i]} {left[bases[i]]}"
        left[bases[i]] -= 1
    return names


@lru_cache(maxsize=32)
def _logic(domain: str, grammar: str) -> GameLogic:
    """Parsed grammar; games differ only in the task sentence, so one parse (50 ms) serves many."""
    return GameLogic(domain=domain, grammar=grammar)


def _entity(identifier: str, kind: str, name: str) -> EntityInfo:
    info: Any = EntityInfo(identifier, kind)
    info.name, info.definite, info.indefinite = name, "the", "a"
    return info


class _State(PddlState):
    """textworld's state, built from a memoised translation and without the planner's second translation."""

    def __init__(self, lib: Any, logic: GameLogic, game: Translation) -> None:
        self._facts = defaultdict(set)
        self._vars_by_name = {}
        self._vars_by_type = defaultdict(set)
        self._var_counts = Counter()
        self._logic = logic
        self.downward_lib = lib
        self.name2type = game.objects
        self._operators: dict[int, Any] = {}
        for name, parents in game.types:
            with suppress(ValueError):  # the parsed grammar is shared by games and knows the type already
                logic.types.add(Type(name, parents))
        lib.load_sas(game.sas.encode("utf-8"))
        self.add_facts(Proposition(p, [Variable(a, self.name2type[a]) for a in args]) for p, args in game.init)
        self.add_facts(f for f in self._engine_facts() if not f.is_negation)

    def _engine_facts(self) -> list[Proposition]:
        atoms = (Atom * self.downward_lib.get_state_size())()
        self.downward_lib.get_state(atoms)
        return [a.get_fact(self.name2type) for a in atoms]

    def operators(self) -> list[Any]:
        """Applicable ground operators, in the engine's order."""
        found = (fast_downward.Operator * self.downward_lib.get_applicable_operators_count())()
        self.downward_lib.get_applicable_operators(found)
        self._operators = {op.id: op for op in found}
        return list(found)


class _Game:
    """A loaded game: state, names and the text of its commands."""

    def __init__(self, data: dict[str, Any], lib: Any, translator: Translator) -> None:
        task = _TASK.search(data["grammar"])
        if task is None:
            raise DataError('The game\'s grammar has no "Your task is to: …" sentence; generate or download it again.')
        self.goal = task.group(1).strip().rstrip(".").strip()
        self.logic = _logic(data["pddl_domain"], _TASK.sub(lambda _: _ANY_TASK, data["grammar"], count=1))
        self.translation = translator(data["pddl_domain"], data["pddl_problem"])
        self.state = _State(lib, self.logic, self.translation)
        kinds = {v.name: v.type for fact in self.state.facts for v in fact.arguments}
        self.entities: dict[str, EntityInfo] = {}
        for i, name in display_names(kinds).items():
            self.entities[i] = _entity(i, kinds[i], name)
        self.templates = {n: _LISTED.sub(r"{\1}", a.template) for n, a in self.logic.actions.items()}

    def commands(self) -> dict[str, Any]:
        """Command text → the first applicable operator that it means."""
        found: dict[str, Any] = {}
        for op in self.state.operators():
            name, *arguments = op.name.split()
            slots = {p: self.entities[a].name for (p, _), a in zip(self._parameters(name), arguments, strict=False)}
            found.setdefault(self.templates[name].format(**slots), op)
        return found

    def intro(self) -> str:
        """Text of the start, with the goal, without the welcome line."""
        text = self.logic.grammar.derive("#intro#", self._context({}))
        return text.replace("UNKNOWN GOAL", self.goal).replace(_WELCOME, "", 1).strip()

    def apply(self, op: Any) -> str:
        """Play an operator and tell its feedback."""
        self.state.apply(op)
        name, *arguments = op.name.split()
        mapping = {
            Placeholder(p, kind): Variable(a, kind)
            for (p, kind), a in zip(self._parameters(name), arguments, strict=False)
        }
        return self.logic.grammar.derive(self.logic.actions[name].feedback_rule, self._context(mapping))

    def won(self) -> bool:
        return bool(self.state.check_goal())

    def _parameters(self, action: str) -> list[tuple[str, str]]:
        return self.translation.parameters[action]

    def _context(self, mapping: dict[Placeholder, Variable]) -> dict[str, Any]:
        return {
            "state": self.state,
            "facts": list(self.state.facts),
            "variables": {p.name: self.entities[v.name] for p, v in mapping.items()},
            "mapping": mapping,
            "entity_infos": self.entities,
        }


def clean_action(action: str) -> str:
    """Lower case, one line, single spaces, at most `MAX_ACTION` characters."""
    return " ".join(action[: 4 * MAX_ACTION].lower().split())[:MAX_ACTION]


class AlfworldEnv:
    """`ragdistill.envs.Env` on ALFWorld games under `root` (`Task.data` is relative to it).

    Official games (`Task.data` = `official:…`) lie under `official`, by default what `ALFWORLD_DATA` names.
    `cache` is a folder of memoised translations shared by processes; `admissible` fills `Observation.admissible`
    (costs about a millisecond a step). Raises `IdentityError` when alfworld or textworld is another version.
    """

    def __init__(
        self, root: Path, cache: Path | None = None, admissible: bool = False, official: Path | None = None
    ) -> None:
        self.versions = assets.check_versions()
        assets.grammar()
        self.root = Path(root).resolve()
        self._official = official
        self.translate = Translator(cache)
        self._admissible = admissible
        self._lib: Any = None
        self._game: _Game | None = None
        self._done = False

    def reset(self, task: Task) -> Observation:
        """Load the game of `task`.

        Raises `DataError` (missing, damaged, outside the root) or `IdentityError` (other content, old grammar).
        """
        return self.load(self._read(task), task.id)

    def load(self, data: dict[str, Any], origin: str = "the game") -> Observation:
        """Start a game from its parsed `game.tw-pddl`; generator and prover use it without a file."""
        assets.check_grammar(data["grammar"], origin)
        if self._lib is None:
            self._lib = fast_downward.load_lib()
        self._game = _Game(data, self._lib, self.translate)
        self._done = False
        goal = self._game.goal
        return Observation(
            text=self._game.intro(), goal=goal, bucket=infer_kind(goal), admissible=self._list_admissible()
        )

    def step(self, action: str) -> Observation:
        """Play one command; `valid` is False when the engine refuses it, `help` included."""
        if self._game is None or self._done:
            raise EnvironmentFault("step was called without a running game; call reset first.")
        command = clean_action(action)
        op = None if command == "help" else self._game.commands().get(command)
        if op is None:
            return Observation(text=REFUSED, valid=False, admissible=self._list_admissible())
        text = self._game.apply(op)
        self._done = self._game.won()
        return Observation(text=text, reward=float(self._done), done=self._done, admissible=self._list_admissible())

    def close(self) -> None:
        """Forget the game. The private engine library stays loaded until the process ends."""
        self._game = None

    def names(self) -> dict[str, str]:
        """Entity id → in-game name of the loaded game; for the generator's prover, not part of the `Env` protocol."""
        return {} if self._game is None else {i: str(e.name) for i, e in self._game.entities.items()}

    def fingerprint(self) -> str:
        """Identity of rules and texts: versions, domain and grammar of the wheel."""
        return digest("alfworld", self.versions, assets.domain(), assets.grammar())

    def _list_admissible(self) -> tuple[str, ...]:
        if not self._admissible or self._game is None:
            return ()
        return tuple(sorted(c for c in self._game.commands() if c != "help"))

    def _root_of(self, task: Task) -> Path:
        if not task.data.startswith(PREFIX):
            return self.root
        root = self._official or official_root()
        if root is None:
            raise DataError(f"Task {task.id} is an official game; set {VARIABLE} to the folder of json_2.1.1.")
        return root.resolve()

    def _read(self, task: Task) -> dict[str, Any]:
        root = self._root_of(task)
        path = (root / task.data.removeprefix(PREFIX)).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"Task {task.id} points outside the data root; regenerate the task list.")
        try:
            raw = path.read_bytes()
            data = json.loads(raw)
        except FileNotFoundError:
            raise DataError(f"{task.data} is missing under the data root; generate or download the games.") from None
        except ValueError as e:
            raise DataError(f"{task.data} is not valid JSON ({e}); generate or download it again.") from None
        if task.sha256:
            check_game(task, raw)
        return data
