#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0
#
# A model with longrope (Phi-3, Phi-4-mini) has one set of rotary factors for texts up to original_max_position_embeddings, and another beyond.
# transformers chooses by the longest row of a forward pass, for all of its rows: the log-probs of a short text are others beside a long one
# than alone, though attention masks and padding are right. generate writes the first tokens of a text by the one set; once the text has
# grown, a forward pass reads them by the other.
#
# Seen, random weights, limit 64: a text of 48 tokens has -347.2 nats alone and beside one of 60, -335.6 beside one of 80. 16 tokens that were
# drawn with -38.2 nats, before the limit, have -123.3 when the finished text is read.
#
# Why it matters: a teacher's score of a text depends on what else is in its batch, and a student is trained on a policy that is not the one it
# was drawn from, with a ratio of e^85 here. Nothing warns of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, Phi3Config

LIMIT, PROMPT = 64, 48
torch.manual_seed(0)
rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0 + 2 * n for n in range(8)]}
sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
limits = dict(max_position_embeddings=512, original_max_position_embeddings=LIMIT, rope_parameters=rope)
model = AutoModelForCausalLM.from_config(
    Phi3Config(**sizes, **limits, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
).eval()
text, other = torch.randint(3, 97, (1, PROMPT)), torch.randint(3, 97, (1, 80))


@torch.no_grad()
def log_probs(ids, beside=None):
    """Of all tokens of `ids` but the first, in one pass with the row `beside`."""
    length = max(ids.shape[1], 0 if beside is None else beside.shape[1])
    rows = torch.zeros(1 if beside is None else 2, length, dtype=torch.long)
    rows[0, : ids.shape[1]] = ids[0]
    if beside is not None:
        rows[1, : beside.shape[1]] = beside[0]
    told = model(input_ids=rows, attention_mask=(rows != 0).long()).logits[0, : ids.shape[1] - 1].log_softmax(-1)
    return told.gather(1, ids[0, 1:, None])[:, 0]


alone, shorter, longer = (log_probs(text, row).sum().item() for row in (None, other[:, :60], other))
print(f"seen: {PROMPT} tokens alone {alone:.1f} nats, beside a row of 60 {shorter:.1f}, beside a row of 80 {longer:.1f}")
forbidden = {"suppress_tokens": [0, 1, 2]}  # so that the text grows
written = model.generate(
    text, do_sample=True, top_k=0, max_new_tokens=40, return_dict_in_generate=True, output_scores=True, **forbidden
)
drawn = [score.log_softmax(-1)[0, written.sequences[0, PROMPT + n]].item() for n, score in enumerate(written.scores)]
read = log_probs(written.sequences)[PROMPT - 1 :]
before = LIMIT - PROMPT
print(f"seen: {before} tokens drawn with {sum(drawn[:before]):.1f} nats, read with {read[:before].sum():.1f} once there are {len(drawn)}")
sys.exit(not (abs(alone - shorter) < 1e-2 < 1 < abs(alone - longer) and abs(sum(drawn[:before]) - read[:before].sum()) > 1))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
