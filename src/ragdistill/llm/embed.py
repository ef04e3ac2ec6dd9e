"""Sentence embeddings of a local encoder: mean of the last hidden states over the text's tokens, as unit vectors.

That is what sentence-transformers models with mean pooling compute (arXiv 1908.10084 §3). Texts are tokenised as plain
text. Knows no hint and no ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragdistill.errors import IdentityError
from ragdistill.llm import cpu_env
from ragdistill.llm.weights import check_model_dir, model_fingerprint
from ragdistill.records import digest

_TOKENS = 256
"""Longer texts lose their end; hints and goals are one sentence."""


class Embedder:
    """An encoder directory (safetensors) as a function from texts to unit vectors."""

    def __init__(self, directory: Path) -> None:
        """Load the encoder in float32; `IdentityError` for a directory that is no model or not safe to load."""
        cpu_env.apply()
        check_model_dir(directory)
        from transformers import AutoModel, AutoTokenizer

        where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), **where)
            self._model: Any = AutoModel.from_pretrained(str(directory), use_safetensors=True, **where).float().eval()
        except (OSError, ValueError, KeyError) as e:
            raise IdentityError(f"{directory} does not load as an encoder ({e}); name another embedding model.") from e
        self.fingerprint = digest("embedder-1", model_fingerprint(directory))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(len(texts), width) float32; a text without tokens gives a zero vector."""
        import torch

        given = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt",
            split_special_tokens=True,
        )  # fmt: skip
        with torch.inference_mode():
            states = self._model(**given).last_hidden_state
        mask = given["attention_mask"][..., None].float()
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=1).numpy()
