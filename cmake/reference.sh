#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# reference.sh <doxygen> <repository> <output>: the reference of the headers in <output>/html. Every warning is an error: names that lead nowhere,
# commands that Doxygen does not know, functions, types and constants of the public namespaces without a comment. Only members of a type,
# specialisations, macros, and functions for C that share a comment may be without one. Exit code 77: there is no Doxygen.
set -eu
doxygen=$1 root=$2 output=$3
command -v "$doxygen" >/dev/null 2>&1 || {
    echo "no Doxygen (Debian and Ubuntu: doxygen)"
    exit 77
}
cd "$root"
rm -rf "$output"
mkdir -p "$output"
{ cat docs/Doxyfile && printf 'OUTPUT_DIRECTORY = "%s"\n' "$output"; } | "$doxygen" - >"$output/said.txt" 2>&1 || {
    cat "$output/said.txt"
    exit 1
}
said=$(grep -Ev 'warning: (Member .* of (struct|class) .*|Member .* \(function\) of file kvarn\.h|Member .* \(macro definition\) .*|Compound [^ ]*<.*>) is not documented\.$' "$output/said.txt" || true)
if [ -n "$said" ]; then
    printf '%s\n' "$said"
    exit 1
fi
[ -s "$output/html/index.html" ] || {
    echo "Doxygen $("$doxygen" --version) made no index.html"
    exit 1
}
echo "$output/html/index.html, $(find "$output/html" -name '*.html' | wc -l) pages"
