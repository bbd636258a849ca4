#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0
#
# SFTTrainer with packing=True (or padding_free=True) puts several texts into one row, without an attention mask. That a text does not see those
# before it is left to the model: from positions that begin again, transformers makes a mask for any attention. gpt-oss, AFMoE (Trinity), OPT
# and Bloom do not hand the positions on to it: with the attention that they have by default, each text sees all that stand before it in the row.
# There is no error and no warning. Flash attention, which reads the positions itself, was not tried here.
#
# Seen, random weights, three texts in one row as SFTTrainer packs them: log-probs differ from those of the texts alone by less than 1e-4 in Llama,
# Qwen3, Gemma 3 and Mixtral, and by 2 to 7 nats in gpt-oss, AFMoE, OPT and Bloom, for all texts but the first.
#
# Why it matters: a student or teacher of these families that is prepared by SFT on packed texts learns to continue one conversation with
# another's words before it, and its losses are not those of the same data without packing. gpt-oss has no sdpa attention, so its default is
# "eager". Compare a packed row with its texts alone before training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from trl import SFTConfig, SFTTrainer

ROLES = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2, **ROLES)
LATER = dict(SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_experts_per_tok=2, num_local_experts=4)
CONFIGS = {
    "Llama": LlamaConfig(**LATER),
    "Qwen3": Qwen3Config(**LATER),
    "Gemma 3": Gemma3TextConfig(**LATER),
    "Mixtral": MixtralConfig(**LATER, **EXPERTS),
    "gpt-oss": GptOssConfig(**LATER, **EXPERTS),
    "AFMoE": AfmoeConfig(**LATER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "OPT": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2, dropout=0.0),
    "Bloom": BloomConfig(**SIZES),
}
APART = {"Llama", "Qwen3", "Gemma 3", "Mixtral"}

words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w3"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
drawn = torch.Generator().manual_seed(0)
texts = [torch.randint(3, 97, (length,), generator=drawn).tolist() for length in (12, 9, 14)]


@torch.no_grad()
def differences(config):
    """Of each text in the row that the trainer packs: the largest difference of a log-prob from the text alone."""
    torch.manual_seed(0)
    settings = SFTConfig(
        output_dir=sys.argv[1], packing=True, max_length=64, per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in texts]),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    batch.pop("labels")
    model = trainer.model.eval()
    ids, starts = batch["input_ids"][0], (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    packed = model(**batch, use_cache=False).logits[0].log_softmax(-1)  # use_cache=False as in the trainer's loss
    ends = [*starts[1:], len(ids)]
    alone = [model(ids[None, start:end], use_cache=False).logits[0].log_softmax(-1) for start, end in zip(starts, ends, strict=True)]
    found = [(packed[start:end] - own).abs().max().item() for start, end, own in zip(starts, ends, alone, strict=True)]
    return model.config._attn_implementation, found


right = True
for name, config in CONFIGS.items():
    attention, found = differences(config)
    print(f"seen: {name}, {attention} attention: texts of the row differ by {', '.join(f'{one:.1e}' for one in found)} from the same alone")
    apart = max(found) < 1e-3
    right &= len(found) == len(texts) and (apart if name in APART else found[0] < 1e-3 and min(found[1:]) > 0.1)
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/run" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
