"""Remove the files of DVC that a kill has cut off; `make run` calls this before `dvc repro`.

DVC writes what running commands hold (`.dvc/tmp/rwlock`) and what stages made (`dvc.lock`) in place: a kill -9 in that
moment leaves half a file, and every later command fails. Whole files stay: DVC itself releases what dead processes
hold. Without `dvc.lock` the next `dvc repro` takes finished stages from DVC's run cache, episodes from the journal and
trained models from `.cache/adapters`.
"""

import fcntl
from pathlib import Path

from ragdistill.doctor import cut_off

GUARDS = {".dvc/tmp/rwlock": ".dvc/tmp/rwlock.lock", "dvc.lock": ".dvc/tmp/lock"}
"""File → the lock that DVC holds while it writes it."""


def main(root: Path = Path()) -> None:
    """Remove what is cut off in the project at `root`; nothing to do where all is whole, or DVC is writing."""
    for name in cut_off(root):
        with open(root / GUARDS[name], "a") as guard:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if name in cut_off(root):  # it may have been written to its end by now
                (root / name).unlink()
                print(f"removed {name}, which a kill had cut off")


if __name__ == "__main__":
    main()
