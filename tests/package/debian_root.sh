#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# debian_root.sh <root> <libkvarn-dev.deb>, as root: installs the package with apt in a root that debootstrap made
# (`debootstrap --variant=minbase <suite> <root>`), with nothing else but a compiler, CMake and pkgconf, has the consumer built and run
# there (installed.sh), and removes the package again. The root is changed; use a copy.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$1 deb=$2
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

rm -rf "$root/kvarn"
mkdir "$root/kvarn"
cp -R "$here/consumer" "$here/installed.sh" "$root/kvarn"
cp "$deb" "$root/kvarn/libkvarn-dev.deb"
chroot "$root" sh -eux <<'inside'
apt-get update -qq
apt-get install -y -qq --no-install-recommends /kvarn/libkvarn-dev.deb g++ cmake make pkgconf >/kvarn/log 2>&1 || { cat /kvarn/log; exit 1; }
dpkg --audit
dpkg --verify libkvarn-dev
dpkg-query -W libkvarn-dev libxsimd-dev g++ cmake pkgconf
sh /kvarn/installed.sh /kvarn/work
apt-get remove -y -qq libkvarn-dev >>/kvarn/log
test ! -e /usr/include/kvarn -a ! -e /usr/share/kvarn -a ! -e /usr/share/doc/libkvarn-dev
inside
rm -rf "$root/kvarn"
