#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# links.sh accepts good documents and finds each kind of broken link.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
tree=$KVARN_WORK/links_self_test
failed=0

# case_of <ok|bad> <line of docs/a.md> [line of docs/README.md]
case_of() {
    rm -rf "$tree"
    mkdir -p "$tree/docs/deep" "$tree/examples/kvarn" "$tree/tests"
    echo '[documents](docs/README.md) [one](docs/a.md#some-words-c-and-code)' >"$tree/README.md"
    printf '# Landing\n%s\n' "${3-[a](a.md)}" >"$tree/docs/README.md"
    printf '# A page\n## Some *words*: C++ and `code`\n## Twice\n## Twice\n%s\n' "$2" >"$tree/docs/a.md"
    : >"$tree/docs/picture.svg"
    if KVARN_LINKS_WORK=links_self_test.work sh "$here/links.sh" "$tree" >"$tree.log" 2>&1; then found=ok; else found=bad; fi
    if [ "$found" != "$1" ]; then
        echo "expected $1, got $found: $2 ${3-}"
        cat "$tree.log"
        failed=1
    fi
}

case_of ok 'text'
case_of ok '[up](../README.md), [folder](../examples/kvarn/), [self](#some-words-c-and-code), [web](https://example.org/x#y)'
case_of ok '![a picture](picture.svg) and [the second](a.md#twice-1)'
case_of ok '`[no link](nowhere.md)`'
case_of ok '[out of a folder](deep/../a.md#a-page)'
case_of bad '[nowhere](nowhere.md)'
case_of bad '![nowhere](nowhere.svg)'
case_of bad '[no heading](#nowhere)'
case_of bad '[no heading](README.md#nowhere)'
case_of bad '[two links](a.md) in a line, [the second](nowhere.md)'
case_of bad '[from the top](docs/a.md)'
case_of bad 'text' 'no link to the page'
case_of ok 'docs/a.md by name'
case_of bad 'docs/nowhere.md by name'
case_of ok '`examples/kvarn/` and `tests`'
case_of bad '`examples/nowhere`'
case_of bad '`kvarn/nowhere.hpp`'
exit $failed
