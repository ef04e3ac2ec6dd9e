"""An adapter is trained once, also where experiments that run at once ask for the same one or for different ones."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.llm.weights import adapter_fingerprint
from ragdistill.params import load_params
from ragdistill.records import write_jsonl
from ragdistill.stages import coldstart
from ragdistill.training import once
from tests.test_training import CHATS, LORA, make_base

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "raw", 0)


def test_of_runs_that_want_the_same_adapter_at_once_one_trains_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, begun = once.train_lora, []

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.append(time.monotonic())
        time.sleep(1)
        return train(*args, **kwargs)

    def run(out: Path) -> None:
        once.train_once(CHATS, base, out, LORA, 0, tmp_path / "cache", 3)

    monkeypatch.setattr(once, "train_lora", slow)
    outs = [tmp_path / name for name in "abc"]
    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1
    assert len({adapter_fingerprint(out) for out in outs}) == 1
    assert "another run trains this adapter" in capsys.readouterr().err


def test_a_killed_training_lets_the_next_one_in(tmp_path: Path) -> None:
    lock = tmp_path / "locks/key"
    child = os.fork()
    if child == 0:
        with once._alone(lock, "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with once._alone(lock, "next"):
        assert lock.is_file()


def test_cold_starts_of_experiments_that_share_a_cache_do_not_share_their_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
    params, made = load_params(ROOT / "params.yaml"), {}
    start = msgspec.structs.replace(params.coldstart, lora=LORA)
    for seed in (0, 1):
        workspace = tmp_path / str(seed)
        shutil.copytree(base, workspace / "models/raw")
        write_jsonl(workspace / "data/demos.jsonl", CHATS)
        monkeypatch.chdir(workspace)
        coldstart.body(msgspec.structs.replace(params, seed=seed, coldstart=start))
        made[workspace / ".cache/coldstart"] = adapter_fingerprint(workspace / ".cache/coldstart")
    assert len(set(made.values())) == 2
    assert made == {place: adapter_fingerprint(place) for place in made}
    assert not (tmp_path / "cache/coldstart").exists()
