#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# installed.sh <work folder> [<prefix>]: builds and runs the consumer with the kvarn that is installed there (default: /usr, found
# without a hint), by pkg-config alone and by find_package alone; both must print the same. CXX, CMAKE and PKG_CONFIG name the tools.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
work=$1 prefix=${2:-}
cxx=${CXX:-c++} cmake=${CMAKE:-cmake} pkg_config=${PKG_CONFIG:-pkg-config}
rm -rf "$work"
mkdir -p "$work"

by_pkg_config() {
    if ! $pkg_config --version >/dev/null 2>&1; then
        echo "skipped: no pkg-config"
        exit 77
    fi
    if [ -n "$prefix" ]; then
        export PKG_CONFIG_PATH="$prefix/share/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
    fi
    if ! $pkg_config --exists xsimd; then
        echo "skipped: pkg-config knows no xsimd (PKG_CONFIG_PATH)"
        exit 77
    fi
    $pkg_config --print-errors --exists 'kvarn >= 0.1'
    flags=$($pkg_config --cflags kvarn)
    libraries=$($pkg_config --libs --static kvarn | tr -d ' ')
    if [ -n "$libraries" ]; then
        echo "a header-only library has nothing to link: $libraries"
        exit 1
    fi
    echo "pkg-config --cflags kvarn: $flags"
    $cxx -std=c++20 $flags "$here/consumer/main.cpp" "$here/consumer/part.cpp" -o "$work/by_pkg_config"
    "$work/by_pkg_config" >"$work/pkg-config.txt"
    [ "$($pkg_config --modversion kvarn)" = "$(sed 's/^kvarn \([0-9.]*\):.*/\1/' "$work/pkg-config.txt")" ]
}

by_find_package() {
    $cmake -S "$here/consumer" -B "$work/build" -DKVARN_CONSUME=find_package ${prefix:+"-Dkvarn_ROOT=$prefix"} \
        "-DCMAKE_CXX_COMPILER=$cxx"
    $cmake --build "$work/build" --target consumer
    "$work/build/consumer" >"$work/find_package.txt"
    grep "^kvarn_DIR:PATH=${prefix:-/usr}/" "$work/build/CMakeCache.txt"
}

by_pkg_config
by_find_package
cat "$work/pkg-config.txt"
cmp "$work/pkg-config.txt" "$work/find_package.txt"
