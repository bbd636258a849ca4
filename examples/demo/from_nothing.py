"""Tokenizers and models made from scratch in seconds, for the demo, the examples and the benchmarks.

Decisions:
- Only the answer and the end of the turn are learned, not the prompt.
- Every batch is new; AdamW, short warm-up, linear decay to zero. No validation and no early stopping.
- Input and output embeddings are not tied. With tied ones, a student with the same greedy accuracy makes three times as many
  mistakes when sampled (3.5 % against 1 %), and each of them gives the distillation a gradient that teaches nothing.
"""

import json
from collections.abc import Callable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import trange
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = {
    CHATML: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    PHI: ["<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"],
}

Example = tuple[str, str, str]  # prompt, given beginning of the answer, text to learn


# Tokenizers


def byte_level_bpe(texts: Sequence[str], size: int, special: Sequence[str], split: str | None = None) -> Tokenizer:
    """As in Qwen and Llama-3. `split`: regular expression of words, GPT-2's if None."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        words = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def unigram(
    texts: Sequence[str],
    size: int,
    special: Sequence[str],
    before: Sequence[pre_tokenizers.PreTokenizer],
    max_piece_length: int,
) -> Tokenizer:
    """With byte fallback, as SentencePiece trains it. `size` counts `<unk>`, the special tokens and the learned pieces, not
    the 256 byte tokens. A space is `▁`, and none is put before a text. No piece crosses a cut that `before` makes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.Metaspace(prepend_scheme="never")])
    control = ["<unk>", *special]
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        max_piece_length=max_piece_length,
        unk_token="<unk>",
        special_tokens=control,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer of `tokenizers` cannot add the 256 byte tokens as SentencePiece's own does, so they are added here.
    # It orders the pieces differently in every process, and the last digits of their scores vary.
    pieces = [(piece, round(score, 2)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    byte_tokens = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    learned = sorted(pieces[len(control) :])
    tokenizer.model = models.Unigram(pieces[: len(control)] + byte_tokens + learned, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def with_template(tokenizer: Tokenizer, template: str, **special: str) -> PreTrainedTokenizerFast:
    """Adds one of the two chat templates of this file, and the special tokens that it writes."""
    if template == CHATML:
        special |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        special |= {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
        special["additional_special_tokens"] = ["<|user|>", "<|assistant|>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, padding_side="left", **special)


# Models


def new_model(
    config_class: type[PretrainedConfig], tokenizer: PreTrainedTokenizerBase, width: int, layers: int, **shape: int
) -> PreTrainedModel:
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"intermediate_size": 8 * width // 3 // 8 * 8, "max_position_embeddings": 1024, **shape},
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[], Example],
    steps: int,
    label: str,
    learning_rate: float,
    batch_size: int,
) -> None:
    """Trains `model` to answer as in `draw`'s examples, after its own chat template's prompt."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    model.train()
    with trange(steps, desc=label, mininterval=2) as bar:
        for _ in bar:
            batch = as_batch(tokenizer, [draw() for _ in range(batch_size)])
            loss = model(**{name: values.to(model.device) for name, values in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def as_batch(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` (B, S), right-padded; -100 on prompts, given beginnings and padding. A token
    across the border belongs to the given part."""
    rows = []
    for (_, given, learned), prompt in zip(
        examples, prompt_ids(tokenizer, [prompt for prompt, _, _ in examples]), strict=True
    ):
        answer = tokenizer(given + learned, add_special_tokens=False, return_offsets_mapping=True)
        is_given = [start < len(given) for start, _ in answer["offset_mapping"]]
        ids = [*answer["input_ids"], tokenizer.eos_token_id]
        labels = [-100 if skipped else i for i, skipped in zip(ids, [*is_given, False], strict=True)]
        rows.append((prompt + ids, [-100] * len(prompt) + labels))
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (ids, own_labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.tensor(own_labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    texts = tokenizer.apply_chat_template([messages(p) for p in prompts], add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    samples: int = 0,
) -> list[list[int]]:
    """Completion ids without padding, the stop token included: greedy ones, or `samples` for each prompt at temperature 1,
    those of one prompt together."""
    found, how = [], {"do_sample": False}
    if samples:
        how = {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
    for start in range(0, len(prompts), 256):
        padded = tokenizer.pad({"input_ids": prompt_ids(tokenizer, prompts[start : start + 256])}, return_tensors="pt")
        padded = padded.to(model.device)
        written = model.generate(**padded, max_new_tokens=max_new_tokens, **how)[:, padded["input_ids"].shape[1] :]
        for ids in written.tolist():
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            found.append(ids[:end])
    return found
