"""One module a DVC stage: `body(params)` does the I/O around functions of other rooms. No stage imports another.

Ctrl-C while a stage's imports still run is one line too; from then on `common.run_stage` answers it.
"""

from __future__ import annotations

import sys
from types import TracebackType


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted before anything had begun; run again to go on.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
