#!/bin/sh
# Find a fit Python and hand over to install.py, which makes .venv. `RAGDISTILL_PYTHON` names one explicitly.
set -eu
case "$0" in */*) here=${0%/*} ;; *) here=. ;; esac

for python in ${RAGDISTILL_PYTHON:-python3.11 python3.12 python3 python}; do
    if "$python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        exec "$python" "$here/install.py"
    fi
done
echo "setup: ${RAGDISTILL_PYTHON:-no Python on PATH} is not a Python 3.11 or 3.12 with venv and ensurepip;" \
    "install one (on Debian: python3.11 and python3.11-venv) or set RAGDISTILL_PYTHON to its path." >&2
exit 1
