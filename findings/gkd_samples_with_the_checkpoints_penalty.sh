#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GKDTrainer and GOLDTrainer give `generate` a config of their own with temperature, top_k and top_p. What it does not name is filled up from the
# student's generation_config.json: repetition_penalty, min_p, suppress_tokens and the like. DistillationTrainer names the penalty. No error,
# no warning.
#
# Seen: with repetition_penalty=1.05 in the student's generation config, as published Qwen2.5 instruct models have one, and temperature and
# top_p 1, the text is shaped by ['RepetitionPenaltyLogitsProcessor'] in GKD and GOLD, and by nothing in Distillation.
#
# Why it matters: the text is then not the student's own, whose log-probs are trained without the penalty: on-policy distillation from another
# distribution, and a comparison with another trainer compares the penalties. Set model.generation_config to a new GenerationConfig, with
# its eos_token_id, before training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

print(f"trl {trl.__version__}, transformers {transformers.__version__}")
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
config = LlamaConfig(
    vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
)
question = {"role": "user", "content": "hello"}
messages = Dataset.from_list([{"messages": [question, {"role": "assistant", "content": "world"}]}] * 2)
prompts = Dataset.from_list([{"prompt": [question]}] * 2)
KINDS = {
    "GKD": (GKDTrainer, GKDConfig, {"max_new_tokens": 4, "lmbda": 1.0}, messages),
    "GOLD": (GOLDTrainer, GOLDConfig, {"max_completion_length": 4, "max_length": 64, "lmbda": 1.0, "top_p": 1.0}, messages),
    "Distillation": (DistillationTrainer, DistillationConfig, {"max_completion_length": 4}, prompts),
}
found = {}
for name, (trainer, settings, own, dataset) in KINDS.items():
    student, teacher = (LlamaForCausalLM(config) for _ in range(2))
    student.generation_config.update(
        repetition_penalty=1.05, do_sample=True, temperature=0.7, top_p=0.8, top_k=20
    )  # as a published Qwen2.5 instruct model's
    shaped = []

    def processors(*args, original=student._get_logits_processor, seen=shaped, **kwargs):
        chosen = original(*args, **kwargs)
        seen.append([type(processor).__name__ for processor in chosen])
        return chosen

    student._get_logits_processor = processors
    folder = str(Path(sys.argv[1]) / name)
    common = {
        "temperature": 1.0,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer(
        model=student,
        teacher_model=teacher,
        args=settings(output_dir=folder, **common, **own),
        train_dataset=dataset,
        processing_class=tokenizer,
    ).train()
    found[name] = shaped[0]
    print(f"{name}: temperature 1, top_p 1; the student's text was shaped by {found[name]}")
sys.exit(
    {name: any("Repetition" in processor for processor in own) for name, own in found.items()}
    != {"GKD": True, "GOLD": True, "Distillation": False}
)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep -v '^{' "$folder/seen"
