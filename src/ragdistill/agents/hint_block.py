"""The block of hints as a policy sees it. Knows no agent; where the block goes is the agent's business."""

from __future__ import annotations

from collections.abc import Sequence

HEADER = "Hints (apply silently; the observation wins):"


def render_hints(texts: Sequence[str]) -> str:
    """Header and one line a hint, placeholders as they are; empty without hints."""
    return "\n".join([HEADER, *(f"- {' '.join(t.split())}" for t in texts)]) if texts else ""
