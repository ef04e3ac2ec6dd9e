"""The benchmarks compare like with like: their baselines do what transformers and TRL do, and their shares add up."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from ragdistill.agents import make_agent
from ragdistill.errors import ConfigError
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import AgentParams
from ragdistill.records import Message, Step, StopReason, Trajectory
from ragdistill.rollout import Setting
from tests.llm_toys import toy_model

ROOT = Path(__file__).resolve().parents[1]
GREEDY = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        importlib.import_module("rollout_speed")
        return importlib.import_module("plain_models")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"))


def chats() -> list[list[Message]]:
    """Conversations of different lengths, so that a batch needs padding."""
    return [[Message(role="user", content=f"You see drawer {n}. " * (1 + 3 * n))] for n in range(4)]


def ask(model, prompts: Sequence[Sequence[Message]], together: bool) -> list[Reply]:
    async def run() -> list[Reply]:
        calls = [model.chat(chat, GREEDY, str(n)) for n, chat in enumerate(prompts)]
        return list(await asyncio.gather(*calls)) if together else [await call for call in calls]

    return asyncio.run(run())


def test_a_padded_batch_says_what_each_prompt_says_alone(plain: ModuleType, model_dir: Path) -> None:
    batched, widths = plain.BatchedModel(model_dir), []
    generate = batched.generate

    def counted(prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        widths.append(len(prompts))
        return generate(prompts, limits)

    batched.generate = counted
    alone, crowd = (ask(model, chats(), model is batched) for model in (plain.PlainModel(model_dir), batched))
    assert [r.text for r in alone] == [r.text for r in crowd]
    assert [r.usage for r in alone] == [r.usage for r in crowd]
    assert len({r.text for r in alone}) > 1, "else equality says nothing"
    assert widths == [4], "one batch"


def test_a_batch_waits_for_those_that_run_and_not_for_those_that_have_ended(plain: ModuleType, model_dir: Path) -> None:
    async def run() -> list[str]:
        model, order = plain.BatchedModel(model_dir), []
        chat = chats()[0]
        await model.chat(chat, GREEDY, "one")

        async def second() -> None:
            await model.chat(chat, GREEDY, "two")
            order.append("answered")

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.2)
        order.append("one ends")
        await model.forget("one")
        await waiting
        return order

    assert asyncio.run(run()) == ["one ends", "answered"]


def test_the_baselines_refuse_what_they_would_do_wrong(plain: ModuleType, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="greedy"):
        asyncio.run(plain.PlainModel(model_dir).chat(chats()[0], Sampling(temperature=0.7)))


def test_overlapping_time_counts_once_and_the_engine_goes_first(
    plain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(plain.time, "perf_counter", lambda: now)
    clock = plain.Clock(since=0.0)
    now = 1.0
    with clock.during("environment"):
        now = 3.0
        with clock.during("engine"), clock.during("engine"):
            now = 7.0
        now = 8.0
    now = 8.5
    clock.advance()
    assert clock.seconds == {"elsewhere": 1.5, "environment": 3.0, "engine": 4.0}


def test_agreement_counts_the_turns_that_led_to_an_action(plain: ModuleType) -> None:
    speed = importlib.import_module("rollout_speed")
    seen: list[int] = []

    def answer(messages: Sequence[Message], _: Sampling) -> str:
        seen.append(len(messages))
        return "Thought: again.\nAction: look"

    def step(action: str) -> Step:
        return Step(reply=f"Action: {action}", thought="", action=action, observation="You see a mug.")

    played = Trajectory(
        id="t", task_id="t", policy="a", agent="react", attempt=0, seed=0, goal="g", bucket="b", group="r", kind="k",
        first_observation="A room.", steps=(step("look"), step(""), step("open drawer 1")), stop=StopReason.MAX_STEPS,
    )  # fmt: skip
    assert asyncio.run(speed.agree(ScriptedModel(answer, "look"), short(), played)) == (1, 2)
    assert seen == [2, 6], "each on its whole history"


def short() -> Setting:
    """Greedy play of three steps."""
    limits = AgentParams(
        name="react", context_tokens=500, max_reply_tokens=20, loop_limit=4, no_action_limit=4, examples=0
    )
    return Setting(
        policy="a", run="r", agent=make_agent("react"), limits=limits, max_steps=3, temperature=0.0, environment="",
        model="",
    )  # fmt: skip


def benchmark(where: Path, *options: str) -> list[list[str]]:
    """Cells of the table that it prints, and at the end its other lines."""
    (where / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "RAGDISTILL_"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/rollout_speed.py"), "--concurrency", "2", *options], cwd=where,
        env=env | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(where.glob(".cache/benchmark.*")), "the games are gone again"
    table, said = [], []
    for line in done.stdout.splitlines():
        (table if line.startswith("| ") else said).append(line)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return [*rows[2:], ["\n".join(said)]]


@pytest.mark.slow
def test_growth_is_measured_on_real_games(tmp_path: Path) -> None:
    *rows, _ = benchmark(tmp_path, "--scripted", "--growth", "1,6", "--games", "2", "--max-steps", "4")
    assert [(int(row[0]), float(row[3])) for row in rows] == [(1, 4.0), (6, 4.0)]
    assert all(float(cell) > 0 for row in rows for cell in row[1:6])
    assert int(rows[1][6]) >= 2, "the workers' replacement is part of what is measured"
    assert all(float(cell) > 0 for row in rows for cell in row[8].split(", "))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_plays_the_same_games_and_the_float32_ones_alike(tmp_path: Path, model_dir: Path) -> None:
    longer = shutil.copytree(model_dir, tmp_path / "longer")  # a game's first observation alone fills 1,024 bytes
    config = (longer / "config.json").read_text()
    (longer / "config.json").write_text(
        config.replace('"max_position_embeddings": 1024', '"max_position_embeddings": 4096')
    )
    *rows, (last,) = benchmark(
        tmp_path,
        "--model",
        str(longer),
        "--modes",
        "abcdef",
        "--episodes",
        "2",
        "--max-steps",
        "2",
        "--turns",
        "3",
        "--batches",
        "1",
    )
    assert len({row[0] for row in rows}) == 6
    assert [row[1] for row in rows] == ["3 turns", "1 batches", *["2"] * 4]
    assert rows[0][5:7] == ["1.0", "1.0"], "a against itself"
    shares = [sum(int(cell.split()[0]) for cell in row[9:12]) for row in rows]
    assert all(99 <= share <= 101 for share in shares), shares
    assert "a answered 3 of d's 4 turns" in last and "its action was d's in 3 of 3" in last
    assert "b answered 2 of d's 4 turns" in last and "its action was d's in 2 of 2" in last
    assert "in none of 0 turns with an action (2 episodes" in last, "random weights say no action"
    assert "on the same 2 games: +0.0 points" in last


def test_a_slow_engine_s_speed_is_that_of_turns_drawn_from_all_episodes(plain: ModuleType) -> None:
    speed, tables = importlib.import_module("rollout_speed"), importlib.import_module("rollout_tables")
    steps = tuple(Step(reply="Action: look", thought="", action="look", observation="You see a mug.") for _ in range(5))
    played = Trajectory(
        id="t", task_id="t", policy="d", agent="react", attempt=0, seed=0, goal="g", bucket="b", group="r", kind="k",
        first_observation="A room.", steps=steps, stop=StopReason.SUCCESS,
    )  # fmt: skip
    asked: list[int] = []

    def answer(messages: Sequence[Message], _: Sampling) -> str:
        asked.append(len(messages))
        return "Action: look" if len(asked) % 2 else "Action: jump"

    job = speed.Job("a", None, (), 2, 3, 1, 9, histories=(played, played), turns=4)
    found = asyncio.run(speed.alone(ScriptedModel(answer, "look"), short(), job))
    assert len(asked) == len(found.alone) == 4 and len(set(asked)) > 1, "different turns, each on its history"
    assert sum(equal for equal, _ in found.agreement) == 2
    assert found.seconds == pytest.approx(sum(found.alone) / 4 * 10) and found.steps == 10
    assert isinstance(found, tables.Measured)


def test_a_lock_step_s_speed_is_that_of_batches_of_all_who_got_so_far(plain: ModuleType) -> None:
    speed = importlib.import_module("rollout_speed")
    step = Step(reply="Action: look", thought="", action="look", observation="You see a mug.")
    lengths = {"short": 1, "middle": 4, "long": 4}
    played = [
        Trajectory(
            id=name,
            task_id=name,
            policy="d",
            agent="react",
            attempt=0,
            seed=0,
            goal="g",
            bucket="b",
            group="r",
            kind="k",
            first_observation="A room.",
            steps=(step,) * count,
            stop=StopReason.SUCCESS,
        )
        for name, count in lengths.items()
    ]
    batches: list[list[int]] = []

    class Recording(plain.BatchedModel):
        def __init__(self) -> None:
            self._alive, self._waiting, self._batch = set(), [], None
            self._format = self

        def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
            return [len(messages)]

        def generate(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
            batches.append([p[0] for p in prompts])
            return [[1] for _ in prompts]

        stop_ids = frozenset({0})

        def decode(self, ids: list[int]) -> str:
            return "Action: look"

    job = speed.Job("b", None, (), 3, 4, 2, 9, histories=tuple(played), turns=2)
    found = asyncio.run(speed.together(Recording(), short(), job))
    assert batches == [[4, 4], [8, 8]], "turns 1 and 3 of 4, of those who got there, at most two at once"
    assert found.seconds == pytest.approx(sum(found.alone) / 2 * 4)
    assert found.agreement == ((1, 1),) * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_is_compared_with_trl_on_the_same_tokens_at_equal_loss(tmp_path: Path, model_dir: Path) -> None:
    from ragdistill.records import SftExample, write_jsonl

    def chat(name: str, turns: int) -> SftExample:
        said = [Message(role="system", content="Play.")]
        for i in range(turns):
            said += [
                Message(role="user", content=f"{name} {i}?"),
                Message(role="assistant", content=f"take {name} {i}"),
            ]
        return SftExample(id=name, messages=tuple(said), task_id="t", trajectory_id=name, source="base", bucket="b")

    names = ("mug", "book", "lamp", "pan", "knife", "bowl")
    write_jsonl(tmp_path / "chats.jsonl", [chat(name, 2 + i % 3) for i, name in enumerate(names)])
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/sft_speed.py"), "--model", str(model_dir), "--data", "chats.jsonl",
         "--chats", "4", "--held-out", "2", "--rounds", "1", "--epochs", "3"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert head[0] == "trainer" and [row[0] for row in rows] == [
        "this project", "TRL, its defaults", "TRL, weights as ours",
    ]  # fmt: skip
    assert all(float(row[1]) > 0 and 0.1 < float(row[5]) < 8 for row in rows) and rows[1][3] == "1.00"
    before = float(done.stdout.partition("before training: ")[2].split()[0].rstrip("."))
    ours, trl, _ = (float(row[4]) for row in rows)
    assert trl < before - 0.1 and ours == pytest.approx(trl, abs=0.1 * (before - trl)), (
        "the same steps on the same data"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_toy_of_training_at_scale_prints_the_table_of_the_real_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/sft_scale.py"), "--toy", "--steps", "2"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert head == ["rows", "tokens at once", "tokens/s", "MFU %", "peak memory GB", "s a step", "padding %"]
    kinds = ["padded, sdpa", "padded, sdpa, recomputed", "packed, sdpa", "packed, sdpa, recomputed"]
    assert [row[0] for row in rows] == kinds
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[1:6])
    assert all(float(row[3]) < 100 for row in rows)
    assert int(rows[0][6]) >= int(rows[2][6]), "packing pads less"


def test_flops_of_a_token_are_counted_as_the_docstring_says() -> None:
    """By hand for a model small enough: one layer of width 4, 8 hidden, vocabulary 10, adapter of rank 1."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ragdistill.training.encode import IGNORE, Corpus, Encoded

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        scale = importlib.import_module("sft_scale")
    config = LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=1, target_modules="all-linear"))
    corpus = Corpus([Encoded([1] * 2, [IGNORE, 1]), Encoded([1] * 6, [IGNORE] * 5 + [1])], 0)
    weights = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8  # q and o, k and v, gate, up and down
    adapter = 2 * (4 + 4) + 2 * (4 + 2) + 3 * (4 + 8)
    attention = 12 * 1 * 2 * 2 * (2 * 2 + 6 * 6) / 8
    assert scale.flops_per_token(model, corpus) == 4 * weights + 6 * adapter + 4 * 2 / 8 * 4 * 10 + attention


def test_the_shop_s_first_build_is_measured_even_where_the_catalogue_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("RAGDISTILL_WEBSHOP_DATA", raising=False)
    speed, trial = importlib.import_module("webshop_speed"), argparse.Namespace(large=0, episodes=2, queries=2)
    for _ in range(2):
        speed.measure(trial, tmp_path / "cache", tmp_path)
        found = re.search(r"\| first build, 1,200 products \| (\S+) s CPU \|", capsys.readouterr().out)
        assert found and float(found[1]) > 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_command_s_memory_counts_its_children_and_its_failure_is_told(tmp_path: Path) -> None:
    def ran(code: str) -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable,
            str(ROOT / "benchmarks/pipeline_speed.py"),
            "--run",
            f"{sys.executable} {tmp_path / code}",
        ]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    held = "held = bytearray(b'1') * 400_000_000; import time; time.sleep(2)"
    (tmp_path / "parent.py").write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    done = ran("parent.py")
    found = re.search(r"at most (\S+) GB", done.stdout)
    assert found and 0.4 <= float(found[1]) < 0.6, done.stdout + done.stderr
    assert ran("fails.py").returncode == 3
