"""A repair shop: which tool mends which thing is for the agent to find out. The wrong tool breaks it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ragdistill.envs import Demo
from ragdistill.errors import ConfigError
from ragdistill.params import ColdstartParams
from ragdistill.records import Observation, Task, digest

RULES = {"radio": "screwdriver", "chair": "hammer", "cup": "glue"}


@dataclass
class Shop:
    """See `ragdistill.envs.Env`. With `hurry`, the first wrong tool ends the episode."""

    hurry: bool
    thing: str = ""

    def reset(self, task: Task) -> Observation:
        tools = random.Random(task.data).sample(sorted(RULES.values()), len(RULES))
        self.thing, goal = task.kind, f"mend the {task.kind}"
        seen = ", ".join(f"{name} {i}" for i, name in enumerate(tools, 1))
        text = f"Shop {task.data}. You see {seen} and {self.thing} 1.\nYour task is to: {goal}."
        return Observation(text=text, goal=goal, bucket=goal.removeprefix("mend the "))

    def step(self, action: str) -> Observation:
        task, _, tool = action.partition(" 1 with ")
        if task != f"mend {self.thing}" or tool[:-2] not in RULES.values():
            return Observation(text="That does not work.", valid=False)
        won = tool[:-2] == RULES[self.thing]
        return Observation(text="It works." if won else "It breaks.", reward=float(won), done=won or self.hurry)

    def close(self) -> None: ...


@dataclass
class RepairShop:
    """See `ragdistill.envs.Domain`. Its fields are its options."""

    hurry: bool = True
    name, evaluation_splits = "repair_shop", ("test", "dev")

    def fingerprint(self) -> str:
        return "repair_shop-1"

    def env_factory(self, cache: Path, admissible: bool) -> partial[Shop]:
        return partial(Shop, self.hurry)

    def tasks(self, split: str, count: int, seed: int, out: Path) -> list[Task]:
        made = [(f"{split}-{seed}-{i}", list(RULES)[i % len(RULES)]) for i in range(count)]
        return [Task(id=s, env=self.name, split=split, kind=k, group=s, data=s, sha256=digest(s, k)) for s, k in made]

    def demonstrations(self, params: ColdstartParams, seed: int, out: Path) -> list[Demo]:
        raise ConfigError("repair_shop has no demonstrations; set coldstart.enabled to false.")
