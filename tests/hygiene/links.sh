#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# links.sh <repository>: every relative link of every document leads to a file or folder, every anchor to a heading, every picture is there, and
# every page of docs/ and examples/ is within reach of docs/README.md; pages, and folders and files in `code`, that are named without a link are
# there too.
# Addresses on the web are not looked up.
set -eu
cd "$1"
work=$KVARN_WORK/${KVARN_LINKS_WORK:-links}
rm -rf "$work"
mkdir -p "$work"
pages=$(ls *.md; find docs examples tests -name '*.md' | LC_ALL=C sort)

# `anchors`: page, anchor, as GitHub makes them of headings. `links`: page, line, target. Code is no text.
: >"$work/anchors"
: >"$work/links"
for page in $pages; do
    awk -v page="$page" -v anchors="$work/anchors" -v links="$work/links" '
    /^ *```/ { inside = !inside; next }
    inside { next }
    /^#+ / {
        text = $0
        sub(/^#+ +/, "", text)
        while (match(text, /\]\([^)]*\)/)) text = substr(text, 1, RSTART - 1) substr(text, RSTART + RLENGTH)
        text = tolower(text)
        gsub(/[^a-z0-9_ -]/, "", text)
        gsub(/ /, "-", text)
        if (seen[text]++) text = text "-" (seen[text] - 1)
        print page "\t" text >>anchors
    }
    {
        text = $0
        gsub(/`[^`]*`/, "", text)
        while (match(text, /\]\([^) ]+\)/)) {
            print page "\t" NR "\t" substr(text, RSTART + 2, RLENGTH - 3) >>links
            text = substr(text, RSTART + RLENGTH)
        }
    }' "$page"
done

tab=$(printf '\t')
failed=0
: >"$work/reaches"
while IFS=$tab read -r page line target; do
    case $target in
    *://* | mailto:*) continue ;;
    esac
    path=${target%%#*} anchor=
    case $target in *#*) anchor=${target#*#} ;; esac
    if [ -z "$path" ]; then
        to=$page
    else
        to=$(dirname "$page")/$path
        to=$(echo "$to" | sed -e 's,^\./,,' -e ':again' -e 's,[^/.][^/]*/\.\./,,' -e 't again' -e 's,/$,,')
    fi
    if [ ! -e "$to" ]; then
        echo "$page:$line: no such file: $target" >&2
        failed=1
    elif [ -n "$anchor" ] && ! grep -qxF "$to$tab$anchor" "$work/anchors"; then
        echo "$page:$line: no such heading: $target" >&2
        failed=1
    fi
    printf '%s\t%s\n' "$page" "$to" >>"$work/reaches"
done <"$work/links"

# From the landing page over links, as far as they lead.
awk -v start=docs/README.md '
BEGIN { FS = "\t"; reached[start] = 1 }
{ from[NR] = $1; to[NR] = $2 }
END {
    do {
        more = 0
        for (i = 1; i <= NR; ++i)
            if (reached[from[i]] && !reached[to[i]]) { reached[to[i]] = 1; more = 1 }
    } while (more)
    for (page in reached) print page
}' "$work/reaches" | LC_ALL=C sort >"$work/reached"
for page in $pages; do
    case $page in docs/* | examples/*) ;; *) continue ;; esac
    grep -qxF "$page" "$work/reached" || {
        echo "$page: no link leads here from docs/README.md" >&2
        failed=1
    }
done
grep -q "^README.md${tab}docs/README.md\$" "$work/reaches" || {
    echo "README.md has no link to docs/README.md" >&2
    failed=1
}

# Pages by name, in comments above all.
grep -rIoE 'docs/[a-z0-9_./-]+\.(md|svg)' --exclude-dir='build*' --exclude-dir=.git --exclude='*self_test.sh' --exclude=vcpkg.json . >"$work/mentions" || true
while IFS=: read -r file mention; do
    [ -e "$mention" ] || {
        echo "$file: no such page: $mention" >&2
        failed=1
    }
done <"$work/mentions"

# Folders and files, and headers as they are included.
grep -oHE '`(tests|examples|bench|cmake|docs|include|kvarn)/[A-Za-z0-9_./-]+`' $pages | tr -d '`' | sed 's,:kvarn/,:include/kvarn/,' >"$work/paths" || true
while IFS=: read -r page path; do
    [ -e "$path" ] || {
        echo "$page: no such file: $path" >&2
        failed=1
    }
done <"$work/paths"

echo "$(wc -l <"$work/links") links in $(echo "$pages" | wc -l) documents"
[ -s "$work/links" ] || failed=1
exit $failed
