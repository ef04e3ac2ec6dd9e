"""Training at scale: packing, checkpointing and several processes change speed and memory, and no result."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from ragdistill import profiles
from ragdistill.errors import ConfigError, DataError
from ragdistill.llm import weights
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.params import LoraParams, RecipeParams, TrainingParams, load_params
from ragdistill.training import encode, hardware, launch, memory, once, share, worker
from ragdistill.training.encode import IGNORE, OURS
from tests.test_training import CHATS, LORA, example, gradients, make_base, trainer_for

ROOT = Path(__file__).resolve().parents[1]
MANY = [*CHATS, *(example(f"x{i}", 1 + i % 4) for i in range(5))]
SEVEN = MANY[:7]
"""In batches of three: one of two processes gets a second micro-batch, and of the last example one gets nothing."""
MICRO = 128
SCALED = msgspec.structs.replace(LORA, epochs=4, batch=3, max_tokens=512)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny", 0)


def training(**changed: object) -> TrainingParams:
    return msgspec.structs.replace(hardware.AUTO, **changed)


def rows(base: Path, chats: list[Any], recipe: RecipeParams = OURS) -> list[dict[str, list[int]]]:
    corpus = encode.encode(chats, ChatFormat(load_tokenizer(base)), 512, recipe)
    return [{"input_ids": row.ids, "labels": row.labels} for row in corpus.rows]


def float32(base: Path, lora: LoraParams = SCALED, **changed: object) -> hardware.Plan:
    return msgspec.structs.replace(hardware.plan(training(**changed), base, lora), precision=torch.float32)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any(float(g.abs().max()) > 0.01 for g in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4)


def test_the_shipped_parameters_are_the_plain_training_on_a_cpu(base: Path) -> None:
    assert load_params(ROOT / "params.yaml").training == hardware.AUTO
    if not torch.cuda.is_available():
        assert hardware.processes(hardware.AUTO) == 1
        how = hardware.plan(hardware.AUTO, base, LORA)
        assert (how.packing, how.checkpointing, how.micro_tokens) == (False, False, 2048)


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_examples_in_one_row_learn_what_they_learn_alone(base: Path, tmp_path: Path, loss: Any) -> None:
    data = rows(base, MANY, msgspec.structs.replace(OURS, loss=loss))
    plain = trainer_for(base, MANY, SCALED, tmp_path / "a", plan=float32(base))
    packed = trainer_for(base, MANY, SCALED, tmp_path / "b", plan=float32(base, packing=True))
    together = share.Packer(700, 0)(data)
    assert 1 < len(together["micro"]) < len(data) - 3 and max(m["input_ids"].shape[1] for m in together["micro"]) <= 704
    apart = encode.Collator(64, 0)(data)
    assert len(apart["micro"]) == len(data) and {k: together[k] for k in ("tokens", "trained")} == {
        k: apart[k] for k in ("tokens", "trained")
    }
    loss_apart, grads_apart = gradients(plain, apart)
    loss_together, grads_together = gradients(packed, together)
    assert loss_together == pytest.approx(loss_apart, abs=1e-5)
    close(grads_together, grads_apart)


def test_without_positions_packed_examples_would_see_each_other(base: Path, tmp_path: Path) -> None:
    """What the equality above stands on: the same rows as one text are another loss."""
    packed = trainer_for(base, MANY, SCALED, tmp_path, plan=float32(base, packing=True))
    together = share.Packer(700, 0)(rows(base, MANY))
    right, _ = gradients(packed, together)
    for micro in together["micro"]:
        del micro["position_ids"]
    assert abs(gradients(packed, together)[0] - right) > 1e-3


def test_checkpointed_layers_give_the_same_loss_and_gradients_with_dropout(base: Path, tmp_path: Path) -> None:
    lora = msgspec.structs.replace(SCALED, dropout=0.3)
    found = []
    for name, on in (("kept", False), ("recomputed", True)):
        built = trainer_for(base, MANY, lora, tmp_path / name, plan=float32(base, lora, checkpointing=on))
        if built.args.activation_checkpointing:  # as `Trainer.train` does first of all
            options = built.args.activation_checkpointing_kwargs
            built.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        inner, runs = built.model.get_base_model().model, []
        inner.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        found.append((*gradients(built, encode.Collator(2048, 0)(rows(base, MANY))), len(runs)))
    (loss, grads, once_run), (loss_again, grads_again, twice_run) = found
    assert twice_run == 2 * once_run, "the layer is computed again in the backward"
    assert loss_again == loss
    close(grads_again, grads)


def test_shares_hold_every_example_once_and_about_as_many_tokens(base: Path) -> None:
    data = rows(base, MANY)
    for world in (2, 3, 4):
        parts = share.shares(data, world)
        assert sorted(str(row) for part in parts for row in part) == sorted(map(str, data))
        loads = [sum(len(r["input_ids"]) for r in part) for part in parts]
        assert max(loads) - min(loads) <= max(len(r["input_ids"]) for r in data)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world", [2, 5])
def test_the_processes_gradients_add_up_to_those_of_one(base: Path, tmp_path: Path, packing: bool, world: int) -> None:
    """The third of the five gets nothing of three examples, and still as many micro-batches as the others."""
    data = rows(base, MANY[2:5])
    built = trainer_for(base, MANY, SCALED, tmp_path, plan=float32(base, packing=True))
    whole_loss, whole = gradients(built, share.Packer(4096, 0)(data))
    cut = share.Packer(256, 0) if packing else encode.Collator(256, 0)
    parts = [share.Share(cut, rank, world)(data) for rank in range(world)]
    assert len({len(part["micro"]) for part in parts}) == 1
    assert len({(part["tokens"], part["trained"]) for part in parts}) == 1
    learnt = sum(int((m["labels"][:, 1:] != IGNORE).sum()) for part in parts for m in part["micro"])
    assert learnt == parts[0]["trained"]
    each = [gradients(built, part) for part in parts]
    assert sum(loss for loss, _ in each) == pytest.approx(whole_loss, abs=1e-5)
    close({n: sum(g[n] for _, g in each) for n in whole}, whole)  # pyright: ignore[reportArgumentType]


def test_the_trainings_below_have_micro_batches_to_wait_for_and_empty_shares(base: Path) -> None:
    """What they stand on: gradients are synchronised after a process's last micro-batch only."""
    data = rows(base, SEVEN)
    for at, expected in ((0, [2, 1]), (3, [2, 1]), (6, [1, 0])):
        parts = share.shares(data[at : at + SCALED.batch], 2)
        assert sorted((len(encode.Collator(MICRO, 0)(p)["micro"]) if p else 0 for p in parts), reverse=True) == expected
        each = [share.Share(encode.Collator(MICRO, 0), rank, 2)(data[at : at + SCALED.batch]) for rank in (0, 1)]
        assert [len(part["micro"]) for part in each] == [expected[0]] * 2, "the other process waits with empty ones"


@pytest.mark.parametrize(
    ("changed", "device", "flash", "expected"),
    [
        ({}, "cuda", True, ("flash_attention_2", True)),
        ({}, "cuda", False, ("sdpa", False)),
        ({"packing": False}, "cuda", True, ("flash_attention_2", False)),
        ({"packing": True}, "cuda", False, ("sdpa", True)),
        ({"attention": "sdpa"}, "cuda", True, ("sdpa", False)),
        ({}, "cpu", True, ("causal_blocks", False)),
        ({"packing": True}, "cpu", False, ("sdpa", True)),
    ],
    ids=str,
)
def test_packing_goes_with_attention_that_keeps_examples_apart(
    base: Path, changed: dict[str, Any], device: str, flash: bool, expected: tuple[str, bool]
) -> None:
    config = memory.architecture(str(base))
    assert hardware.attention_and_packing(training(**changed), config, device, flash) == expected


def test_what_the_machine_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    flash, config = training(attention="flash_attention_2"), memory.architecture(str(base))
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        hardware.attention_and_packing(flash, config, "cpu", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert hardware.processes(training(launch="fsdp")) == 1
    assert hardware.processes(training(processes=2)) == 2
    with pytest.raises(ConfigError, match="needs GPUs"):
        hardware.processes(training(launch="fsdp", processes=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [hardware.processes(training(launch=name)) for name in ("auto", "one", "fsdp")] == [4, 1, 4]
    assert hardware.processes(training(), "nf4") == 4
    with pytest.raises(ConfigError, match="4 GPUs are visible"):
        hardware.processes(training(processes=5))
    with pytest.raises(ConfigError, match="shards no base in 4 bits"):
        hardware.processes(training(launch="fsdp"), "nf4")
    monkeypatch.setattr(hardware, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="deepspeed, which is not installed"):
        hardware.processes(training(launch="deepspeed"))


def test_a_base_of_any_size_can_be_planned_on_a_gpu(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """Its memory is estimated there, on a copy of a 16th of its width: of this one that is no head at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [SimpleNamespace(total_memory=n * 10**9) for n in (80, 24)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    how = hardware.plan(hardware.AUTO, base, LORA)
    assert (how.device, how.attention, how.checkpointing) == ("cuda", "sdpa", False)


def test_a_gpu_gets_smaller_micro_batches_first_and_layers_computed_twice_where_that_does_not_do() -> None:
    p = profiles.overlaid("paper-alfworld-7b-react", ROOT / "params.yaml", ROOT / "profiles")
    args = (p.model.base, p.sft.lora, p.sft.recipe.quantize)
    found = {gb: hardware.fitting(gb * 10**9, *args, 5000, "auto") for gb in (300, 80, 24, 4)}
    most = hardware.MICRO_TOKENS["cuda"]
    assert found[300] == (False, most)
    recomputed, tokens = found[80]
    assert not recomputed and 5000 <= tokens < most and tokens % encode.BUCKET == 0
    assert memory.estimate(*args, tokens).total <= hardware.HEADROOM * 80e9
    assert found[24][0] and found[24][1] >= 5000
    assert found[4] == (True, encode.padded(5000)), "tried all the same"
    assert hardware.fitting(80 * 10**9, *args, 12000, "auto")[0], "the longest example decides"
    assert not hardware.fitting(24 * 10**9, *args, 5000, False)[0] and hardware.fitting(300 * 10**9, *args, 9, True)[0]


def test_a_launch_without_anything_to_shard_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once.train_once(CHATS, base, tmp_path / "out", LORA, 0, tmp_path / "cache", 3, training=training(launch="fsdp"))
    assert "training.launch is fsdp, which needs several GPUs" in capsys.readouterr().err
    assert not any(hardware.unheeded(training(launch=how), n) for how, n in (("auto", 1), ("one", 1), ("fsdp", 2)))


def test_a_launcher_that_does_not_end_is_killed_and_ctrl_c_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    stubborn = [sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"]
    monkeypatch.setattr(launch, "command", lambda *_: stubborn)
    monkeypatch.setattr(launch, "_GRACE", 0.2)
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(launch.subprocess, "Popen", Noted)
    job = worker.Job(
        examples=[], base=str(base), out=str(tmp_path), lora=LORA, seed=0, checkpoints="", every=1, recipe=OURS,
        training=training(), label="",
    )  # fmt: skip
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launch.train_together(job, 2, False)
    assert started[0].returncode == -signal.SIGKILL


def test_a_designed_error_of_any_process_is_left_beside_the_job(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    """And without a launcher it is the only process."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "1")
    job = worker.Job(
        examples=MANY, base=str(base), out=str(tmp_path / "out"), lora=msgspec.structs.replace(SCALED, max_tokens=40),
        seed=0, checkpoints=str(tmp_path / "c"), every=1, recipe=OURS, training=training(), label="",
    )  # fmt: skip
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(job))
    assert worker.work(tmp_path / "job.json") == 1
    assert msgspec.json.decode((tmp_path / worker.FAILURE).read_bytes())["kind"] == "DataError"


def launcher(name: str) -> Any:
    """accelerate's own reading of a shipped file, as `accelerate launch` has it before it starts processes."""
    from accelerate.commands import launch as accelerate

    made = launch.command(training(launch=name), 4, Path("job.json"))
    arguments, *_ = accelerate._validate_launch_command(accelerate.launch_command_parser().parse_args(made[3:]))
    return arguments


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_root")
def test_accelerate_reads_the_shipped_files_as_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    ddp, fsdp, deep = (launcher(name) for name in ("auto", "fsdp", "deepspeed"))
    assert (ddp.multi_gpu, fsdp.use_fsdp, deep.use_deepspeed) == (True, True, True)
    assert {a.num_processes for a in (ddp, fsdp, deep)} == {4}
    assert (ddp.mixed_precision, fsdp.mixed_precision, deep.mixed_precision) == ("no", "no", "bf16")
    assert "ACCELERATE_USE_FSDP" not in prepare_multi_gpu_env(ddp)
    for name, value in prepare_multi_gpu_env(fsdp).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert "SHARDED" in str(plugin.state_dict_type) and plugin.auto_wrap_policy is not None
    monkeypatch.setattr(deep, "deepspeed_fields_from_accelerate_config", "zero_stage", raising=False)
    _, env = prepare_deepspeed_cmd_env(deep)
    asked = {n: env[f"ACCELERATE_{n}"] for n in ("DEEPSPEED_ZERO_STAGE", "GRADIENT_CLIPPING", "USE_DEEPSPEED")}
    assert asked == {"DEEPSPEED_ZERO_STAGE": "2", "GRADIENT_CLIPPING": "1.0", "USE_DEEPSPEED": "true"}


@pytest.mark.usefixtures("at_root")
def test_deepspeeds_settings_agree_with_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file alone: DeepSpeed itself is not installed and was not run."""
    import yaml

    settings = yaml.safe_load((launch.CONFIGS / "deepspeed.yaml").read_text())["deepspeed_config"]
    assert settings["gradient_accumulation_steps"] == 1 and settings["zero_stage"] == 2
    assert settings["gradient_clipping"] == 1.0
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match=r"deepspeed.yaml is not there"):
        launch.command(training(launch="deepspeed"), 2, Path("job.json"))


def curve(adapter: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((adapter / "loss.csv").open())]


TRAIN = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    import msgspec, torch
    from ragdistill.training import hardware, launch, once
    from tests.scale_worker import prepare
    from tests.test_training_scale import SCALED, SEVEN, training
    prepare()
    launch.WORKER = "tests.scale_worker"
    base, out, cache, count, dropout = sys.argv[1:]
    if "RAGDISTILL_TEST_FSDP" in os.environ:
        torch.cuda.device_count = lambda: 2
        together = once.train_together
        once.train_together = lambda job, count, gpus: together(job, count, False)
    lora = msgspec.structs.replace(SCALED, dropout=float(dropout))
    once.train_once(SEVEN, Path(base), Path(out), lora, 3, Path(cache), 3,
                    training=training(processes=int(count), launch=os.environ.get("RAGDISTILL_TEST_FSDP", "auto")))
""")


def start(base: Path, out: Path, count: int, dropout: float = 0.0, **env: str) -> subprocess.Popen[bytes]:
    """One stage's training in `count` processes, as the leader of a process group."""
    given = [str(base), str(out), str(out.with_name(f"{out.name}-cache")), str(count), str(dropout)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAGDISTILL_", "ACCELERATE_", "FSDP_"))}
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    settings = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *given], cwd=ROOT, env=clean | settings | env, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=(out.with_name(f"{out.name}.log")).open("wb"),
    )  # fmt: skip


def finish(run: subprocess.Popen[bytes], out: Path) -> None:
    assert run.wait(timeout=500) == 0, out.with_name(f"{out.name}.log").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_have_the_loss_curve_of_one_and_write_one_adapter(base: Path, tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 2)):
        finish(start(base, tmp_path / name, count), tmp_path / name)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 12 and one[-1] < one[0] / 2
    assert two == pytest.approx(one, abs=2e-4)
    files = {p.name for p in (tmp_path / "one").iterdir()}
    assert {p.name for p in (tmp_path / "two").iterdir()} == files
    assert [p.name for p in (tmp_path / "two-cache/adapters").iterdir()] == [
        p.name for p in (tmp_path / "one-cache/adapters").iterdir()
    ], "the same address"
    assert not list((tmp_path / "two-cache/checkpoints").iterdir())
    same_weights(tmp_path / "two", tmp_path / "one")
    result = msgspec.json.decode((tmp_path / "two/training.json").read_bytes())
    assert result["scale"] == {"processes": 2}
    weights.check_adapter(base, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_base_sharded_by_fsdp_has_the_same_loss_curve_and_the_same_adapter(base: Path, tmp_path: Path) -> None:
    """FSDP2 as configs/accelerate/fsdp.yaml has it, on gloo, which accelerate is told to be a GPU's."""
    finish(start(base, tmp_path / "one", 1), tmp_path / "one")
    finish(start(base, tmp_path / "sharded", 2, RAGDISTILL_TEST_FSDP="fsdp"), tmp_path / "sharded")
    assert curve(tmp_path / "sharded") == pytest.approx(curve(tmp_path / "one"), abs=2e-4)
    result = msgspec.json.decode((tmp_path / "sharded/training.json").read_bytes())
    assert result["scale"] == {"processes": 2, "sharding": "fsdp"}
    same_weights(tmp_path / "sharded", tmp_path / "one")


def same_weights(found: Path, expected: Path) -> None:
    from safetensors.torch import load_file

    a, b = (load_file(path / "adapter_model.safetensors") for path in (found, expected))
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in b)
    assert all(torch.allclose(a[n], b[n], atol=2e-3) for n in b)


def workers(job_folder: str) -> list[int]:
    """Processes that train, by their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if b"tests.scale_worker" in line and job_folder.encode() in line:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("victims", "then", "dropout", "env"),
    [
        ("group", 2, 0.1, {}),
        ("interrupted", 1, 0.0, {}),
        ("stage", 2, 0.1, {"RAGDISTILL_TEST_FSDP": "fsdp", "RAGDISTILL_TEST_DTYPE": "bfloat16"}),
    ],
    ids=["data-parallel", "in-one-process-then", "fsdp-bfloat16"],
)
def test_killed_processes_resume_to_the_same_curve(
    base: Path, tmp_path: Path, victims: str, then: int, dropout: float, env: dict[str, str]
) -> None:
    """Bit by bit in as many processes, within rounding in another number of them."""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    out, whole = tmp_path / "killed", tmp_path / "whole"
    leader = start(base, out, 2, dropout, RAGDISTILL_TEST_SLOW_FROM="7", TMPDIR=str(tmp), **env)
    deadline = time.monotonic() + 400
    while not list(tmp_path.glob("killed-cache/checkpoints/*/checkpoint-6/complete")):
        assert leader.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.05)
    assert len(workers(str(tmp))) >= 2
    strike = signal.SIGINT if victims == "interrupted" else signal.SIGKILL
    (os.killpg if victims == "group" else os.kill)(leader.pid, strike)
    leader.wait()
    log = out.with_name("killed.log").read_text()
    assert strike == signal.SIGKILL or log.rstrip().endswith("run again to go on."), log[-2000:]
    while workers(str(tmp)):
        assert time.monotonic() < deadline, "processes train on without their stage"
        time.sleep(0.1)
    (kept,) = tmp_path.glob("killed-cache/checkpoints/*/checkpoint-6")
    assert {p.name for p in kept.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not out.exists() and not list(tmp_path.glob("killed-cache/adapters/*"))
    finish(start(base, out, then, dropout, **env), out)
    assert "step 1/" not in out.with_name("killed.log").read_text(), "it went on"
    finish(start(base, whole, 2, dropout, **env), whole)
    assert curve(whole)[-1] < curve(whole)[0] / 2
    if then == 2:
        assert curve(out) == curve(whole)
        assert weights.adapter_fingerprint(out) == weights.adapter_fingerprint(whole)
    assert curve(out) == pytest.approx(curve(whole), abs=2e-4)
    same_weights(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_designed_error_in_a_process_is_the_stages(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    short = msgspec.structs.replace(SCALED, max_tokens=40)
    with pytest.raises(DataError, match="9 of 9 training examples exceed 40 tokens"):
        once.train_once(MANY, base, tmp_path / "out", short, 0, tmp_path / "cache", 3, training=training(processes=2))
