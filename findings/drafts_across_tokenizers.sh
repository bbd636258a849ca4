#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3
#
# `generate(assistant_model=..., tokenizer=..., assistant_tokenizer=...)` lets a small model with another tokenizer draft what a large one samples.
# Drafts are meant to change the speed and not the distribution. Where the assistant has tokens that the large model has not:
# - The assistant's head is cut down to the common tokens in the order of a dictionary, and its probabilities are then read in the order of ids. So
#   the probability that a draft is said to have is another token's, and nearly every draft is accepted.
# - The assistant stays so for good: its head has fewer rows, in another order, and its embedding reads one token, the last. No error, no warning.
#
# Seen: a teacher that writes "a" with probability .5, and an assistant that writes it with .9, 300 samples: .5 alone, .5 with the assistant that has
# the teacher's tokenizer, .85 with the one that has two tokens more. The latter then gives a text of two tokens logits of one position and of 257
# tokens, where it gave two and 259.
#
# Why it matters: a student is its teacher's natural draft model, and across tokenizers this is how one is used. Answers that are sampled so
# come more from the student than from the teacher, and distillation from them teaches that much less; and the student in memory is spoiled.
# Greedy decoding is not affected. Give `generate` a copy of the student, and sample answers to learn from without it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import math
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def tokenizer_of(*merges):
    tokens = [*LETTERS, *(left + right for left, right in merges)]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(merges)))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>")


def model_of(tokenizer, probability):
    """A model that writes "a" with this probability and "b" otherwise, whatever it reads."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(-20 / 16)
        for letter, own in (("a", probability), ("b", 1 - probability)):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(letter)] = math.log(own) / 16
    return model


def share(own, draws=300, **settings):
    """How often the teacher writes "a" first."""
    torch.manual_seed(0)
    teacher, given = model_of(own, 0.5), own("ab", return_tensors="pt")
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 2, "pad_token_id": 0}
    texts = [teacher.generate(**given, **plain, **settings)[0, given.input_ids.shape[1] :] for _ in range(draws)]
    return sum(int(text[0]) == own.convert_tokens_to_ids("a") for text in texts) / draws


own, other = tokenizer_of(), tokenizer_of(("t", "h"), ("th", "e"))
alone = share(own)
same = share(own, assistant_model=model_of(own, 0.9))
student, text = model_of(other, 0.9), other("ab", return_tensors="pt")
before = tuple(student(**text).logits.shape)
across = share(own, tokenizer=own, assistant_model=student, assistant_tokenizer=other)
student(**text)  # the first reading after a draft may still be of all tokens
after = tuple(student(**text).logits.shape)
print(f"seen: the teacher writes 'a' with {alone:.2f} alone, {same:.2f} with an assistant of its tokenizer, {across:.2f} across tokenizers")
print(f"seen: the assistant's logits of a text: {before} before, {after} after")
holds = abs(alone - 0.5) < 0.1 and abs(same - 0.5) < 0.1 and across > 0.8
sys.exit(not (holds and before == (1, 2, 259) and after == (1, 1, 257)))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
