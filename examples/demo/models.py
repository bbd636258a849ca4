"""The teacher and the weak student: two small transformers of different families, trained from scratch.

Teacher: OLMo 2, trained on right answers. Student: Llama, smaller, trained on children's answers. Each reads the
conversation through its own chat template.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from transformers import LlamaConfig, Olmo2Config, PreTrainedModel, PreTrainedTokenizerBase

from . import from_nothing, task
from .from_nothing import Example


MAX_NEW_TOKENS = 64
BATCH_SIZE = 32
_SHAPE = {"layers": 2, "max_position_embeddings": 128}


def new_teacher(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return from_nothing.new_model(Olmo2Config, tokenizer, 128, intermediate_size=320, **_SHAPE)


def new_student(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return from_nothing.new_model(LlamaConfig, tokenizer, 96, intermediate_size=256, **_SHAPE)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[], int],
    write_answer: Callable[[int], str],
    steps: int,
    label: str,
) -> None:
    """Trains `model` to answer like `write_answer`, after its own chat template's prompt."""
    examples = partial(next, _examples(draw, write_answer))
    from_nothing.pretrain(model, tokenizer, examples, steps, label, learning_rate=3e-3, batch_size=BATCH_SIZE)


def _examples(draw: Callable[[], int], write_answer: Callable[[int], str]) -> Iterator[Example]:
    while True:
        for amount in [draw() for _ in range(BATCH_SIZE)]:
            yield task.question(amount), "", write_answer(amount)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, amount: int) -> list[int]:
    return from_nothing.prompt_ids(tokenizer, [task.question(amount)])[0]


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-prob (S,) of each token of one `completion`, in nats."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, amounts: Sequence[int]) -> list[str]:
    """The model's greedy answers."""
    written = from_nothing.write(model, tokenizer, [task.question(amount) for amount in amounts], MAX_NEW_TOKENS)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, amounts: Sequence[int]) -> float:
    return task.share_right(amounts, write(model, tokenizer, amounts))
