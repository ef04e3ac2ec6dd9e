"""Write a merged llama-architecture model as a GGUF file, the form OpenVINO GenAI reads.

Weights are float16 (their rounding is finer than that of bfloat16 arithmetic), norms float32. The file is named by
the content it was made from and written once. This module knows no engine, no chat and no task.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragdistill.errors import ConfigError
from ragdistill.llm.chat_format import load_tokenizer
from ragdistill.llm.choice import LLAMA, openvino_refuses
from ragdistill.llm.weights import adapter_fingerprint, load_merged, model_fingerprint
from ragdistill.records import digest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedModel

EXPORT_VERSION = 1
"""Part of the file's name; bumped when a change alters its content."""


def gguf_fingerprint(model_dir: Path, adapter: Path | None, quantisation: str = "f16") -> str:
    """Identity of the file: base, adapter, quantisation and version of this code."""
    parts = [model_fingerprint(model_dir), adapter_fingerprint(adapter) if adapter else ""]
    return digest("gguf", *parts, quantisation, str(EXPORT_VERSION))


def export_gguf(model_dir: Path, adapter: Path | None, cache: Path, quantisation: str = "f16") -> Path:
    """The GGUF file of base + adapter below `cache`, made if it is not there (merged in float32, then rounded).

    `quantisation` is "f16" or "q8_0" (8-bit blocks of 32). Raises `ConfigError` for an architecture other than
    plain llama, `IdentityError` for a model or adapter that is not what it should be.
    """
    path = cache / f"{gguf_fingerprint(model_dir, adapter, quantisation)}.gguf"
    if path.is_file():
        return path
    import torch

    model = load_merged(model_dir, adapter, torch.float32)
    refusal = openvino_refuses(model.config)
    if refusal:
        raise ConfigError(f"{refusal}; use the torch engine (model.engine: batched).")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".gguf.") as tmp:  # renamed last: a file there is complete
        part = Path(tmp) / "model.gguf"
        _write(part, model, model_dir, quantisation)
        part.replace(path)
    return path


def _write(path: Path, model: PreTrainedModel, model_dir: Path, quantisation: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    kinds = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    if quantisation not in kinds:
        raise ConfigError(f"GGUF quantisation {quantisation!r} is not known; use one of {', '.join(kinds)}.")
    writer = GGUFWriter(path, LLAMA)
    try:
        writer.add_file_type(kinds[quantisation])
        _add_config(writer, model.config)
        _add_tokenizer(writer, model_dir, model.config)
        for name, array in _tensors(model):
            kind = GGMLQuantizationType.F32 if array.ndim == 1 else GGMLQuantizationType[quantisation.upper()]
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_config(writer: GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    if head * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head)
        writer.add_value_length(head)


def _add_tokenizer(writer: GGUFWriter, model_dir: Path, config: Any) -> None:
    """The byte-pair tokenizer; the reader wants one, though prompts reach the engine as ids."""
    from gguf import TokenType

    tokenizer: Any = load_tokenizer(model_dir)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        raise ConfigError("The OpenVINO engine needs a byte-pair tokenizer; use the torch engine.")
    special = set(tokenizer.all_special_ids) | {t["id"] for t in backend["added_tokens"] if t["special"]}
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    size = range(config.vocab_size)
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL if i in names else TokenType.UNUSED for i in size]
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    eos = tokenizer.eos_token_id
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names.get(i, f"<unused_{i}>") for i in size])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and float32 arrays."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config: Any = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConfigError(f"Weight {name!r} has no place in a {LLAMA} GGUF; use the torch engine.")
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        rotary = ".q_proj." in name or ".k_proj." in name
        yield target, (_interleave(tensor, heads) if rotary else tensor).contiguous().numpy()


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs side by side, as GGUF's llama stores Q and K; transformers stores two halves per head."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
