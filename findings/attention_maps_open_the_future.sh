#!/usr/bin/env bash
# transformers 5.23.0
#
# A Falcon under SDPA, the default, that is asked for `output_attentions=True` leaves SDPA and adds its mask to the scores, and the mask is made for SDPA. With
# rotary embeddings it is one of booleans, which are added as 1 and 0: every token sees those behind it. With ALiBi (`alibi=True`) it holds the bias for the
# distance already, which is added once more; eager attention does the same without being asked for maps. No error, no warning.
#
# Seen: random models of two layers in float32, log-probs of a text of 100 tokens, beside those of the default. Rotary embeddings, asked for the maps: off
# by up to 2.9 nats (1.2 with `new_decoder_architecture`); another last token changes the first fifty logits, and the first map has weights above its
# diagonal. Eager attention: 0.0000. ALiBi, asked for the maps or eager: off by up to 0.6. Its first layer's attention, computed by hand: with the bias once
# it is SDPA's, with the bias twice eager's.
#
# Why it matters: a teacher or student whose attention maps are read as well, for a loss on them or to look at, gives log-probs that know what comes next, or
# those of another model, to the distillation. Load a rotary Falcon with `attn_implementation="eager"` to read its maps; leave one with ALiBi at SDPA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import math
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, logging

logging.set_verbosity_error()
warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
ROWS, WIDTH, HEADS = 320, 128, 4
sizes = {"vocab_size": ROWS, "hidden_size": WIDTH, "initializer_range": 0.1}
old = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False, "bias": True}
text = torch.randint(3, ROWS, (1, 100), generator=torch.Generator().manual_seed(1))
other_end = torch.cat([text[:, :-1], (text[:, -1:] + 1) % ROWS], 1)


def kinds(name, model):
    """How far eager attention, and SDPA with attention maps, are from SDPA; and the first layer's attention under SDPA and eager."""
    model.save_pretrained(folder / name)
    log_probs, first, leak, above = {}, {}, {}, {}
    for kind in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation=kind).eval()
        for maps in (False, True):
            [attention] = [module for key, module in loaded.named_modules() if key.endswith("h.0.self_attention")]
            kept = attention.register_forward_hook(lambda module, inputs, output, key=(kind, maps): first.update({key: output[0]}))
            with torch.no_grad():
                answer = loaded(text, output_attentions=maps)
                logits = answer.logits
                kept.remove()
                leak[kind, maps] = (loaded(other_end, output_attentions=maps).logits - logits)[0, :50].abs().max().item()
            above[kind, maps] = answer.attentions[0].triu(1).abs().max().item() if maps else 0.0
            log_probs[kind, maps] = logits[0].log_softmax(-1)[range(99), text[0, 1:]]
    off = {key: (value - log_probs["sdpa", False]).abs().max().item() for key, value in log_probs.items()}
    print(f"seen: {name}: beside SDPA, eager off by {off['eager', False]:.4f}, SDPA with output_attentions=True by {off['sdpa', True]:.4f}")
    key = "sdpa", True
    print(f"seen: {name}: and with another last token the first 50 logits change by {leak[key]:.4f} (without maps {leak['sdpa', False]:.4f})")
    print(f"seen: {name}: the largest weight above the first map's diagonal is {above[key]:.4f} (eager {above['eager', True]:.4f})")
    opened = leak[key] > 0.1 and above[key] > 1e-3
    shut = max(figures[kind] for figures in (leak, above) for kind in leak if kind != key) < 1e-4
    return off["eager", False], off["sdpa", True], first["sdpa", False], first["eager", False], opened, shut


torch.manual_seed(0)
falcon = FalconForCausalLM(FalconConfig(**sizes, **old, alibi=True)).eval()
eager, maps, by_sdpa, by_eager, opened, shut = kinds("Falcon with ALiBi", falcon)
twice = eager > 0.1 and maps > 0.1 and shut and not opened
rotary = kinds("Falcon with rotary embeddings", FalconForCausalLM(FalconConfig(**sizes, **old, alibi=False)))
grouped = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}
newer = kinds("Falcon with grouped heads", FalconForCausalLM(FalconConfig(**sizes, **grouped)))
future = all(eager < 1e-3 and maps > 0.1 and opened and shut for eager, maps, _, _, opened, shut in (rotary, newer))

layer = falcon.transformer.h[0]
size = WIDTH // HEADS
with torch.no_grad():
    attention = layer.self_attention
    inputs = layer.input_layernorm(falcon.transformer.word_embeddings(text))
    query, key, value = attention.query_key_value(inputs)[0].view(100, HEADS, 3, size).permute(2, 1, 0, 3)
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)])
    bias = slopes[:, None, None] * torch.arange(100)
    ahead = torch.full((100, 100), -torch.inf).triu(1)
    off = {}
    for times in (1, 2):
        scores = (query @ key.transpose(1, 2) + times * bias) / math.sqrt(size) + ahead
        mine = attention.dense((scores.softmax(-1) @ value).transpose(0, 1).reshape(100, WIDTH))
        off[times] = [(mine - theirs[0]).abs().max().item() for theirs in (by_sdpa, by_eager)]
for times, (sdpa, other) in off.items():
    print(f"seen: the first attention by hand, the bias {times} time(s): off from SDPA's by {sdpa:.4f}, from eager's by {other:.4f}")
once_twice = off[1][0] < 1e-3 < 1e-2 < off[1][1] and off[2][1] < 1e-3 < 1e-2 < off[2][0]
sys.exit(not (twice and future and once_twice))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
