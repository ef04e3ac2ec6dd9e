"""Tests mean the CPU unless they are asked for by the marker `gpu`: what they compare with was computed there."""

from __future__ import annotations

import os
import re

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, here and from all processes that tests start; before anything imports torch."""
    if not re.search(r"(?<!not )\bgpu\b", str(config.getoption("markexpr") or "")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
