#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# snippet_names.sh <index>: what the blocks of CMake and shell in the documents name exists in the repository, where it runs: KVARN_ variables,
# kvarn:: targets, kvarn_ functions, presets, build targets, folders and files, programs of examples/ with their commands and flags.
# <index> is made by snippets.sh.
set -eu
index=$1
failed=0 count=0
cmake_files="CMakeLists.txt $(find cmake tests examples bench -name CMakeLists.txt -o -name '*.cmake' -o -name '*.cmake.in' 2>/dev/null | LC_ALL=C sort)"

tab=$(printf '\t')
names() { # kind, name and place of everything that a block names, one a line; lines that end with a backslash go on
    while IFS=$tab read -r page line language comment file; do
        case $comment in 'not compiled: '*) continue ;; esac
        case $language in
        cmake | sh) ;;
        *) continue ;;
        esac
        awk -v place="$page:$line" -v language="$language" '
        function say(kind, name) { print kind "\t" name "\t" place }
        function all(kind, text, pattern) {
            while (match(text, pattern)) { say(kind, substr(text, RSTART, RLENGTH)); text = substr(text, RSTART + RLENGTH) }
        }
        { sub(/(^|[ \t])#.*/, "") }
        { whole = whole $0 }
        sub(/\\$/, "", whole) { next }
        {
            text = whole
            whole = ""
            all("variable", text, "KVARN_[A-Z_]+")
            if (language == "cmake") {
                all("target", text, "kvarn::[a-z_]+")
                all("function", text, "kvarn_[a-z_]+\\(")
                next
            }
            n = split(text, word, /[ \t;()=]+/)
            program = ""
            for (i = 1; i <= n; ++i) {
                if (word[i] == "--preset") say("preset", word[i + 1])
                if (word[i] == "--target") say("build", word[i + 1])
                if (word[i] ~ /^(\.\.\/)*(build\/)?(examples|tests|bench|cmake|docs|include)\/[A-Za-z0-9_.\/-]+$/) {
                    path = word[i]
                    gsub(/^(\.\.\/)*/, "", path)
                    say(path ~ /^build\// || word[i] ~ /^\.\.\// ? "built" : "path", path)
                }
                name = word[i]
                if (name ~ /(^|\/)examples\//) sub(/.*\//, "", name)
                else if (i > 1 && word[i - 1] != "&&") name = ""
                if (name == "kvarn" || name == "language_model" || name == "serving") {
                    program = name
                    if (name == "kvarn" && word[i + 1] != "") say("command", word[i + 1])
                }
                if (word[i] == "&&" || word[i] == "|") program = ""
                if (program != "" && word[i] ~ /^--[a-z-]+$/) say("flag", program " " word[i])
            }
        }' "$file"
    done <"$index" | LC_ALL=C sort -u
}

benchmarks=$(find bench -name '*_bench.cpp' 2>/dev/null | sed 's,^bench/,kvarn_,; s,/,_,g; s,\.cpp$,,')

missing() {
    echo "$place names a $kind that is not there: $name" >&2
    failed=1
}
names >"$index.names"
while IFS=$tab read -r kind name place; do
    count=$((count + 1))
    case $kind in
    variable) grep -rqw --include=CMakeLists.txt --include='*.cmake' --include='*.sh' --include='*.cpp' --exclude-dir='build*' -- "$name" . || missing ;;
    target) grep -qw -- "$name" $cmake_files || missing ;;
    function) grep -qF -- "function(${name%(}" $cmake_files || missing ;;
    preset) grep -qF "\"name\": \"$name\"" CMakePresets.json || missing ;;
    build)
        echo "$benchmarks" | grep -qxF -- "$name" ||
            grep -qE "(add_custom_target|add_executable|add_library)\($name( |\)|\$)" $cmake_files || missing
        ;;
    path) [ -e "$name" ] || missing ;;
    built)
        name=${name#build/}
        case $name in
        bench/*) echo "$benchmarks" | grep -qxF -- "${name#bench/}" || missing ;;
        *) [ -d "${name%/*}" ] || missing ;;
        esac
        ;;
    command) grep -qF "\"$name\"" examples/kvarn/*.?pp || missing ;;
    flag)
        program=${name% *}
        grep -qF -- "${name#* }" "examples/$program"/*.?pp || missing
        ;;
    esac
done <"$index.names"
echo "$count names in blocks of CMake and shell"
exit $failed
