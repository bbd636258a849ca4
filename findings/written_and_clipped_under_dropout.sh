#!/usr/bin/env bash
# trl 1.16.0 with peft 0.21.2 and transformers 5.23.0
#
# GRPOTrainer, RLOOTrainer and DistillationTrainer write the student's completions in training mode and leave dropout on unless `disable_dropout=True`
# is set: with `lora_dropout`, the text is not that of the model that is saved. RLOO always, GRPO where several steps learn from one generation, compute the
# old log-probs under another draw of it than the new ones, so that the ratio of the two is not 1 where no weight has changed, and completions are clipped.
# No error, no warning.
#
# Seen: eight rows of one prompt, an adapter with random weights on all linear layers, learning rate 0. With top_k=1 the eight completions are one text
# without dropout and with disable_dropout=True; with lora_dropout=0.05 they are eight in all three trainers. Without top_k, RLOO's first step clips
# no completion without dropout and six of eight with 0.05; GRPO with steps_per_generation=4 clips no token and 27%.
#
# Why it matters: 0.05 is the lora_dropout of TRL's own ModelConfig, which its command line reads, and GKD, GOLD, IW-OPD, SDFT and SDPO switch it off by
# default. On-policy distillation and rewards then learn from text that the saved student would not write, under a trust region that noise has used up.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
ROWS = 8
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.1))


def run(name, dropout, **more):
    """Of the first step: how many texts the rows' completions are, and the share that is clipped."""
    Config, Its = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}.get(name, (DistillationConfig, DistillationTrainer))
    rewarded = name != "DistillationTrainer"
    special = {"num_generations": ROWS} if rewarded else {}
    plain = {"per_device_train_batch_size": ROWS, "max_completion_length": 24, "max_steps": 1, "learning_rate": 0.0}
    others = {"reward_funcs": lambda completions, **_: [float(n % 2) for n in range(len(completions))]} if rewarded else {"teacher_model": model_of(1)}
    with tempfile.TemporaryDirectory() as output:
        trainer = Its(
            model=model_of(0),
            args=Config(output, **plain, **special, **QUIET, **more),
            train_dataset=Dataset.from_list([{"prompt": "Say a word: "}] * ROWS),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_dropout=dropout, init_lora_weights=False, target_modules="all-linear"),
            **others,
        )
        written, generate = [], trainer.model.generate

        def kept(*args, **kwargs):
            written.append(generate(*args, **kwargs))
            return written[-1]

        trainer.model.generate = kept
        trainer.train()
    clipped = next(row for row in trainer.state.log_history if "loss" in row).get("clip_ratio/region_mean")
    return len({tuple(row) for row in written[0].tolist()}), clipped


good = True
for name in ("GRPO", "RLOO", "DistillationTrainer"):
    texts = [run(name, *own, top_k=1)[0] for own in ((0.0,), (0.05,))] + [run(name, 0.05, top_k=1, disable_dropout=True)[0]]
    print(f"seen: {name}, greedy texts of {ROWS} rows: {texts[0]} without dropout, {texts[1]} with lora_dropout=0.05, {texts[2]} with disable_dropout")
    good = good and texts[0] == texts[2] == 1 and texts[1] > 1
for name, what, more in (("RLOO", "as it comes", {}), ("GRPO", "steps_per_generation=4", {"steps_per_generation": 4})):
    shares = [run(name, 0.0, **more)[1], run(name, 0.05, **more)[1], run(name, 0.05, disable_dropout=True, **more)[1]]
    print(f"seen: {name}, {what}, clipped before any update: {shares[0]:.3f} without dropout, {shares[1]:.3f} with 0.05, {shares[2]:.3f} with disable_dropout")
    good = good and shares[0] == shares[2] == 0 and shares[1] > 0
sys.exit(not good)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | { grep '^seen' || true; } || { cat "$folder/warnings"; exit 1; }
