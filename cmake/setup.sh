# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run.sh and examples/run.sh, with $root set to the repository. POSIX sh.
#   kvarn_setup_examples, kvarn_setup_tests   install what is missing from the distribution's packages (Debian, Ubuntu)
#   kvarn_configure                           configures $build, with extra arguments handed to cmake

# What is installed, for building the examples and for the tests besides.
kvarn_packages='g++ cmake ninja-build libxsimd-dev libcli11-dev libeigen3-dev libxxhash-dev nlohmann-json3-dev'
kvarn_test_packages='catch2 libbenchmark-dev'
# These make more of the tests run: a second compiler, Doxygen, the tools of other ways to package, other languages, and, on amd64 and
# unless KVARN_NO_CROSS is set, other processors: AArch64, big-endian s390x, 32-bit x86 (130 MB to download with the emulator, 550 MB
# installed). With KVARN_WINDOWS set also MinGW-w64 and Wine (190 MB, 1.2 GB). A test that lacks one is skipped and says so.
kvarn_optional_packages='clang libclang-rt-dev doxygen pkgconf lintian rustc python3-numpy python3-pytest'
kvarn_optional_packages_amd64='g++-aarch64-linux-gnu g++-s390x-linux-gnu qemu-user libc6-dev-i386'
kvarn_optional_packages_windows='g++-mingw-w64-x86-64-posix wine64'

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

# kvarn_install <needed packages> <optional packages>
kvarn_install() {
    if ! command -v dpkg >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
        echo "kvarn: not a Debian or Ubuntu system, taking the tools and libraries as they are"
        return 0
    fi
    needed=$(kvarn_missing $1)
    optional=$(kvarn_missing $2)
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

kvarn_setup_examples() {
    kvarn_install "$kvarn_packages" ""
}

kvarn_setup_tests() {
    kvarn_install "$kvarn_packages $kvarn_test_packages" "" || return 1
    wanted=$kvarn_optional_packages
    if [ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ]; then
        # The 32-bit libraries are those of one version of the compiler.
        [ -n "${KVARN_NO_CROSS:-}" ] ||
            wanted="$wanted $kvarn_optional_packages_amd64 lib32stdc++-$(g++ -dumpversion | cut -d. -f1)-dev"
        [ -z "${KVARN_WINDOWS:-}" ] || wanted="$wanted $kvarn_optional_packages_windows"
    fi
    kvarn_install "" "$wanted"
}

kvarn_configure() {
    generator=
    if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null 2>&1; then
        generator=-GNinja
    fi
    cmake -S "$root" -B "$build" $generator "$@"
}
