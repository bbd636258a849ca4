#!/usr/bin/env bash
# torch 2.13.0 (Intel MKL 2024.2, oneDNN 3.12)
#
# On an AMD processor with AVX-512, torch takes twice as long for a matrix product in float32 as it could. It gives linear layers to MKL,
# which uses AVX2 alone there, and MKL_ENABLE_INSTRUCTIONS=AVX512 changes nothing. oneDNN, which torch is built with too and gives products
# in half precision to, uses AVX-512. torch 2.13 has no setting that sends float32 there.
#
# Seen, on one thread of an EPYC of family 26: 256 rows through a layer of 896 x 4864 take 22 ms by linear, also with
# MKL_ENABLE_INSTRUCTIONS=AVX512, and 10 ms by oneDNN. The results differ by float32's rounding.
#
# Why it matters to people who distil across tokenizers: on a laptop with such a processor (Ryzen 7000 and later) the teacher's
# scores, the student's text and its gradients are nearly all products in float32.
set -euo pipefail

if ! grep -q AuthenticAMD /proc/cpuinfo || ! grep -q avx512f /proc/cpuinfo; then
    echo "This needs an AMD processor with AVX-512."
    exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy

cat > "$folder/show.py" <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)


def milliseconds(product) -> float:
    least = float("inf")
    for _ in range(20):
        begin = time.process_time()
        product()
        least = min(least, time.process_time() - begin)
    return 1000 * least


rows, weight = torch.randn(256, 896), torch.randn(4864, 896)
by_linear = milliseconds(lambda: torch.nn.functional.linear(rows, weight))
by_onednn = milliseconds(lambda: torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], ""))
print(f"linear {by_linear:.1f} ms, oneDNN {by_onednn:.1f} ms")
sys.exit(0 if by_linear > 1.4 * by_onednn else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
MKL_ENABLE_INSTRUCTIONS=AVX512 "$folder/venv/bin/python" "$folder/show.py"
