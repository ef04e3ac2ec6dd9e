"""API keys: they come from the environment only, and nothing that a server says carries them on.

A server is not trusted: it may repeat the key that it was sent, in an error or in a reply, and what it says ends in
trajectories, files, logs and MLflow. Knows no server.
"""

from __future__ import annotations

import os

from ragdistill.errors import ConfigError

SHOWN = 200
"""Characters of a server's words that are repeated."""
_HIDDEN = "***"
_SHORTEST = 8
"""Characters of a key. A shorter one may stand in any reply as a word of its own, so it could not be hidden there."""


def read_key(name: str) -> str:
    """The value of the environment variable `name`, "" when it is not set; `ConfigError`, without it, for no key.

    A key is at least `_SHORTEST` characters long.
    """
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not (key or "-").isprintable() or " " in key:
        raise ConfigError(f"The environment variable {name} holds something that is no key; set it again.")
    if 0 < len(key) < _SHORTEST:
        raise ConfigError(
            f"The environment variable {name} holds fewer than {_SHORTEST} characters, too few to hide where a server "
            "repeats them; set a longer key, or none for a server that asks for none (api_key_env: null)."
        )
    return key


def api_key(name: str | None) -> str | None:
    """As `read_key`, None for None; `ConfigError` when the variable is not set."""
    if name is None:
        return None
    key = read_key(name)
    if not key:
        raise ConfigError(f"The environment variable {name} is not set; put the key in it, or set api_key_env: null.")
    return key


def hide(text: str, key: str | None) -> str:
    """`text` without the key."""
    return text.replace(key, _HIDDEN) if key else text


def clean(text: str, key: str | None) -> str:
    """A server's words without the key, on one line, cut."""
    return " ".join(hide(text, key).split())[:SHOWN]
