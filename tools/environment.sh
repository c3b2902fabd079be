#!/usr/bin/env bash
# usage: tools/environment.sh FOLDER [REQUIREMENT...]
#
# Makes a virtual environment in FOLDER with mplus (editable), its tests and its docs, at the versions of
# constraints.txt. A REQUIREMENT such as transformers==5.17.0 replaces the pinned version of that package and
# sets free the packages whose versions follow from it.
#
# torch comes first. Where there is no NVIDIA GPU it is taken from PyTorch's CPU index, which saves gigabytes; where
# that index does not answer within a few seconds, from the indexes pip is configured with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu_index=https://download.pytorch.org/whl/cpu
folder=$1
shift

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(f"mplus needs Python 3.11 or newer, {sys.executable} is {sys.version}" if sys.version_info < (3, 11) else 0)'
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)

constraints=constraints.txt
if [ $# -gt 0 ]; then
    constraints=$folder/constraints.txt
    replaced=$(printf '%s\n' "$@" | sed 's/[^A-Za-z0-9_.-].*//' | paste -sd '|')
    grep -viE "^($replaced|hf-xet|huggingface_hub|tokenizers)==" constraints.txt > "$constraints"
fi

index=()
if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L > /dev/null 2>&1; then
    # Asked here rather than left to pip, which would retry for minutes, once for every package.
    if "$folder/bin/python" -c 'import sys, urllib.request as request; request.urlopen(sys.argv[1], timeout=5)' \
        "$cpu_index/torch/" 2> /dev/null; then
        index=(--extra-index-url "$cpu_index")
    else
        echo "No NVIDIA GPU found, but $cpu_index does not answer: torch comes from pip's own indexes," \
            "perhaps as a larger build for GPUs."
    fi
fi

# Python compiles a module when it is first imported; compiling all of them here would take three quarters of a minute.
"${pip[@]}" install --no-compile -c "$constraints" ${index[@]+"${index[@]}"} torch
"${pip[@]}" install --no-compile --upgrade -c "$constraints" ${index[@]+"${index[@]}"} -e '.[dev,docs]' "$@"
