"""Prompts are data: this module reads `prompt_*.txt` and fills in `$names`. It knows no model.

What is filled in is never read as a template again, so untrusted text cannot ask for further values.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from string import Template


def render(name: str, **values: object) -> str:
    """The prompt `name` with all of its `$names` filled in; KeyError when one is not given."""
    return _template(name).substitute(values)


@cache
def _template(name: str) -> Template:
    return Template(Path(__file__).with_name(f"prompt_{name}.txt").read_text(encoding="utf-8").strip())
