"""
Writes a teacher and a student with different tokenizers and templates, and prompts for them, to a folder. They are untrained and
small enough for any machine. They show that the parts of a run work together, not what it teaches.

```bash
python examples/small_models.py small
```
"""

import argparse
import json
from pathlib import Path

import torch
from demo.from_nothing import byte_level_bpe
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


TEXT = [f"What is {n} plus {n * 7 % 100}? It is {n + n * 7 % 100}, and {n} more than that." for n in range(1000)]
TEMPLATE = (
    "{{% for message in messages %}}<|{0}{{{{ message['role'] }}}}|>{{{{ message['content'] }}}}<|end|>{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|{0}assistant|>{{% endif %}}"
)


def tokenizer(rows: int, mark: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `rows` tokens, with its own turn markers."""
    special = ["<|end|>", *(f"<|{mark}{role}|>" for role in ("system", "user", "assistant"))]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(TEXT, rows, special),
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=special[1:],
        chat_template=TEMPLATE.format(mark),
    )


def save(folder: Path, rows: int, mark: str, width: int, layers: int, seed: int):
    """A Llama-shaped model with heads of size 64, which vLLM's CPU kernels need."""
    own = tokenizer(rows, mark)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=2048,
        initializer_range=0.1,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    own.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    save(folder / "teacher", rows=500, mark="", width=256, layers=4, seed=1)
    save(folder / "student", rows=320, mark="s-", width=128, layers=2, seed=0)
    prompts = [{"prompt": [{"role": "user", "content": text.partition("?")[0] + "?"}]} for text in TEXT]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    print(f"{folder}: teacher, student, prompts.jsonl")
