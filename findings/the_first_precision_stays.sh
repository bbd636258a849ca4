#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0
#
# A model that a Trainer has trained, and that a second Trainer trains on in the same process: Accelerate has put its autocast on the model's own
# forward pass and has marked the model as prepared, for which the second Trainer's preparation is left out. It computes in the precision of the first
# Trainer, whatever its own `bf16` says: in bfloat16 with `bf16=False`, in float32 with `bf16=True`. No error, no warning. The autocast also stays on
# the model when it is evaluated by itself after the training, where the model that is loaded from its saved weights has none.
#
# Seen: one step of a small Llama in each order. A step with `bf16=False` computes in float32, and in bfloat16 where one with `bf16=True` came before.
# A step with `bf16=True` computes in bfloat16, and in float32 where one with `bf16=False` came before. After a step with `bf16=True`, the model in
# memory and the model that is loaded from its saved folder have equal weights, and their log-probs differ by up to 0.15 nats.
#
# Why it matters: distillation comes in stages, such as SFT and then a loss whose small differences of log-probs ask for float32, often in one script.
# And what a student is compared with, itself before and after, loaded or in memory, is not computed alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

IDS = [[3 + n, 4 + n, 5, 6, 7 + n, 9, 3 + n * 3 % 61] for n in range(16)]
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def new_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 80}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3))


def train(model, bf16):
    """One step of a new Trainer. Returns the dtypes that the layers' products had in it."""
    seen = set()
    hooks = [m.register_forward_hook(lambda m, i, o: seen.add(o.dtype)) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    args = TrainingArguments(tempfile.mkdtemp(dir=sys.argv[1]), max_steps=1, per_device_train_batch_size=4, bf16=bf16, **quiet)
    Trainer(model, args, train_dataset=ROWS).train()
    for hook in hooks:
        hook.remove()
    return ", ".join(sorted(str(own).removeprefix("torch.") for own in seen))


found = {}
for name, stages in {"alone": [False], "bf16 alone": [True], "after bf16": [True, False], "bf16 after": [False, True]}.items():
    model = new_model()
    found[name] = [train(model, bf16) for bf16 in stages][-1]
print(f"seen: a step with bf16=False computes in {found['alone']}, of a model that was trained with bf16=True before in {found['after bf16']}")
print(f"seen: a step with bf16=True computes in {found['bf16 alone']}, of a model that was trained with bf16=False before in {found['bf16 after']}")

model = new_model()
train(model, True)
model.save_pretrained(sys.argv[1] + "/saved")
loaded = LlamaForCausalLM.from_pretrained(sys.argv[1] + "/saved")
ids = torch.tensor(IDS)
with torch.no_grad():
    one, other = (own.eval()(input_ids=ids).logits.log_softmax(-1) for own in (model, loaded))
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
apart = (one - other).abs().max().item()
print(f"seen: after bf16=True, the model in memory and the one that is loaded have equal weights: {same}; log-probs differ by up to {apart:.2f} nats")
sys.exit(
    (found["alone"], found["bf16 alone"], found["after bf16"], found["bf16 after"]) != ("float32", "bfloat16", "bfloat16", "float32")
    or not same
    or apart == 0
)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
