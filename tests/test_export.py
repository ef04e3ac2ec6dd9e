"""An export is one model in every form, or nothing; its card says where it comes from and is safe to render."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragdistill import cli
from ragdistill.commands import promote
from ragdistill.commands.smoke import override
from ragdistill.errors import ConfigError, DataError, IdentityError
from ragdistill.llm import ChatModel, Reply, Sampling, engine_of
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.llm.local import LocalEngine
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.llm.weights import IDENTITY, load_merged, model_fingerprint
from ragdistill.params import ReportParams
from ragdistill.records import (
    EvalEpisode,
    Message,
    SftExample,
    StopReason,
    Trajectory,
    Usage,
    read_json,
    write_json,
    write_jsonl,
)
from ragdistill.report.metrics import compute_metrics
from ragdistill.serving import export as room
from ragdistill.serving import parity
from ragdistill.serving.card import Facts, Licence, escape, licence_of, model_card
from ragdistill.serving.export import Options, Student, export_student
from tests.llm_toys import toy_model, toy_tokenizer
from tests.serving_toys import CHATS, make_adapter, taught_model

import torch  # isort: skip  (after the engine, which prepares the process)

ROOT = Path(__file__).resolve().parents[1]
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def student(base: Path, adapter: Path) -> Student:
    return Student(name="toy", base=base, adapter=adapter)


def opens(base: Path, adapter: Path | None) -> Callable[[], ChatModel]:
    return lambda: LocalEngine(base, adapter, dtype="float32")


def plain_card(rows: Sequence[parity.Row], missing: str) -> str:
    return f"{len(rows)} comparisons {missing}"


def test_every_written_form_is_the_student(student: Student, tmp_path: Path) -> None:
    serve = opens(student.base, student.adapter)
    rows, missing = export_student(student, tmp_path / "out", Options(), CHATS, serve, tmp_path / "cache", plain_card)
    assert missing == "" and len(rows) == 4 and all(r.ok and r.tokens >= 24 for r in rows)
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == ["README.md", "adapter", "gguf", "merged", "parity.json"]
    assert len(read_json(out / "parity.json")["rows"]) == 4
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = parity.load_adapted(student.base, student.adapter)(ids).logits
        got = [
            load_merged(out / "merged", None, torch.float32)(ids).logits,
            parity.load_adapted(student.base, out / "adapter")(ids).logits,
            parity.load_gguf(out / "gguf" / "toy-f16.gguf")(ids).logits,
        ]
        other = load_merged(student.base, None, torch.float32)(ids).logits
    assert [float((g - wanted).abs().max()) < e for g, e in zip(got, (1e-3, 1e-6, 0.1), strict=True)] == [True] * 3
    assert float((other - wanted).abs().max()) > 0.5, "the adapter does something"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_written_and_compared_by_their_choices(
    student: Student, tmp_path: Path, dtype: Any
) -> None:
    options = Options(dtype=dtype, quantisation="q8_0", agreement=0.9)
    serve = opens(student.base, student.adapter)
    rows, missing = export_student(student, tmp_path / "out", options, CHATS, serve, tmp_path / "cache", plain_card)
    assert [r.what.split(" ↔ ")[0] for r in rows] == ["merged float32", f"merged {dtype}", "served by LocalEngine"]
    assert 0 < rows[1].max_difference < 1 and rows[1].base_agreement is None
    assert str(json.loads((tmp_path / "out/merged/config.json").read_text())["dtype"]) == dtype
    assert "Q8_0" in missing, "rows of 48 numbers do not fill blocks of 32"


def test_an_export_holds_two_models_in_float32_at_most(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = weakref.WeakSet[Any](), list[int]()

    def counted(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any) -> Any:
            model = load(*args)
            gc.collect()
            most.append(len(alive | {model}))
            if isinstance(model, torch.nn.Module):
                alive.add(model)
            return model

        return loaded

    monkeypatch.setattr(room, "load_merged", counted(load_merged))
    monkeypatch.setattr(parity, "load_gguf", counted(parity.load_gguf))
    serve = counted(opens(student.base, student.adapter))
    export_student(student, tmp_path / "out", Options(), CHATS, serve, tmp_path / "cache", plain_card)
    assert (len(most), max(most)) == (4, 2), "merged, engine, base, GGUF"


def test_a_server_that_leaves_the_adapter_out_is_refused_and_nothing_is_written(
    student: Student, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="served by LocalEngine") as caught:
        export_student(
            student, tmp_path / "out", Options(), CHATS, opens(student.base, None), tmp_path / "cache", plain_card
        )
    assert "merged float32" not in str(caught.value)
    assert os.listdir(tmp_path) == ["cache"]


def test_an_adapter_left_out_is_found_though_base_and_student_mostly_agree(base: Path, tmp_path: Path) -> None:
    small = make_adapter(base, tmp_path / "small", ["think: I look for a hot mug 2.", "open drawer 1"])
    form = ChatFormat(toy_tokenizer())
    models = parity.load_adapted(base, small), load_merged(base, None, torch.float32)
    engine = LocalEngine(base, None, dtype="float32")
    try:
        row = parity.served("it", engine, form, CHATS, *models, 0.5)
    finally:
        engine.close()
    assert row.base_agreement == 1.0 and 0.5 < row.agreement < 1.0, "agreement alone would let it pass"
    assert not row.ok


def test_merged_weights_that_differ_are_refused(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmerged(base: Path, adapter: Path, dest: Path, name: str) -> None:
        shutil.copytree(base, dest)

    monkeypatch.setattr(room, "save_merged", unmerged)
    with pytest.raises(IdentityError, match="merged float32"):
        export_student(
            student, tmp_path / "out", Options(), CHATS, opens(student.base, student.adapter), tmp_path / "cache",
            plain_card,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_of_other_weights_is_refused(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = room.export_gguf
    monkeypatch.setattr(room, "export_gguf", lambda base, adapter, cache, q: right(base, None, cache, q))
    with pytest.raises(IdentityError, match="GGUF read back"):
        export_student(
            student, tmp_path / "out", Options(agreement=0.0), CHATS, opens(student.base, student.adapter),
            tmp_path / "cache", plain_card,
        )  # fmt: skip


def test_an_adapter_of_another_base_is_refused(student: Student, tmp_path: Path) -> None:
    other = Student(name="toy", base=toy_model(tmp_path / "other", seed=5), adapter=student.adapter)
    with pytest.raises(IdentityError, match="trained on base"):
        export_student(other, tmp_path / "out", Options(), CHATS, opens(other.base, None), tmp_path / "c", plain_card)


def test_an_architecture_without_gguf_is_exported_without_it(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise ConfigError("no llama.")

    monkeypatch.setattr(room, "export_gguf", refuse)
    serve = opens(student.base, student.adapter)
    rows, missing = export_student(student, tmp_path / "out", Options(), CHATS, serve, tmp_path / "c", plain_card)
    assert missing == "no llama." and len(rows) == 2
    assert not (tmp_path / "out/gguf").exists() and "no llama." in (tmp_path / "out/README.md").read_text()


def test_an_earlier_export_is_replaced_and_anything_else_is_not(student: Student, tmp_path: Path) -> None:
    serve, cache, out = opens(student.base, student.adapter), tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no export"):
        export_student(student, out, Options(), CHATS, serve, cache, plain_card)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "parity.json").write_text("{}")
    export_student(student, out, Options(), CHATS, serve, cache, plain_card)
    assert not (out / "thesis.txt").exists() and (out / "merged").is_dir()


def test_a_cut_off_reply_is_scored_without_a_stop_token_it_never_drew(base: Path) -> None:
    form = ChatFormat(toy_tokenizer())
    size = len(form.training_ids([*CHATS[0][:1], Message(role="assistant", content="open it")])[0])
    size -= len(form.prompt_ids(CHATS[0][:1])) + 1  # a line break follows the stop token

    def ends(finish: str, count: int) -> list[parity.Positions]:
        class Says(ScriptedModel):
            async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
                return Reply(text="open it", usage=Usage(completion_tokens=count), finish=finish)

        return asyncio.run(parity._replies(Says(lambda m, s: "", "says"), form, CHATS[:1]))

    assert [p.ids[-1] in form.stop_ids for p in ends("stop", size)] == [True, True]
    assert [p.ids[-1] in form.stop_ids for p in ends("length", size - 1)] == [False, False]
    assert ends("stop", size + 5) == [], "spelt with other tokens"


def test_chats_without_a_reply_are_refused() -> None:
    with pytest.raises(DataError, match="No chat holds an assistant turn"):
        parity.positions(ChatFormat(toy_tokenizer()), [[Message(role="user", content="x")]], 100)


def test_positions_are_bounded_and_inside_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "MAX_POSITIONS", 20)
    found = parity.positions(ChatFormat(toy_tokenizer()), CHATS, 120)
    assert sum(len(p.rows) for p in found) == 20
    assert all(len(p.ids) <= 120 and p.rows[-1] == len(p.ids) - 2 for p in found)


# --- the card


def facts(**changes: Any) -> Facts:
    row = parity.Row(what="a", tokens=3, max_difference=0.0, agreement=1.0, rule="r", ok=True)
    given: dict[str, Any] = {
        "name": "toy", "base": "owner/base@1", "coldstart": True, "licence": Licence("Apache-2.0"), "rows": [row],
        "fingerprints": {"base": "ffff"}, "data": {"tasks": "aaaa"}, "measured": "nowhere.",
    }  # fmt: skip
    return Facts(**(given | changes))


def test_the_card_is_hub_yaml_and_says_what_is_not_known() -> None:
    card = model_card(facts())
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0" and header["base_model"] == "owner/base"
    assert "Not stated: nowhere." in card and "`aaaa`" in card and "`ffff`" in card
    unknown = model_card(facts(licence=Licence(), base="smollm2-135m-instruct"))
    assert "look it up" in unknown and "license" not in yaml.safe_load(unknown.split("---")[1])


def test_hints_cannot_become_markup() -> None:
    evil = "take {object} <script>alert(1)</script> [x](http://e) | `a`\n# Heading ![i](u) &lt;"
    card = model_card(facts(hints={evil: 2}))
    line = next(line for line in card.splitlines() if "alert" in line)
    assert "<script>" not in card and line.endswith("| 2 |") and "# Heading" in line
    assert not any(mark in line.replace("\\" + mark, "") for mark in "`[]{}()")
    assert line.replace("\\|", "").count("|") == 3
    assert escape("a_b") == "a\\_b"


def test_the_licence_comes_from_the_model_that_a_base_was_made_of(tmp_path: Path) -> None:
    raw, base, other = (toy_model(tmp_path / n, seed=i) for i, n in enumerate(("raw", "base", "other")))
    assert licence_of(base, raw) == Licence() == ("unknown", "", "")
    write_json(raw / IDENTITY, {"name": "raw", "licence": "Apache-2.0"})
    assert licence_of(base, raw) == Licence(), "not related"
    write_json(base / IDENTITY, {"name": "coldstart", "base": model_fingerprint(raw)})
    assert licence_of(base, raw) == Licence("Apache-2.0")
    write_json(base / IDENTITY, {"name": "coldstart", "base": model_fingerprint(other)})
    assert licence_of(base, raw) == Licence()


LINK = "https://example.org/LICENSE"


@pytest.mark.parametrize(
    ("head", "stated"),
    [
        ("license: apache-2.0\nlicense_link: " + LINK, Licence("apache-2.0", "", LINK)),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", Licence("other", "own")),
        ("license: [mit, x]", Licence()),
        ('license: "a\\e[31mb"', Licence()),
        (f"license: {'x' * 200}", Licence()),
        ("license: {", Licence()),
        ("- license", Licence()),
        ("license: " + "[" * 5000, Licence()),
        ("tags: [x]", Licence()),
        (None, Licence()),
        (b"\xff", Licence()),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_hub_model_s_own_card_states_its_licence_and_is_no_part_of_its_identity(
    base: Path, tmp_path: Path, head: Any, stated: Licence
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(base, raw)
    if head is not None:
        text = head if isinstance(head, bytes) else f"---\n{head}\n---\n# Model\nlicense: mit\n".encode()
        (raw / "README.md").write_bytes(text)
    made = toy_model(tmp_path / "made", seed=7)
    write_json(made / IDENTITY, {"name": "coldstart", "base": model_fingerprint(raw)})
    assert model_fingerprint(raw) == model_fingerprint(base)
    assert licence_of(raw) == licence_of(made, raw) == stated


def test_the_card_repeats_a_licence_of_the_base_s_own_as_the_hub_wants_it() -> None:
    card = model_card(facts(licence=Licence("other", "<b>own</b>", LINK)))
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["license_name"], header["license_link"]) == ("other", "<b>own</b>", LINK)
    assert f"| other \\(&lt;b&gt;own&lt;/b&gt;, {LINK}\\) |" in card
    assert "license_link" not in yaml.safe_load(model_card(facts()).split("---")[1])


# --- the command


@pytest.fixture
def project(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a pipeline leaves behind, small: a base, a student, its data and its evaluation."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    override(folder / "params.yaml", ["model.engine=reference"])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(promote, "STORE", folder / "mlruns")  # found at import, beside the tests' own params.yaml
    for name in ("DVC_ROOT", "RAGDISTILL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(base, "models/base")
    write_json(Path("models/base") / IDENTITY, {"name": "raw", "licence": "Apache-2.0"})
    shutil.copytree(adapter, "models/students/distilled-0")
    examples = [
        SftExample(id=f"e{i}", messages=tuple(c), task_id="t", trajectory_id=f"t{i}", source="teach", bucket="b")
        for i, c in enumerate(CHATS)
    ]
    write_jsonl(Path("data/sft/distilled.jsonl"), examples)
    shared: dict[str, Any] = {
        "task_id": "t", "policy": "p", "agent": "react", "attempt": 0, "seed": 0, "goal": "g", "bucket": "b",
        "group": "g", "kind": "k", "stop": StopReason.SUCCESS,
    }  # fmt: skip
    taught = [Trajectory(id=f"t{i}", hints=("open {object} first",), **shared) for i in (0, 2)]
    write_jsonl(Path("data/teach/hints.jsonl"), taught)
    played(model="another")
    episodes = [
        EvalEpisode(
            policy=p, seed=0, task_id=f"t{i}", kind="k", bucket="k", group=f"g{i % 3}", success=i > win, score=1.0,
            steps=5, invalid=0, tokens_billed=9, tokens_computed=5, tokens_completion=2, seconds=1.0,
            stop=StopReason.SUCCESS,
        )
        for p, win in (("base", 4), ("distilled", 2)) for i in range(8)
    ]  # fmt: skip
    metrics = compute_metrics(
        episodes, env="alfworld", agent="react", split="test", label="smoke", primary=("k",),
        params=ReportParams(bootstrap=50, confidence=0.95),
    )  # fmt: skip
    write_json(Path("results/metrics.json"), metrics)
    return folder


def played(model: str, won: int = 5, engine: str = "another") -> None:
    """The student's evaluation: 8 games, `won` of them won, by weights and engine of these names."""
    games = [
        Trajectory(
            id=f"x{i}", task_id=f"t{i}", policy="distilled", agent="react", attempt=0, seed=0, goal="g", bucket="b",
            group="g", kind="k", model=model, stop=StopReason.SUCCESS if i < won else StopReason.MAX_STEPS,
            reward=float(i < won),
        )
        for i in range(8)
    ]  # fmt: skip
    write_jsonl(Path("results/eval/distilled-0/trajectories.jsonl"), games)
    write_json(Path("results/eval/distilled-0/engine.json"), {"name": engine})


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ragdistill", "export", *args])
    return cli.main()


@pytest.mark.usefixtures("project")
def test_the_command_prints_the_numbers_and_writes_a_card_with_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "models/students/distilled-0") == 0
    out = capsys.readouterr().out
    assert "merged float32 ↔ adapter" in out and "MISMATCH" not in out and "exports/distilled-0" in out
    card = Path("exports/distilled-0/README.md").read_text()
    assert "**this student** (distilled) | 62.5 [" in card and "distilled − base" in card
    assert "| open \\{object\\} first | 2 |" in card, "the hints of the games it learned from, counted"
    assert "another engine or build" in card and "Apache-2.0" in card
    value = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == 0.625


@pytest.mark.usefixtures("project")
def test_numbers_of_other_weights_are_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that the report has not seen, and one of a student that was trained again since."""

    def card() -> str:
        assert run(monkeypatch, "models/students/distilled-0") == 0
        return Path("exports/distilled-0/README.md").read_text()

    played(model="another", won=0)
    assert "62.5" not in (said := card()) and "not of its present evaluation" in said and "model-index" not in said
    engine = engine_of(LocalEngine(Path("models/base"), reference=True))
    played(model="another")
    write_json(Path("results/eval/distilled-0/engine.json"), engine)
    assert "62.5" not in (said := card()) and "trained again" in said and "model-index" not in said


def test_a_student_of_several_trainings_is_not_their_mean() -> None:
    """`success` of a policy is pooled; the card is of one of them."""
    episodes = [
        EvalEpisode(
            policy=p, seed=s, task_id=f"t{i}", kind="k", bucket="k", group="g", success=i >= lost, score=1.0,
            steps=5, invalid=0, tokens_billed=9, tokens_computed=5, tokens_completion=2, seconds=1.0,
            stop=StopReason.SUCCESS,
        )
        for p, s, lost in (("base", 0, 8), ("distilled", 0, 2), ("distilled", 1, 6)) for i in range(8)
    ]  # fmt: skip
    params = ReportParams(bootstrap=50, confidence=0.95)
    named = {"env": "alfworld", "agent": "react", "split": "test", "label": "smoke"}
    metrics = compute_metrics(episodes, primary=("k",), params=params, **named)
    card = model_card(facts(metrics=metrics, run="distilled-1", measured="Measured."))
    assert "**this student** (distilled-1) | 25.0 | 25.0 | 8 |" in card
    assert "| distilled, mean of 2 trainings | 50.0 [" in card
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25


@pytest.mark.parametrize(
    ("cut", "written"),
    [
        ({"type": "ByteLevel", "use_regex": True}, True),
        ({"type": "Sequence", "pretokenizers": [DIGITS, {"type": "ByteLevel"}]}, True),
        ({"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel", "use_regex": False}]}, False),
        ({"type": "Metaspace"}, False),
        (None, False),
    ],
    ids=["gpt2", "smollm", "llama3", "sentencepiece", "none"],
)
def test_a_tokenizer_that_gguf_would_misname_has_no_file(cut: Any, written: bool, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {"pre_tokenizer": cut})
    assert room._splits_as_gguf_says(tmp_path) is written


@pytest.mark.usefixtures("project")
def test_numbers_of_another_student_are_not_claimed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(base, Path("elsewhere"), ["look", "look"])
    shutil.copy(Path("models/students/distilled-0/base_identity.json"), "elsewhere")
    assert run(monkeypatch, "elsewhere", "--out", "there") == 0
    card = Path("there/README.md").read_text()
    assert "62.5" not in card and "none of the project's present ones" in card and "model-index" not in card


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("models/base",), "is no student"),
        (("nowhere",), "is no student"),
        (("champion",), "run `dvc repro track` first"),
    ],
)
def test_what_is_no_student_is_one_sentence(
    args: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *args) == 1
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1 and not Path("exports").exists()
