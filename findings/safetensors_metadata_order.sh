#!/usr/bin/env bash
# safetensors writes the metadata of a file in another order each time, also within one process.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11.
# Guessed: equal tensors and an equal metadata dict give equal bytes, as they do without metadata.
# Seen: 32 files of one dict with 4 keys are some 15 different ones of the same length and the same content; each is
#   read back rightly. Digests of such files, caches and builds keyed by them differ for nothing.
# Way out: sort `__metadata__` in the header after saving.
# Fails (exit 1) if all files are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet install safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

tensors = {"weight": np.arange(6, dtype=np.float32)}
metadata = {"format": "x/1", "model": "small", "image_size": "32", "recipe": "first"}
files = {save(tensors, metadata) for _ in range(32)}
plain = {save(tensors) for _ in range(32)}
print(f"safetensors {safetensors.__version__}: {len(files)} different files of 32 with metadata, {len(plain)} without")
assert all((load(file)["weight"] == tensors["weight"]).all() for file in files)
assert len({len(file) for file in files}) == 1
sys.exit(0 if len(files) > 1 and len(plain) == 1 else 1)
PYTHON
