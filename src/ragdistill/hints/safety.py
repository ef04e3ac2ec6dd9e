"""Quarantine: which hint texts must never reach a prompt, and how recorded text may. Knows only strings.

Hints come from model output, hence from untrusted text: a refused one is kept out and named, never repaired.
"""

from __future__ import annotations

import re
import unicodedata

from ragdistill.hints.templates import PLACEHOLDER

_CONTROL_TOKEN = re.compile(r"<\||\|>|<<|>>|</?[a-z_]\w*>|<0x\w+>|\[/?inst\]|(?-i:\[/?[A-Z_]{3,}\])", re.IGNORECASE)
_URL = re.compile(r"\w+://|\bwww\.|\b[\w-]+\.(?:com|org|net|io|ai|dev|sh|py|exe)\b", re.IGNORECASE)
_CODE = re.compile(r"[`\\$;]|\(\)|==|=>|->|\bimport \w|\beval\b|\bsudo\b")
_SPEAKER = re.compile(
    r"(?:^|[.!?]\s+)(?:system|user|assistant|observation|action|thought|goal|task)\s*:", re.IGNORECASE
)
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b.{0,40}\b(?:instruction|prompt|rule|message|system|previous|prior|above)"
    r"|\b(?:system|developer) (?:prompt|message)|\bnew instructions?\b|\byou are now\b|\bpretend (?:to|that|you)\b",
    re.IGNORECASE,
)
"""Speaks to the model about its orders instead of about the game."""
_NUMBERED = re.compile(r"[a-z][a-z_-]* \d+\b", re.IGNORECASE)


_ANGLES = str.maketrans(dict.fromkeys("<＜﹤", "‹") | dict.fromkeys(">＞﹥", "›"))
_BRACKETED = re.compile(r"\[(/?(?:inst|tool_calls|tool_results|available_tools|system_prompt))\]", re.IGNORECASE)
"""Mistral's. No others: pages of a shop have [SEP] and the like, and are to be read as they are."""


def defuse(text: str) -> str:
    """`text` without anything that could be a control token or close a fence: no angle brackets, nothing invisible.

    A local engine never makes control tokens of content; what an endpoint's chat template does with it is unknown.
    """
    text = _BRACKETED.sub(r"(\1)", text.translate(_ANGLES))
    return "".join(c if c == "\n" or not _invisible(c) else " " for c in text)


def refusal(text: str, max_chars: int) -> str | None:
    """Why `text` may not be a hint, or None when it may."""
    if not text.strip():
        return "empty"
    if len(text) > max_chars:
        return f"longer than {max_chars} characters"
    if any(map(_invisible, text)):
        return "line break or invisible character"
    for pattern, reason in (
        (_CONTROL_TOKEN, "control token"),
        (_URL, "address"),
        (_CODE, "code"),
        (_SPEAKER, "speaker label"),
        (_ORDER, "order to the model"),
        (_NUMBERED, "concrete object number"),
    ):
        if found := pattern.search(text):
            return f"{reason} {found[0]!r}"
    rest = PLACEHOLDER.sub("", text)
    return "brace outside a {placeholder}" if "{" in rest or "}" in rest else None


def _invisible(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn")
