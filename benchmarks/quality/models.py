"""Teacher and weak student, trained from nothing, and how well a model answers.

Decisions:
- Teacher: OLMo 2; student: Llama, smaller. Both read the question through their own chat template.
- Only the answer and the end of the turn are learned. Every batch is fresh; AdamW, short warm-up, linear decay to zero.
- The teacher learns right answers and, half of the time, how a derailed one goes on rightly; the student learns answers with
  mistakes and, in a part of each batch, its second skill.
"""

import random
from collections.abc import Callable, Sequence

import torch
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, PreTrainedModel, PreTrainedTokenizerBase

from .tasks import Item, Task, second_skill


Example = tuple[str, str, str]  # prompt, the answer's given beginning, what is learned


def new_model(
    config_class: type[Olmo2Config | LlamaConfig], tokenizer: PreTrainedTokenizerBase, width: int, layers: int
) -> PreTrainedModel:
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def teacher_example(task: Task, rng: random.Random) -> Example:
    item = task.draw(rng)
    return (item.prompt, *(task.derailed(item, rng) if rng.random() < 0.5 else ("", item.answer)))


def student_example(task: Task, rng: random.Random, second: float = 0.2) -> Example:
    if rng.random() < second:
        item = rng.choice(second_skill())
        return item.prompt, "", item.answer
    item = task.draw(rng)
    return item.prompt, "", task.mistaken(item, rng)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[], Example],
    steps: int,
    label: str,
    learning_rate: float,
    batch_size: int,
) -> None:
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
    that lies over the border belongs to what is given."""
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
    """Completion ids without padding, the stop token included: greedy ones, or `samples` a prompt drawn at temperature 1,
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


def share_right(
    task: Task, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], written: list[list[int]]
) -> float:
    return sum(right(task, tokenizer, items, written)) / len(items)


def right(
    task: Task, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], written: list[list[int]]
) -> list[bool]:
    """Whether each completion answers its item; one that does not end is wrong."""
    texts = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [
        ids[-1:] == [tokenizer.eos_token_id] and task.is_right(item, text)
        for item, ids, text in zip(items, written, texts, strict=True)
    ]


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item]) -> float:
    """Greedy."""
    written = write(model, tokenizer, [item.prompt for item in items], task.max_new_tokens)
    return share_right(task, tokenizer, items, written)


@torch.no_grad()
def total_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: list[list[int]]
) -> torch.Tensor:
    """The log-prob of each whole completion, (B,), in nats."""
    rows = [a + b for a, b in zip(prompt_ids(tokenizer, prompts), completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=model.device)
    starts = torch.tensor(
        [len(row) - len(own) for row, own in zip(rows, completions, strict=True)], device=model.device
    )
    ends = torch.tensor([len(row) for row in rows], device=model.device)
    scores = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    place = torch.arange(1, width, device=model.device)[None]
    return (scores * ((place >= starts[:, None]) & (place < ends[:, None]))).sum(1)
