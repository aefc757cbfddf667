#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# lintian.sh <folder>: lintian has nothing to say of the package that deb.sh left there.
set -eu
if ! command -v lintian >/dev/null; then
    echo "skipped: no lintian"
    exit 77
fi
set -- "$1"/libkvarn-dev_*_all.deb
if [ ! -f "$1" ]; then
    echo "skipped: no package, see package.deb"
    exit 77
fi
said=$(lintian --allow-root --display-info --pedantic "$1")
if [ -n "$said" ]; then
    echo "$said"
    exit 1
fi
