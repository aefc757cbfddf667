#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# deb.sh <repository> <work folder> [<cmake argument> ...]: makes libkvarn-dev, checks what it says and holds, unpacks it, and has the
# consumer built against that (installed.sh). CXX and CMAKE name the tools; the package is left in <work folder>.
set -eu
repository=$1 work=$2
shift 2
cmake=${CMAKE:-cmake}
cpack=$(dirname "$(command -v "$cmake")")/cpack
if ! command -v dpkg-deb >/dev/null; then
    echo "skipped: no dpkg-deb, this is not a Debian system"
    exit 77
fi

fail() {
    echo "$*" >&2
    exit 1
}

rm -rf "$work"
mkdir -p "$work"
cd "$work"
"$cmake" -S "$repository" -B library -DKVARN_BUILD_TESTS=OFF -DKVARN_BUILD_BENCHMARKS=OFF -DKVARN_BUILD_EXAMPLES=OFF "$@" >log

# Twice, at different times, with one date: the same bytes.
SOURCE_DATE_EPOCH=1600000000
export SOURCE_DATE_EPOCH
version=$(sed -n 's/^#define KVARN_VERSION_STRING "\(.*\)"/\1/p' "$repository/include/kvarn/version.hpp")
deb=libkvarn-dev_${version}_all.deb
for n in 1 2; do
    (umask 077 && cd library && "$cpack" -B "$work/made$n" >>"$work/log")
    [ -f "made$n/$deb" ] || fail "cpack made no $deb: $(ls "made$n")"
    [ $n = 2 ] || sleep 1.1
done
cmp "made1/$deb" "made2/$deb"
mv "made1/$deb" .

# What it says.
field() {
    value=$(dpkg-deb -f "$deb" "$1")
    [ "$value" = "$2" ] || fail "$1 is \`$value\`, not \`$2\`"
}
field Package libkvarn-dev
field Version "$version"
field Architecture all
field Section libdevel
field Priority optional
field Depends 'libxsimd-dev (>= 8.1)'
field Suggests 'libeigen3-dev, libxxhash-dev (>= 0.8), nvidia-cuda-toolkit (>= 12.4)'
homepage=$(sed -n 's/.*HOMEPAGE_URL "\([^"]*\)".*/\1/p' "$repository/CMakeLists.txt")
[ -n "$homepage" ] || fail "CMakeLists.txt has no HOMEPAGE_URL"
field Homepage "$homepage"
dpkg-deb -f "$deb" Maintainer | grep -Eq '^[^<>]+ <[^@<> ]+@[^@<> ]+>$' || fail "no maintainer with an address"
dpkg-deb -f "$deb" Description >description
head -n 1 description | grep -Eq '^[A-Za-z].{20,70}[^.]$' || fail "the synopsis: $(head -n 1 description)"
[ "$(wc -l <description)" -ge 4 ] || fail "no long description"

# What it holds: the headers, the two ways to find them, and what Debian asks for; readable by all, owned by root.
dpkg-deb -c "$deb" >contents
if grep -Ev '^(drwxr-xr-x|-rw-r--r--) root/root ' contents; then
    fail "modes or owners are wrong"
fi
sed -n 's|^-.* \./||p' contents | LC_ALL=C sort >holds
{
    (cd "$repository" && find include/kvarn -name '*.hpp' -o -name '*.cuh' -o -name '*.h') | sed 's|^|usr/|'
    for file in KvarnCLibrary.cmake KvarnKernels.cmake kvarnConfig.cmake kvarnConfigVersion.cmake kvarnFilesTargets.cmake \
        kvarnTargets.cmake kvarn_c.cpp.in kvarn_kernels.cpp.in; do
        echo "usr/share/kvarn/$file"
    done
    echo usr/share/pkgconfig/kvarn.pc
    for file in CHANGELOG.md.gz changelog.gz copyright; do
        echo "usr/share/doc/libkvarn-dev/$file"
    done
} | LC_ALL=C sort >should_hold
diff should_hold holds || fail "the package does not hold what it should"

dpkg-deb -x "$deb" unpacked
(cd unpacked && dpkg-deb --ctrl-tarfile "../$deb" | tar -xO ./md5sums | md5sum -c --quiet)
doc=unpacked/usr/share/doc/libkvarn-dev
gzip -dc "$doc/changelog.gz" | head -n 1 | grep -qx "libkvarn-dev ($version) .*" || fail "the changelog is of another version"
grep -qx 'License: Apache-2.0' "$doc/copyright"

# Unpacked elsewhere it serves as well; in its place pkg-config has no flag to give.
if pkg-config --exists xsimd 2>/dev/null; then
    flags=$(PKG_CONFIG_PATH=unpacked/usr/share/pkgconfig:${PKG_CONFIG_PATH:-} pkg-config --cflags kvarn | tr -d ' ')
    case $flags in *pkgconfig* | *-I/usr/include*) fail "pkg-config --cflags kvarn: $flags" ;; esac
fi
CMAKE=$cmake PKG_CONFIG='pkg-config --define-prefix' sh "$repository/tests/package/installed.sh" "$work/consumer" "$work"/unpacked/usr
