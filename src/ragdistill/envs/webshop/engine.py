"""WebShop as an `Env`: one visit at a time over a catalogue that worker processes share. Knows no model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import msgspec

from ragdistill.envs.webshop.catalogue import FORMAT, Catalogue
from ragdistill.envs.webshop.reward import shares
from ragdistill.envs.webshop.shop import Visit, admissible
from ragdistill.errors import DataError
from ragdistill.records import Observation, Task

VERSION = "webshop-2"
"""Changes whenever pages, actions or rewards, or what is told of them, change."""


class WebshopEnv:
    """See `ragdistill.envs.Env`. `Task.data` is "<catalogue key>/<source>/<number>"."""

    def __init__(
        self, folder: Path, *, show_chosen: bool = False, show_attributes: bool = False, offer: bool = False
    ) -> None:
        self._catalogue = _opened(folder)
        self._key = folder.name
        self._show_chosen, self._show_attributes, self._offer = show_chosen, show_attributes, offer
        self._visit: Visit | None = None

    def reset(self, task: Task) -> Observation:
        """Start the visit for the task's goal; `DataError` when it was made for another catalogue."""
        key, source, number = task.data.split("/")
        if key != self._key:
            raise DataError(f"Task {task.id} was made for another WebShop catalogue; run the tasks stage again.")
        goal = self._catalogue.goal(source, int(number))
        self._visit = Visit(self._catalogue, goal, show_attributes=self._show_attributes, show_chosen=self._show_chosen)
        seen = self._observe(True)
        return msgspec.structs.replace(
            seen, goal=goal.instruction, bucket=self._catalogue.bucket_words.bucket(goal.instruction)
        )

    def step(self, action: str) -> Observation:
        """Play `search[…]` or `click[…]`; anything else is refused and changes nothing."""
        if self._visit is None:
            raise DataError("The shop was not opened; call reset first.")
        return self._observe(self._visit.act(action))

    def _observe(self, valid: bool) -> Observation:
        visit = self._visit
        assert visit is not None  # noqa: S101 - both callers set it
        bought = valid and visit.over
        return Observation(
            text=visit.page.text,
            reward=visit.earned.total if bought and visit.earned else 0.0,
            done=bought,
            valid=valid,
            admissible=admissible(visit.page) if self._offer else (),
            parts=shares(visit.earned) if bought and visit.earned else msgspec.UNSET,
        )

    def close(self) -> None:
        """End the visit; the catalogue stays open for the other environments of this process."""
        self._visit = None


@lru_cache(maxsize=1)
def _opened(folder: Path) -> Catalogue:
    """One for all environments of a process: each would keep thousands of products in memory."""
    return Catalogue(folder)


def fingerprint(catalogue_key: str) -> str:
    """Identity of pages, actions, rewards, search and catalogue."""
    return f"{VERSION}/{FORMAT}/{catalogue_key}"
