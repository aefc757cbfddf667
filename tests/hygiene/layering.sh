#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# layering.sh <folder of headers>: what each header includes and says is allowed for its layer (docs/architecture.md).
set -eu
cd "$1"
find . -name '*.hpp' -o -name '*.cuh' | sed 's|^\./||' | LC_ALL=C sort | xargs awk '
# 0 base, 1 layout, 2 simd, 3 rotate normalize codec, 4 convert.hpp quantize.hpp attention scratch.hpp supports.hpp, 5 cache, 6 interop,
# 7 the umbrella and dispatch, 8 cuda, which knows layers 0 and 1 and itself, 9 the C interface, which knows neither interop nor cuda.
function layer(path) {
    if (path ~ /^base\// || path == "version.hpp") return 0
    if (path ~ /^layout\//) return 1
    if (path ~ /^simd\//) return 2
    if (path ~ /^(rotate|normalize|codec)\//) return 3
    if (path ~ /^(quantize|attention)(\.hpp$|\/)/ || path ~ /^(convert|scratch|supports)\.hpp$/) return 4
    if (path ~ /^cache\//) return 5
    if (path ~ /^interop\//) return 6
    if (path == "kvarn.hpp" || path ~ /^dispatch(\.hpp$|\/)/) return 7
    if (path ~ /^cuda\/.*\.cuh$/) return 8
    if (path ~ /^c\//) return 9
    return -1
}
function folder(path) { return path ~ /\// ? substr(path, 1, index(path, "/") - 1) : path }
function wrong(what) { printf "%s:%d: %s\n", FILENAME, FNR, what; bad = 1 }
FNR == 1 {
    files++
    mine = layer(FILENAME); block = 0; once = 0
    if (mine < 0) wrong("belongs to no layer")
    if ($0 !~ /^\/\/ SPDX-License-Identifier: Apache-2\.0$/) wrong("does not begin with the licence line")
}
FNR == 2 && $0 !~ /^#pragma once$/ { wrong("has no #pragma once on its second line") }
/^[ \t]*#[ \t]*include/ {
    name = $0
    sub(/^[ \t]*#[ \t]*include[ \t]*/, "", name); sub(/[ \t]*\/\/.*$/, "", name)
    if (name ~ /^"/) wrong("includes " name " with quotes: <kvarn/...> names it from anywhere")
    gsub(/[<>"]/, "", name)
    if (name ~ /^kvarn\//) {
        sub(/^kvarn\//, "", name)
        theirs = layer(name)
        if (theirs < 0) wrong("includes <kvarn/" name ">, which belongs to no layer")
        else if (theirs > mine) wrong("includes <kvarn/" name "> of a higher layer")
        else if (mine == 8 && theirs > 1 && theirs < 8) wrong("includes <kvarn/" name ">: cuda/ stands on base/ and layout/ alone")
        else if (theirs == mine && folder(name) != folder(FILENAME) && mine == 3) wrong("includes its neighbour <kvarn/" name ">")
        else if (mine == 9 && (theirs == 6 || theirs == 8)) wrong("includes <kvarn/" name ">: c/ stands on dispatch/ and cache/")
        else if (mine == 7 && theirs == 6) wrong("includes <kvarn/" name ">: interop is for those who ask for it")
        else if (FILENAME == "kvarn.hpp" && theirs == 7) wrong("the umbrella includes <kvarn/" name ">: dispatch is for those who ask for it")
    }
    else if (name ~ /^xsimd\// && mine != 2) wrong("includes <" name ">: only simd/ may")
    else if (name ~ /^(immintrin|xmmintrin|arm_neon)\.h$/ && mine != 2) wrong("includes <" name ">: only simd/ may")
    else if (name ~ /^(Eigen|unsupported)\// && mine != 6) wrong("includes <" name ">: only interop/ may")
    else if (name == "xxhash.h" && FILENAME != "cache/file_format.hpp") wrong("includes <" name ">: only cache/file_format.hpp may")
    else if (name ~ /^(iostream|ostream|istream|fstream|sstream|iomanip|functional|stdexcept|exception|cstdio|stdio\.h|regex|random)$/ && mine != 6)
        wrong("includes <" name ">")
    else if (name == "new" && mine == 9) next  # handles are made in memory that is there
    else if (name ~ /^(vector|string|memory|map|unordered_map|deque|list|new|thread|mutex)$/ && (mine < 5 || mine > 6)) wrong("includes <" name ">: nothing below cache/ allocates or locks")
    next
}
{
    line = $0
    gsub(/\\./, "", line); gsub(/"[^"]*"/, "\"\"", line)
    if (block) { if (line !~ /\*\//) next; sub(/^.*\*\//, "", line); block = 0 }
    sub(/\/\/.*$/, "", line)
    gsub(/\/\*([^*]|\*[^\/])*\*\//, "", line)
    if (line ~ /\/\*/) { sub(/\/\*.*$/, "", line); block = 1 }
    line = " " line " "
    if (mine != 6) {
        if (line ~ /[^A-Za-z0-9_](throw|try|catch|dynamic_cast|typeid)[^A-Za-z0-9_]/) wrong("uses exceptions or RTTI")
        if (line ~ /[^A-Za-z0-9_](abort|terminate|exit|printf|fprintf|puts|cout|cerr|assert)[ ]*\(/) wrong("aborts or prints")
        if (line ~ /std::(function|cout|cerr)[^A-Za-z0-9_]/) wrong("uses std::function or streams")
    }
    if ((mine < 5 || mine > 6) && line ~ /[^A-Za-z0-9_](malloc|calloc|realloc|aligned_alloc|free)[ ]*\(|[^A-Za-z0-9_]new [A-Za-z_:]/) wrong("allocates")
    if (line ~ /^ using namespace /) wrong("using namespace in a header")
}
END {
    if (!files) { print "no headers found"; exit 2 }
    printf "%d headers read\n", files
    exit bad
}'
