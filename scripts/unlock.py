"""Remove DVC's lock file when a kill has cut it off; `make run` calls this before `dvc repro`.

DVC (`dvc/rwlock.py`) writes the file in place: a kill -9 in that moment leaves half of it, and every later command
fails. A whole file stays: DVC itself releases what dead processes hold.
"""

import fcntl
import json
from pathlib import Path


def main(lock: Path = Path(".dvc/tmp/rwlock")) -> None:
    """Remove `lock` unless it is JSON; nothing to do where there is none."""
    if not lock.exists():
        return
    with open(f"{lock}.lock", "a") as guard:  # the one DVC holds while it writes
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            json.loads(lock.read_text())
        except ValueError:
            lock.unlink()
            print(f"removed {lock}, which a kill had cut off")


if __name__ == "__main__":
    main()
