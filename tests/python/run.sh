#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run.sh <examples/python> <shared library> <kvarn command line tool, or nothing>: the module's tests, by pytest. KVARN_PYTHON names an
# interpreter. Exit code 77: no Python here has what they need.
set -eu
folder=$1
command=${3:-}
[ -x "$command" ] || command=  # not built
export KVARN_LIBRARY="$2" KVARN_CLI="$command" PYTHONPATH="$folder/src" PYTHONDONTWRITEBYTECODE=1

for python in ${KVARN_PYTHON:-python3 /usr/bin/python3}; do
    if "$python" -c 'import sys, numpy, pytest; sys.exit(sys.version_info < (3, 9) or not hasattr(numpy, "from_dlpack"))' 2>/dev/null; then
        exec "$python" -m pytest -q -rs -p no:cacheprovider -c "$folder/pyproject.toml" "$folder/tests"
    fi
done
echo "skipped: no Python 3.9 or newer with NumPy 1.23 or newer and pytest (Debian and Ubuntu: python3-numpy python3-pytest)"
exit 77
