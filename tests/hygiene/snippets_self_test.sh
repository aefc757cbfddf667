#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# snippets_self_test.sh <C++ compiler> <C compiler>: snippets.sh accepts good documents and finds each kind of mistake.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
tree=$KVARN_WORK/snippets_self_test
failed=0

page() { printf '%s\n' "$@" >"$tree/docs/a.md"; }
frame() { printf '%s\n' "$@" >"$tree/frames/docs/a.cpp"; }
# case_of <ok|bad> <what>: of the page and the frame as they are now; then all is empty again.
case_of() {
    if KVARN_SNIPPET_FRAMES=$tree/frames KVARN_SNIPPET_WORK=snippets_self_test.work sh "$here/snippets.sh" "$cxx" "$cc" "$tree" >"$tree.log" 2>&1; then
        found=ok
    else
        found=bad
    fi
    if [ "$found" != "$1" ]; then
        echo "expected $1, got $found: $2"
        cat "$tree.log"
        failed=1
    fi
    begin
}
begin() {
    rm -rf "$tree"
    mkdir -p "$tree/docs" "$tree/examples/kvarn" "$tree/tests" "$tree/bench" "$tree/cmake" "$tree/frames/docs"
    printf '```cpp\nint main() { return 0; }\n```\n' >"$tree/README.md"
    echo 'option(KVARN_GOOD "") add_library(kvarn::kvarn ALIAS kvarn)' >"$tree/CMakeLists.txt"
    echo 'add_subcommand("plan") add_option("--context")' >"$tree/examples/kvarn/main.cpp"
    echo '{"name": "default"}' >"$tree/CMakePresets.json"
}
cxx=$1 cc=$2
begin

case_of ok 'a program'
page '```cpp' 'int main() { return 1; }' '```'
case_of bad 'a program that fails'
page '```cpp' 'int f() { return x; }' '```'
case_of bad 'code that does not compile'
page '```cpp' 'int f() { int x; return 0; }' '```'
case_of bad 'a warning'
page '```c' 'int f(void); int f(void) { return sizeof(struct { int x; }) != 0; }' '```'
case_of ok 'C'
page '```c' 'int f(void) { class x; }' '```'
case_of bad 'C++ in C'
page '```cuda' '__global__ void f() {}' 'void g(cudaStream_t s) { static_cast<void>(s); }' '```'
case_of ok 'CUDA'
if command -v python3 >/dev/null 2>&1; then
    page '```python' 'x = [1,' '     2]' '```'
    case_of ok 'Python'
    page '```python' 'x = [1,' '```'
    case_of bad 'no Python'
fi
page '<!-- snippet: one -->' '```cpp' 'return x;' '```'
frame 'int f(int x);' 'int f(int x)' '{' '    // snippet: one' '}'
case_of ok 'a part in its place'
page '<!-- snippet: one -->' '```cpp' 'return y;' '```'
frame 'int f(int x);' 'int f(int x)' '{' '    // snippet: one' '}'
case_of bad 'a part that does not compile'
page '<!-- snippet: one -->' '```cpp' 'return x;' '```'
case_of bad 'a part without a frame'
page '<!-- snippet: one -->' '```cpp' 'int x;' '```' '<!-- snippet: two -->' '```cpp' 'int y;' '```'
frame '// snippet: one'
case_of bad 'a part without a place'
page '<!-- snippet: one -->' '```cpp' 'int x;' '```'
frame '// snippet: one' '// snippet: two'
case_of bad 'a place without a part'
page '<!-- snippet: not compiled: it is not C++ -->' '```cpp' 'nonsense' '```'
case_of ok 'what is not compiled, with a reason'
page '<!-- snippet: not compiled: -->' '```cpp' 'nonsense' '```'
case_of bad 'what is not compiled, without a reason'
page '<!-- snippet: one -->' 'text'
case_of bad 'a comment without code'
page '```cpp' 'int x;'
case_of bad 'a block that does not end'
page '```cmake' 'target_link_libraries(engine PRIVATE kvarn::kvarn)' '```' '```sh' 'kvarn plan --context 3 && cmake --preset default -DKVARN_GOOD=ON' '```'
case_of ok 'names that are there'
for line in 'cmake -DKVARN_BAD=ON' 'cmake --preset bad' 'cmake --build build --target bad' 'sh tests/bad.sh' 'kvarn bad' 'kvarn plan --bad'; do
    page '```sh' "$line" '```'
    case_of bad "$line"
done
page '```cmake' 'target_link_libraries(engine PRIVATE kvarn::bad)' '```'
case_of bad 'a target that is not there'
page '```cmake' 'kvarn_bad(engine)' '```'
case_of bad 'a function that is not there'
exit $failed
