# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run.sh and examples/run.sh, with $root set to the repository. POSIX sh.
#   kvarn_setup     installs what is missing from the distribution's packages (Debian, Ubuntu)
#   kvarn_configure configures $build, with extra arguments handed to cmake

build=${KVARN_BUILD_DIR:-$root/build}

kvarn_missing() {
    for package in "$@"; do
        dpkg -s "$package" 2>/dev/null | grep -q '^Status: install ok installed' || printf '%s ' "$package"
    done
}

kvarn_apt() {
    if [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo DEBIAN_FRONTEND=noninteractive apt-get "$@"
    else
        echo "kvarn: need root or sudo to install packages" >&2
        return 1
    fi
}

kvarn_setup() {
    if ! command -v dpkg >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
        echo "kvarn: not a Debian or Ubuntu system, taking the tools and libraries as they are"
        return 0
    fi
    needed=$(kvarn_missing g++ cmake ninja-build libxsimd-dev libeigen3-dev catch2 libbenchmark-dev libcli11-dev nlohmann-json3-dev)
    # A second compiler and a second architecture make more of the tests run; without them those are skipped.
    optional=$(kvarn_missing clang libclang-rt-dev)
    if [ "$(dpkg --print-architecture)" = amd64 ] && [ -z "${KVARN_NO_CROSS:-}" ]; then
        optional="$optional$(kvarn_missing g++-aarch64-linux-gnu qemu-user)"
    fi
    [ -n "$needed$optional" ] || return 0
    echo "kvarn: installing $needed$optional"
    kvarn_apt update -qq || echo "kvarn: apt-get update failed, going on with the lists there are" >&2
    if [ -n "$needed" ]; then
        kvarn_apt install -y -qq --no-install-recommends $needed >/dev/null || return 1
    fi
    for package in $optional; do
        kvarn_apt install -y -qq --no-install-recommends "$package" >/dev/null ||
            echo "kvarn: no $package, the tests that want it will be skipped" >&2
    done
}

kvarn_configure() {
    generator=
    if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null 2>&1; then
        generator=-GNinja
    fi
    cmake -S "$root" -B "$build" $generator "$@"
}
