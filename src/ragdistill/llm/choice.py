"""Which engine plays a model here, and what a run lacks here: read from the machine, before anything is computed.

Nothing of an adapter counts, and a cold start changes no configuration: so the raw model, the base and its students
get one answer, and what they played can be compared. This module knows no weights, no engine and no stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ragdistill.checks import calls_endpoint, no_4_bits
from ragdistill.errors import ConfigError, IdentityError
from ragdistill.llm import cpu_env
from ragdistill.llm.keys import api_key
from ragdistill.params import Params
from ragdistill.records import read_json

LLAMA = "llama"
"""The one architecture that OpenVINO GenAI reads from a GGUF file as transformers computes it."""
IN_PROCESS = ("auto", "openvino", "batched", "reference")
"""Values of `model.engine` that compute in this process; the others serve or script."""


class Choice(NamedTuple):
    """An engine, where it computes, and why."""

    engine: Literal["openvino", "batched", "reference"]
    device: Literal["cpu", "cuda"]
    reason: str

    def __str__(self) -> str:
        name = "OpenVINO" if self.engine == "openvino" else f"torch ({self.engine})"
        return f"{name} on {'CUDA' if self.device == 'cuda' else 'the CPU'}: {self.reason}"


def choose(engine: str, dtype: str, model_dir: Path) -> Choice:
    """The engine for the model in `model_dir`, as `model.engine` (one of `IN_PROCESS`) and `model.dtype` ask.

    auto: the torch engine on CUDA where there is a device; else OpenVINO, about three times as fast as torch on a
    CPU, where it is installed and computes this model rightly; else the torch engine on the CPU.
    `ConfigError` when the engine that is asked for, or no engine, can run the model, `IdentityError` when the
    directory's configuration is no model's.
    """
    device = best_device()
    config, why_not = _config(model_dir), "model.engine names it"
    if engine == "openvino":
        refusal = openvino_refuses(config, model_dir)
        if refusal:
            raise ConfigError(f"model.engine is openvino, but: {refusal}; set it to auto.")
        return Choice("openvino", "cpu", why_not)
    if engine == "auto" and device == "cpu":
        why_not = _openvino_absent() or openvino_refuses(config, model_dir)
        if dtype == "auto" and why_not is None:
            return Choice("openvino", "cpu", f"there is no CUDA device, and it can run this {config.model_type} model")
        why_not = f"there is no CUDA device, and {why_not or f'model.dtype is {dtype}, which only torch obeys'}"
    elif engine == "auto":
        why_not = "there is a CUDA device"
    refusal = torch_refuses(config)
    if refusal:
        raise ConfigError(refusal)
    return Choice("reference" if engine == "reference" else "batched", device, why_not)


def best_device() -> Literal["cpu", "cuda"]:
    """cuda where torch finds a device."""
    cpu_env.apply()
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def unmet(p: Params, cuda: bool) -> Iterator[str]:
    """What `p` asks for and this machine has not, and what to do, a sentence each; `cuda`: whether it has a device."""
    if p.sft.variants and (lack := no_4_bits(p.sft.recipe.quantize, cuda)):
        yield lack
    if calls_endpoint(p):
        try:
            api_key(p.endpoint.api_key_env)
        except ConfigError as e:
            yield str(e)


def has_openvino() -> bool:
    """Whether the fast CPU engine is installed."""
    return find_spec("openvino_genai") is not None


def _openvino_absent() -> str | None:
    return None if has_openvino() else "the package openvino-genai is not installed"


def openvino_refuses(config: Any, model_dir: Path | None = None) -> str | None:
    """Why OpenVINO's GGUF reader would get this model wrong, or None.

    Without `model_dir` the tokenizer is not looked at.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    bias = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.model_type != LLAMA:
        return f"the OpenVINO engine runs {LLAMA} models, not this {config.model_type} one"
    if bias or rope.get("rope_type", "default") != "default" or getattr(config, "hidden_act", "silu") != "silu":
        return "the OpenVINO engine runs plain llama models (no biases, unscaled rotary positions, SiLU), not this one"
    if model_dir is not None and not _byte_pairs(model_dir / "tokenizer.json"):
        return "the OpenVINO engine needs a byte-pair tokenizer (tokenizer.json), which this model has not"
    return None


def _byte_pairs(path: Path) -> bool:
    return path.is_file() and read_json(path)["model"].get("type") == "BPE"


def torch_refuses(config: Any, model: type | None = None) -> str | None:
    """Why the torch engine cannot run this architecture (`model`: its class, looked up if not given), or None."""
    from transformers import AutoModelForCausalLM

    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        kinds = {"sliding_attention"}
    known: Any = AutoModelForCausalLM._model_mapping
    model = model or known.get(type(config), None)
    if kinds == {"full_attention"} and getattr(model, "_supports_attention_backend", False):
        return None
    named = ", ".join(sorted(kinds))
    return f"The local engine cannot run this {config.model_type} model ({named}); serve it by an endpoint or vllm."


def _config(model_dir: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False, local_files_only=True)
    except ValueError:
        raise IdentityError(
            f"{model_dir}/config.json is of no model that transformers knows; name a directory written by "
            "`save_pretrained`."
        ) from None
