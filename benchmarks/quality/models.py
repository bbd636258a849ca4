"""Teacher and weak student, trained from scratch, and their accuracy.

Decisions:
- Teacher: OLMo 2; student: Llama, smaller. Both read the question through their own chat template.
- They are built and trained like those of the demo (`examples/demo/from_nothing.py`).
- The teacher is trained on right answers and, half of the time, on right continuations of answers that went wrong. The student
  is trained on answers with mistakes and, in a part of each batch, on its second skill.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, Olmo2Config, PreTrainedModel, PreTrainedTokenizerBase

from .tasks import Item, Task, second_skill


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from demo.from_nothing import Example, as_batch, messages, new_model, pretrain, prompt_ids, write


__all__ = [
    "Example",
    "LlamaConfig",
    "Olmo2Config",
    "as_batch",
    "messages",
    "new_model",
    "pretrain",
    "prompt_ids",
    "write",
]


def teacher_example(task: Task, rng: random.Random) -> Example:
    item = task.draw(rng)
    return (item.prompt, *(task.derailed(item, rng) if rng.random() < 0.5 else ("", item.answer)))


def student_example(task: Task, rng: random.Random, second: float = 0.2) -> Example:
    if rng.random() < second:
        item = rng.choice(second_skill())
        return item.prompt, "", item.answer
    item = task.draw(rng)
    return item.prompt, "", task.mistaken(item, rng)


def share_right(
    task: Task, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], written: list[list[int]]
) -> float:
    return sum(right(task, tokenizer, items, written)) / len(items)


def right(
    task: Task, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], written: list[list[int]]
) -> list[bool]:
    """Whether each completion answers its item. One that does not end is wrong."""
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
    """Log-prob (B,) of each whole completion, in nats."""
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
