"""Turn chats into token ids with the model's own chat template, for inference and for training alike.

Message contents are untrusted: the template is rendered once with sentinels in place of contents, its pieces are
tokenised with control tokens and the contents without, so `<|im_start|>` inside an observation stays plain text.
The ids of a prompt are an exact prefix of the ids of any longer chat, which is what lets a KV cache be kept between
turns and training see what inference sees. This module knows no weights, no device and no task.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ragdistill.errors import ConfigError, IdentityError
from ragdistill.records import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "\ue000{}\ue001"
"""Private-use characters: no template holds them, and contents never meet them (they are put in afterwards)."""
_PROBE: tuple[Role, ...] = ("system", "user", "assistant", "user", "assistant", "user", "assistant")


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `model_dir`, never with remote code; `IdentityError` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as e:
        raise IdentityError(f"{model_dir} holds no readable tokenizer; give a complete model directory ({e}).") from e


class ChatFormat:
    """The chat format of one tokenizer. Safe to use from several threads."""

    stop_ids: frozenset[int]
    """Tokens that end an assistant turn: the tokenizer's eos and what the template puts after a reply."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Probe the template; `ConfigError` when it is missing or not stable under appended turns."""
        if not tokenizer.chat_template:
            raise ConfigError(f"Tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruct model.")
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._pieces = lru_cache(maxsize=4096)(self._render)
        self._template_ids = lru_cache(maxsize=4096)(lambda text: self._encode(text, control=True))
        self._content_ids = lru_cache(maxsize=65536)(lambda text: self._encode(text, control=False))
        self.stop_ids = frozenset(self._probe())

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat followed by the generation prompt."""
        ids: list[int] = []
        pieces = self._pieces(tuple(m.role for m in messages), True)
        for message, piece in zip(messages, pieces, strict=False):
            ids += self._template_ids(piece)
            ids += self._content_ids(message.content)
        return ids + list(self._template_ids(pieces[-1]))

    def training_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the whole chat, and a mask that is True on what the model itself has to produce.

        That is each assistant content and the stop token after it; without the stop token in the mask a
        model never learns to end its turn.
        """
        pieces = self._pieces(tuple(m.role for m in messages), False)
        ids: list[int] = list(self._template_ids(pieces[0]))
        mask = [False] * len(ids)
        for message, piece in zip(messages, pieces[1:], strict=True):
            own = message.role == "assistant"
            content, tail = self._content_ids(message.content), self._template_ids(piece)
            ids += [*content, *tail]
            mask += [own] * len(content) + [own and i == 0 for i in range(len(tail))]
        return ids, mask

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of bare text, without template; control tokens in it stay plain text."""
        return self._content_ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without control tokens."""
        with self._lock:
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # noqa: S101  (one sequence in, one text out)
        return text

    def _encode(self, text: str, *, control: bool) -> tuple[int, ...]:
        with self._lock:  # the flag below is state of the backend tokenizer, so two threads would race
            encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not control)
        return tuple(encoded["input_ids"])

    def _render(self, roles: tuple[Role, ...], prompt: bool) -> tuple[str, ...]:
        """The template's text before, between and after the contents: len(roles) + 1 pieces."""
        chat = [{"role": role, "content": _SENTINEL.format(i)} for i, role in enumerate(roles)]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        parts = re.split(r"\ue000(\d+)\ue001", str(text))
        if parts[1::2] != [str(i) for i in range(len(roles))]:
            raise ConfigError(f"The chat template does not render the roles {list(roles)} in order, each once.")
        return tuple(parts[0::2])

    def _probe(self) -> set[int]:
        """Stop ids of the template, after checking that prompts are prefixes of longer chats."""
        chat = [Message(role=role, content="x") for role in _PROBE]
        whole, _ = self.training_ids(chat)
        for turn in (2, 4, 6):
            prompt = self.prompt_ids(chat[:turn])
            if whole[: len(prompt)] != prompt:
                raise ConfigError("The chat template rewrites earlier turns; use one that only appends.")
        control = set(self._tokenizer.all_special_ids)
        after = self._template_ids(self._pieces(_PROBE, False)[-1])
        if not after or after[0] not in control:
            raise ConfigError("The chat template ends an assistant turn without a control token; use a ChatML one.")
        eos = self._tokenizer.eos_token_id
        return {after[0]} | ({eos} if isinstance(eos, int) else set())
