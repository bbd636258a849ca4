#!/usr/bin/env bash
# torch 2.13.0
#
# `torch.multinomial(probabilities, n, replacement=True)` with n above 1 adds probabilities up in their own dtype, on a CPU, in the order of
# the ids. In float32 a token of less than some 3e-8 adds nothing once nearly all probability lies before it, and is never drawn, however many
# of them there are. One draw, or float64, is exact. (Known for other input: pytorch issue 43115.)
#
# Seen: a vocabulary of 50,000 where one token has 0.999 and all others share 0.001, 400,000 draws, of which some 400 should be others:
#     the likely token has id 0: none in float32, some 400 in float64, and some 400 if each is drawn by itself
#     it has the last id: some 400 in float32
#
# Why it matters to people who distil across tokenizers: teachers' distributions are kept as a few tokens that are drawn from them, with
# replacement (sparse logit sampling, arXiv 2503.16870, unbiased if the draws are), and sampled estimates of a KL draw several tokens a place.
# Sure places of a large vocabulary then have no tail, and which tokens are missing depends on their ids, which differ between tokenizers.
# `probabilities.double()` is the way out.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy

cat > "$folder/show.py" <<'PYTHON'
import torch

VOCABULARY, TAIL, DRAWS = 50_000, 1e-3, 400_000


def others(likely: int, dtype: torch.dtype, at_once: int) -> int:
    """How many of the draws, `at_once` by a call for each row, are not the likely token."""
    logits = torch.full((VOCABULARY,), TAIL / (VOCABULARY - 1)).log()
    logits[likely] = torch.tensor(1 - TAIL).log()
    probabilities = logits.softmax(-1).to(dtype)
    rows = min(1000, DRAWS // at_once)
    found = 0
    for _ in range(DRAWS // at_once // rows):
        drawn = torch.multinomial(probabilities.expand(rows, -1), at_once, replacement=True)
        found += int((drawn != likely).sum())
    return found


torch.manual_seed(0)
first, last = 0, VOCABULARY - 1
lost = others(first, torch.float32, 400)
print("400 draws a call, the likely token first, float32:", lost)
kept = {
    "the same in float64": others(first, torch.float64, 400),
    "the same in float32, the likely token last": others(last, torch.float32, 400),
    "one draw a call, float32, the likely token first": others(first, torch.float32, 1),
}
for name, number in kept.items():
    print(f"{name}:", number)
raise SystemExit(0 if lost == 0 and all(200 < number < 600 for number in kept.values()) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
