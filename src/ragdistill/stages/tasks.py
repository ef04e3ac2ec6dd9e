"""Stage `tasks`: training, development and evaluation tasks; refuses any overlap between them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ragdistill.contamination import OWN, REMEDY, check_disjoint
from ragdistill.envs import Domain, defaults_of, make_domain
from ragdistill.errors import ConfigError, EmptyResultError
from ragdistill.params import Params
from ragdistill.records import Task, write_jsonl
from ragdistill.stages.common import GAMES, TASKS, run_stage
from ragdistill.stages.defaults import primary


def body(params: Params) -> str:
    domain, p = make_domain(params.env), params.tasks
    for old in (GAMES, TASKS):
        shutil.rmtree(old, ignore_errors=True)
    train_split = "train" if p.source == "generated" else "official_train"
    splits = {
        "train": domain.tasks(train_split, p.train, params.seed, GAMES / "train"),
        "dev": domain.tasks("dev", p.dev, params.seed, GAMES / "dev") if p.dev else [],
        "eval": _evaluation(domain, params),
    }
    for name, tasks in splits.items():
        check_sound(tasks, name, domain.name)
    group = defaults_of(domain).group
    check_disjoint(splits["train"], splits["eval"], group if p.eval_split in OWN else None, _remedy(domain, params))
    check_disjoint(splits["train"], splits["dev"], group if p.source == "generated" else None)
    check_primary(primary(params), splits["eval"], defaults_of(domain).kinds)
    _stand_in(GAMES / "train")
    for name, tasks in splits.items():
        write_jsonl(TASKS / f"{name}.jsonl", tasks)
    return "; ".join(f"{name} {_counts(tasks, defaults_of(domain).group)}" for name, tasks in splits.items())


def check_sound(tasks: Sequence[Task], which: str, env: str) -> None:
    """Refuse now what would be found once everything was played: no task, a wrong type, or one id twice.

    The built-in environments make none such; whose environment is a plug-in reads this.
    """
    try:
        found = msgspec.convert(msgspec.to_builtins(tasks), list[Task])
    except (TypeError, msgspec.ValidationError) as e:
        raise ConfigError(f"{env} made {which} tasks that are no list of ragdistill.records.Task ({e}).") from None
    if not found and which != "dev":
        raise EmptyResultError(f"{env} made no {which} tasks; choose another split or mend the environment.")
    ids = Counter(t.id for t in found)
    if twice := next((i for i, n in ids.items() if n > 1), None):
        raise ConfigError(f"{env} made {ids[twice]} {which} tasks of the id {twice!r}; each needs an id of its own.")


def check_primary(wanted: Sequence[str], tasks: Sequence[Task], kinds: Sequence[str]) -> None:
    """Refuse now what would fail once everything was played: types that there are not, or of which no task is."""
    unknown = [k for k in wanted if kinds and k not in kinds]
    if unknown:
        raise ConfigError(f"evaluate.primary names {', '.join(unknown)}; the types of task are {'; '.join(kinds)}.")
    if wanted and not {t.kind for t in tasks} & set(wanted):
        raise EmptyResultError(
            f"None of {len(tasks)} evaluation tasks is of the types {'; '.join(wanted)}; check evaluate.primary "
            "(null = the environment's own, [] = all) and tasks.test."
        )


def _stand_in(folder: Path) -> None:
    """A file for DVC, which keeps no empty folder, where the environment needs none (official games, plug-ins)."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / "none.txt").write_text("This environment has no files of its own for these tasks.\n")


def _evaluation(domain: Domain, params: Params) -> list[Task]:
    p, known = params.tasks, domain.evaluation_splits
    if p.eval_split not in known:
        raise ConfigError(f"tasks.eval_split is {p.eval_split!r}; {domain.name} has {', '.join(known)}.")
    count = p.dev if p.eval_split == "dev" else p.test
    return domain.tasks(p.eval_split, count, params.seed, GAMES / "eval")


def _remedy(domain: Domain, params: Params) -> str:
    """What helps where evaluation and training overlap: no seed does where one is official and the other is not."""
    source, split = params.tasks.source, params.tasks.eval_split
    if (source == "official") != (split in OWN):
        return REMEDY
    official = ", ".join(s for s in domain.evaluation_splits if s not in OWN)
    other = f"an official tasks.eval_split ({official})" if source == "official" else "tasks.source=official"
    return f"tasks.source={source} and tasks.eval_split={split} share them, choose {other}"


def _counts(tasks: list[Task], group: str) -> str:
    kinds, groups = Counter(t.kind for t in tasks), len({t.group for t in tasks})
    return f"{len(tasks)} tasks of {len(kinds)} types in {groups} {group}s"


if __name__ == "__main__":
    run_stage("tasks", body)
