#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# snippets.sh <C++ compiler> <C compiler> <repository>: the code in the documents compiles without warnings, as it is printed,
# and what is printed as a program runs.
#
#   ```cpp, ```c, ```cuda     a whole source file; with a main it is linked and must return 0 (CUDA is compiled with snippets/cuda only)
#   <!-- snippet: NAME -->    in the line before: a part, which takes the place of the line `// snippet: NAME` of the page's frame,
#                             snippets/<page>.cpp (.c, .cu), a whole source file again. Every part has its place, every place its part.
#                             A line `// flags: -I ...` of a frame has flags of its own, with paths from the repository
#   <!-- snippet: not compiled: WHY -->
#   ```python                 its syntax, where there is a python3
#
# Blocks of CMake and shell are not run; what they name must exist (snippet_names.sh).
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
cxx=$1 cc=$2 root=$3
frames=${KVARN_SNIPPET_FRAMES:-$here/snippets}
work=$KVARN_WORK/${KVARN_SNIPPET_WORK:-snippets}
rm -rf "$work"
mkdir -p "$work"
failed=0
fail() {
    echo "$*" >&2
    failed=1
}

# One file for each block, and a line in `index`: page, line, language, comment, file. Each file says first where it is from.
cd "$root"
pages=$(ls *.md; find docs examples -name '*.md' | LC_ALL=C sort)
: >"$work/index"
for page in $pages; do
    awk -v page="$page" -v work="$work" '
    BEGIN { stem = page; gsub(/\//, "_", stem); comment = "-" }
    inside && /^ *```$/ { close(file); inside = 0; comment = "-"; next }
    inside { print >file; next }
    /^ *```[a-z]*$/ {
        language = $0
        sub(/^ *```/, "", language)
        file = work "/" stem "." NR
        inside = 1
        printf "%s\t%d\t%s\t%s\t%s\n", page, NR, language == "" ? "text" : language, comment, file
        printf "" >file
        if (language ~ /^(cpp|c|cuda)$/) printf "#line %d \"%s\"\n", NR + 1, page >file
        next
    }
    comment != "-" { printf "%s:%d: no code follows a comment on snippets\n", page, NR >"/dev/stderr"; bad = 1; comment = "-" }
    /^<!-- snippet: .* -->$/ {
        comment = $0
        sub(/^<!-- snippet: /, "", comment)
        sub(/ -->$/, "", comment)
    }
    END {
        if (inside) { printf "%s: a block of code does not end\n", page >"/dev/stderr"; bad = 1 }
        exit bad
    }' "$page" >>"$work/index" || failed=1
done

# compile <file> <language> <name>: without warnings; runs it where it has a main.
programs=0 sources=0 parts=0 flags=
compile() {
    source=$1 language=$2 name=$3 library=
    case $language in
    c) set -- "$cc" -x c -std=c11 -pedantic -I "$KVARN_INCLUDE" ;;
    cuda) set -- "$cxx" -x c++ -std=c++20 -D__CUDACC__ -I "$here/snippets/cuda" -include cuda_runtime.h -isystem "$KVARN_INCLUDE" ;;
    *) set -- "$cxx" -x c++ -std=c++20 -fno-exceptions -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" ;;
    esac
    set -- "$@" $flags -Wall -Wextra -Wshadow -Werror
    sources=$((sources + 1))
    # A program in C wants the library for C, which a test hands over where it was built.
    if [ "$language" = c ] && grep -q '<kvarn/c/' "$source"; then
        library=${KVARN_C_LIBRARY:-none}
    fi
    if [ "$language" = cuda ] || [ "$library" = none ] || ! grep -q '^int main(' "$source"; then
        "$@" -fsyntax-only "$source" || fail "FAILED: $name does not compile"
        return 0
    fi
    programs=$((programs + 1))
    "$@" "$source" -x none $library ${library:+"-Wl,-rpath,$(dirname "$library")"} -o "$source.program" || {
        fail "FAILED: $name does not compile"
        return 0
    }
    echo "$name:"
    (cd "$work" && "$source.program") || fail "FAILED: $name returned $?"
}

python=$(command -v python3 || true)
tab=$(printf '\t')
while IFS=$tab read -r page line language comment file; do
    case $language in
    cpp | c | cuda) ;;
    python)
        [ -z "$python" ] || "$python" -c 'import ast, sys; ast.parse(open(sys.argv[1]).read(), sys.argv[1])' "$file" ||
            fail "FAILED: $page:$line is no Python"
        continue
        ;;
    *) continue ;;
    esac
    case $comment in
    -) compile "$file" "$language" "$page:$line" ;;
    'not compiled: '?*) echo "$page:$line: $comment" ;;
    '' | *[!a-z0-9_]*) fail "$page:$line: no such comment: $comment" ;;
    *)
        parts=$((parts + 1))
        mkdir -p "$work/parts/$page"
        [ ! -e "$work/parts/$page/$comment" ] || fail "$page:$line: a second part $comment"
        cp "$file" "$work/parts/$page/$comment"
        ;;
    esac
done <"$work/index"

for page in $pages; do
    for language in cpp c cu; do
        frame=${page%.md}.$language whole=$work/$(echo "$page" | tr / _).whole.$language
        [ -e "$frames/$frame" ] || continue
        awk -v folder="$work/parts/$page" -v frame="$frame" -v used="$work/used" '
        /^ *\/\/ snippet: [a-z0-9_]+$/ {
            part = folder "/" $NF
            lines = 0
            while ((getline text <part) > 0) { print text; lines++ }
            close(part)
            if (lines != 0) print part >used
            else { printf "%s:%d: the page has no part %s\n", frame, NR, $NF >"/dev/stderr"; bad = 1 }
            printf "#line %d \"%s\"\n", NR + 1, frame
            next
        }
        { print }
        END { exit bad }' "$frames/$frame" >"$whole" || failed=1
        [ $language != cu ] || language=cuda
        flags=$(sed -n 's,^// flags: ,,p' "$frames/$frame")
        compile "$whole" $language "$page in its frame"
    done
    for part in "$work/parts/$page"/*; do
        [ ! -e "$part" ] || grep -qxF "$part" "$work/used" 2>/dev/null || fail "$page: the frame has no place for the part ${part##*/}"
    done
done

sh "$here/snippet_names.sh" "$work/index" || failed=1
echo "$sources source files, of which $programs ran, with $parts parts"
[ $sources -gt 0 ] || fail "no code was found"
exit $failed
