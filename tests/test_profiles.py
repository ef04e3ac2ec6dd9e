"""Profiles: complete, valid, no trace of the one before; and this machine can train each paper profile, narrowed."""

from __future__ import annotations

import math
import re
import shutil
from itertools import product
from pathlib import Path

import msgspec
import pytest
import torch
import yaml

from ragdistill import profiles
from ragdistill.commands.memory import show_memory
from ragdistill.commands.smoke import override
from ragdistill.commands.use import use
from ragdistill.errors import ConfigError
from ragdistill.llm import weights
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.params import RecipeParams, load_params
from ragdistill.records import Message, SftExample, read_json
from ragdistill.training import fast, hardware, memory, sft, trainer
from ragdistill.training.encode import IGNORE, OURS, encode
from tests.llm_toys import toy_tokenizer
from tests.other_params import altered

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "profiles"
USABLE = [n for n in profiles.names(FOLDER) if n not in ("smoke", "default")]
PAPER = [n for n in USABLE if n.startswith("paper-")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped parameters and profiles, as working directory."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(FOLDER, tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_cells_of_the_papers_tables_have_a_profile() -> None:
    parts = (("alfworld", "webshop"), ("7b", "14b"), ("react", "stateact"))
    assert set(PAPER) == {"-".join(("paper", *cell)) for cell in product(*parts)}


def test_the_default_profile_holds_the_shipped_value_of_every_key_that_a_profile_sets() -> None:
    default = profiles.read_profile("default", FOLDER)
    missing = {key for name in USABLE for key in profiles.read_profile(name, FOLDER)} - set(default)
    assert not missing, f"add these to profiles/default.yaml: {sorted(missing)}"
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in default.items():
        at = shipped
        for name in key.split("."):
            at = at[name]
        assert at == value, f"{key} of profiles/default.yaml is not the shipped one"


@pytest.mark.parametrize("name", USABLE)
def test_a_profile_leaves_complete_parameters_with_their_comments_and_the_default_comes_back(
    project: Path, name: str
) -> None:
    wanted = profiles.overlaid(name)
    before = (project / "params.yaml").read_text()
    override(project / "params.yaml", altered(yaml.safe_load(before)))
    params, changes = profiles.apply(name)
    assert params == wanted, "what stood there before decides nothing"
    text = (project / "params.yaml").read_text()
    assert load_params() == params
    for key, value in profiles.read_profile(name).items():
        at = yaml.safe_load(text)
        for part in key.split("."):
            at = at[part]
        assert at == value
    assert {c[0] for c in changes} <= set(profiles.read_profile("default"))
    comments = [line.split("# ", 1)[1] for line in before.splitlines() if "# " in line]
    assert [line.split("# ", 1)[1] for line in text.splitlines() if "# " in line] == comments
    profiles.apply("default")
    assert yaml.safe_load((project / "params.yaml").read_text()) == yaml.safe_load(before)


def test_nothing_of_the_profile_before_is_left(project: Path) -> None:
    direct, _ = profiles.apply("paper-alfworld-7b-react")
    profiles.apply("paper-webshop-14b-stateact")
    assert profiles.apply("paper-alfworld-7b-react")[0] == direct
    assert profiles.apply("paper-alfworld-7b-react")[1] == []


def test_keys_that_no_profile_sets_are_the_users(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("bootstrap: 4000 ", "bootstrap: 1000 "))
    assert profiles.apply("paper-alfworld-7b-react")[0].report.bootstrap == 1000


def test_a_list_that_dvc_wrote_on_lines_of_its_own_is_replaced_and_what_follows_stays_valid(project: Path) -> None:
    """`dvc exp run -S 'evaluate.policies=[raw,base]'` leaves such a list; the section after it was written broken."""
    direct = profiles.overlaid("paper-alfworld-7b-react")
    override(project / "params.yaml", ["evaluate.policies=[raw,base]", "hints.kinds=[redundancy]"])
    profiles.apply("paper-alfworld-7b-react")
    assert load_params() == direct
    assert "# untrained rows" in (project / "params.yaml").read_text()


def test_what_changes_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert use("paper-alfworld-14b-stateact") == 0
    said = capsys.readouterr().out
    assert "agent.name" in said and '"react" → "stateact"' in said
    assert '"smollm2-135m-instruct" → "Qwen/Qwen2.5-14B-Instruct"' in said
    assert use(None) == 0
    assert "paper-webshop-7b-react" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hints:\n  kk: 1\n", "nearest valid key is `k`"),
        ("hnts:\n  k: 1\n", "no section hnts"),
        ("hints:\n  k: many\n", "Expected `int`"),
        ("- 1\n", "no.*YAML mapping|is not a YAML mapping"),
        ("a: [1\n", r"mine\.yaml is not a YAML mapping of parameters \(line 2: [^\n]+$"),
        ("hints:\n  k: 1\n  k: 2\n", "line 3: found duplicate key"),
    ],
)
def test_a_wrong_profile_is_refused_and_changes_nothing(project: Path, text: str, says: str) -> None:
    before = (project / "params.yaml").read_bytes()
    (project / "profiles/mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        use("mine")
    assert (project / "params.yaml").read_bytes() == before
    with pytest.raises(ConfigError, match="the profiles are default, mine"):
        use("paper")
    with pytest.raises(ConfigError, match="ragdistill smoke"):
        use("smoke")


def qwen_template() -> str:
    """Qwen2.5's own chat template, whole (TRL ships it)."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja").read_text()


def episode(name: str) -> SftExample:
    turns = [("system", "You play."), ("user", f"You see a {name} 1."), ("assistant", "Thought: a\nAction: look")]
    turns += [("user", "Nothing happens."), ("assistant", "Thought: b\nAction: go to drawer 1")]
    messages = tuple(Message(role=role, content=text) for role, text in turns)  # pyright: ignore[reportArgumentType]
    return SftExample(id=name, messages=messages, task_id="t", trajectory_id=name, source="base", bucket="b")


def test_masks_under_qwens_own_template_are_replies_and_their_stop_tokens() -> None:
    chat = ChatFormat(toy_tokenizer(qwen_template()))
    (row,) = encode([episode("mug")], chat, 1000).rows
    learnt = [label for label in row.labels if label != IGNORE]
    assert chat._tokenizer.decode(learnt) == (
        "Thought: a\nAction: look<|im_end|>Thought: b\nAction: go to drawer 1<|im_end|>"
    )
    for turn in (2, 4):
        prompt = chat.prompt_ids(episode("mug").messages[:turn])
        assert row.ids[: len(prompt)] == prompt, "training sees what inference sees"


@pytest.mark.parametrize("name", [n for n in PAPER if n.endswith("-react")])  # the agent changes nothing here
def test_each_paper_profile_trains_its_architecture_at_reduced_width(project: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    params = profiles.overlaid(name)
    tokenizer = toy_tokenizer(qwen_template())
    config = memory.narrowed(memory.architecture(params.model.base), 2, 32, len(tokenizer))
    assert config.model_type == "qwen2"
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = msgspec.structs.replace(params.sft.recipe, quantize="none")
    recipe = msgspec.structs.replace(recipe, loss="all") if "7b" in name else recipe
    result = sft.train_lora([episode(n) for n in "abc"], base, tmp_path / "adapter", params.sft.lora, 0, recipe=recipe)
    assert math.isfinite(result.final_loss) and result.steps == 1
    assert result.recipe == (None if recipe == OURS else recipe)
    assert result.lora.r == read_json(tmp_path / "adapter/adapter_config.json")["r"]
    weights.check_adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"quantize is nf4, which needs a CUDA device"):
        trainer.load_base(base, hardware.plan(hardware.AUTO, base, params.sft.lora), params.sft.recipe.quantize)


def recipe(**changed: object) -> RecipeParams:
    return msgspec.structs.replace(OURS, **changed)


def test_each_correction_can_be_switched_back_to_the_papers_choice() -> None:
    chat = ChatFormat(toy_tokenizer(qwen_template()))
    example = episode("mug")
    ours = encode([example], chat, 1000).rows[0]
    every = encode([example], chat, 1000, recipe(loss="all")).rows[0]
    assert every.ids == every.labels == ours.ids
    plain = encode([example], chat, 1000, recipe(format="plain")).rows[0]
    bare = "".join(f"{m.content}\n" for m in example.messages)
    assert chat._tokenizer.decode(plain.ids) == f"{bare}<|im_end|>"
    replies = "".join(f"{m.content}\n" for m in example.messages if m.role == "assistant")
    assert chat._tokenizer.decode([x for x in plain.labels if x != IGNORE]) == f"{replies}<|im_end|>"
    cut = encode([example], chat, 40, recipe(too_long="cut", loss="all"))
    assert cut.rows[0].ids == ours.ids[:40] and cut.too_long == 1


def test_our_recipe_files_adapters_where_they_were_before_there_was_another() -> None:
    assert sft.recipe_key(OURS) == ()
    assert sft.recipe_key(recipe(loss="all")) != ()
    assert load_params(ROOT / "params.yaml").sft.recipe == OURS


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_equals_pytorchs(smoothing: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(fast.LOGIT_ROWS + 5, 8, requires_grad=True)
    head, targets = torch.randn(30, 8), torch.randint(0, 30, (fast.LOGIT_ROWS + 5,))
    found = fast.head_loss(hidden, head, targets, smoothing)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    for mine, theirs in zip(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "billions"), [("7B", 7.615616512), ("14B", 14.770033664)])
def test_parameters_are_those_of_the_published_models(size: str, billions: float) -> None:
    lora = profiles.overlaid("paper-alfworld-7b-react", ROOT / "params.yaml", FOLDER).sft.lora
    plain = memory.estimate(f"Qwen/Qwen2.5-{size}-Instruct", lora, "none", 1000)
    assert plain.parameters == round(billions * 1e9)
    assert plain.base == 2 * plain.parameters
    small = memory.estimate(f"Qwen/Qwen2.5-{size}-Instruct", lora, "nf4", 1000)
    assert 0.25 * plain.base < small.base < 0.4 * plain.base, "embeddings and head keep 16 bits"
    assert plain.activations > plain.recomputed_per_token * 1000 > 0


def test_activations_scaled_from_a_narrow_model_are_those_of_a_wider_one() -> None:
    """The estimate's one assumption, tested where it can be: a fraction four times as wide."""
    lora = profiles.overlaid("paper-webshop-7b-react", ROOT / "params.yaml", FOLDER).sft.lora
    spec = "Qwen/Qwen2.5-7B-Instruct"
    scaled = memory.estimate(spec, lora, "none", 1).activations_per_token
    config = memory.narrowed(memory.architecture(spec), 2, memory.SHRINK // 4)
    wide = memory.saved_bytes(config, lora.r // 4, lora.dropout) - memory.saved_bytes(
        memory.narrowed(memory.architecture(spec), 1, memory.SHRINK // 4), lora.r // 4, lora.dropout
    )
    assert wide * 4 / memory.TOKENS * 28 == pytest.approx(scaled, rel=0.03)


@pytest.mark.usefixtures("project")
def test_the_memory_table_adds_up_and_says_what_auto_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_memory("paper-alfworld-7b-react") == 0
    out = capsys.readouterr().out
    found = {name.strip(): float(size) for name, size in re.findall(r"^  (\D+?) +([\d.]+) GB", out, re.MULTILINE)}
    parts = ("base, frozen", "adapter", "activations", "logits")
    assert found["sum"] == pytest.approx(sum(found[p] for p in parts), abs=0.2)
    assert "7.62 B parameters in 4 bits (nf4)" in out and "rank 64" in out and "sft.lora.max_tokens = 12,000" in out
    assert found["one example"] < found["sum"] and found["kept"] > 5 * found["one example"], "layers are recomputed"
    assert "checkpointing=auto" not in out
    kept, recomputed = round(found["kept"]), round(found["one example"])
    written = [" ".join((ROOT / name).read_text().split()) for name in ("docs/paper.md", "CHANGELOG.md")]
    assert f"that is {kept} GB, or {recomputed} GB" in written[0] and f"{recomputed} GB instead of {kept}" in written[1]
    assert f"takes {found['host memory']:.0f} GB of it for 7B" in written[0]
    override(Path("params.yaml"), ["model.base=Qwen/Qwen2.5-7B-Instruct"])
    assert show_memory(None) == 0
    out = capsys.readouterr().out
    sizes = re.search(r"smaller micro-batches on GPUs below (\d+) GB, and recomputes layers below (\d+) GB", out)
    assert sizes and int(sizes[1]) > int(sizes[2]) > 20
