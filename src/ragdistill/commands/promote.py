"""`ragdistill promote` and `rollback`: a person moves the alias `champion`, behind a measured gate.

Champion and challenger (or, with no champion, base and challenger) play the same evaluation games again; the journal
answers for episodes that were already played with the same weights. A decision is recorded either way.
"""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ragdistill import progress
from ragdistill.errors import ConfigError, IdentityError
from ragdistill.journal import cache_dir
from ragdistill.llm.weights import adapter_fingerprint
from ragdistill.params import Params, load_params
from ragdistill.records import EvalEpisode, StopReason, Task, read_jsonl
from ragdistill.report.metrics import compare
from ragdistill.stages.common import BASE, STORE, TASKS, quiet_libraries
from ragdistill.stages.defaults import primary, student_name
from ragdistill.stages.playing import open_model, play_each, setting_of

LOG = Path("results/promotions.jsonl")


def promote(margin: float | None, new_base: bool = False) -> int:
    """Re-evaluate, decide, move or refuse; returns the exit status (1 = refused).

    `new_base`: compare the challenger with its base even if there is a champion, as one of another base cannot play.
    """
    from ragdistill import champions, tracking

    quiet_libraries()
    params = load_params()
    store = tracking.store_at(params.track.uri, STORE)
    name, margin = student_name(params), params.promote.margin if margin is None else margin
    aliases = champions.champion_and_challenger(store, name)
    if aliases.challenger is None:
        raise ConfigError(f"{name} has no challenger; run `dvc repro` to register one.")
    rival = "champion" if aliases.champion and not new_base else "base"
    a = _evaluate(params, "challenger")
    try:
        b = _evaluate(params, rival)
    except IdentityError as error:
        raise ConfigError(
            f"Version {aliases.champion} of {name}, the champion, cannot play on {BASE}: {error} To compare the "
            "challenger with its base instead, run `ragdistill promote --new-base`."
        ) from None
    found = compare(a, b, primary(params), params.report)
    decision = champions.decide(found, margin, has_champion=rival == "champion")
    if decision.promote:
        champions.promote(store, name, aliases, decision, _who(), found)
    _record({"promote": decision.promote, "reason": decision.reason, "version": aliases.challenger})
    print(decision.reason)
    if decision.promote:
        print(f"{name} version {aliases.challenger} is now champion; undo with `ragdistill rollback`.")
    return 0 if decision.promote else 1


def rollback() -> int:
    """Undo the last promotion: `champion` goes back to the version it replaced, or to none."""
    from ragdistill import champions, tracking

    params = load_params()
    name = student_name(params)
    version = champions.rollback(tracking.store_at(params.track.uri, STORE), name, _who())
    _record({"rollback": True, "version": version})
    if version is None:
        print(f"{name} has no champion any more, as before its first promotion.")
    else:
        print(f"{name} version {version} is champion again.")
    return 0


def _evaluate(params: Params, who: str) -> list[EvalEpisode]:
    """Play the evaluation tasks with a registered adapter, or with the base."""
    adapter = None if who == "base" else fetch_adapter(params, who)
    jobs = [(t, 0) for t in read_jsonl(TASKS / "eval.jsonl", Task)]
    with progress.display(who):
        model, temperature = open_model(params, BASE, adapter), params.evaluate.temperature
        setting = setting_of(params, who, "evaluate", model, temperature, student=adapter is not None)
        (done,) = play_each(params, [(setting, jobs)], model)
    return [EvalEpisode.of(t, who, 0) for t in done if t.stop is not StopReason.INFRA_ERROR]


def fetch_adapter(params: Params, alias: str) -> Path:
    """Copy the registered adapter behind `alias` below the cache and return its directory.

    `ConfigError` without such an alias, `DataError` when the stored files were altered.
    """
    from ragdistill import registry, tracking

    store = tracking.store_at(params.track.uri, STORE)
    root = cache_dir("registry")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{alias}-") as tmp:  # others may fetch the same at once
        fresh = registry.download(store, student_name(params), alias, Path(tmp) / "adapter")
        kept = root / adapter_fingerprint(fresh)
        if not _intact(kept):
            shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):  # another process was faster
                fresh.rename(kept)
    return kept


def _intact(adapter: Path) -> bool:
    """Whether a directory named after an adapter's content holds it."""
    try:
        return adapter_fingerprint(adapter) == adapter.name
    except OSError:
        return False


def _who() -> str:
    """Login name of the person, or the number where the system has no name for it (containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _record(entry: dict[str, object]) -> None:
    LOG.parent.mkdir(parents=True, exist_ok=True)
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": _who(), **entry}
    with LOG.open("ab") as f:
        f.write(msgspec.json.encode(line) + b"\n")
