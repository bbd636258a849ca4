"""The teacher and the weak student: two small transformers of different families, trained from nothing.

Decisions:
- Teacher: Qwen2, trained on right answers. Student: Llama, smaller, trained on the answers of children, 70 % of whose
  irregular words are childish. Both read the conversation through their own chat template.
- Only the answer and the end of the turn are learned, not the prompt.
- One epoch's worth of fresh random batches, AdamW, linear decay to zero after a short warm-up; no validation and no early stop: the held-out
  numbers are for the reported figures alone.
"""

import random
from collections.abc import Callable

import torch
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from demo import task

CONTEXT = 128


def new_teacher(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    shape = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4)
    return _new_model(Qwen2Config, tokenizer, num_key_value_heads=2, **shape)


def new_student(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    shape = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    return _new_model(LlamaConfig, tokenizer, num_key_value_heads=4, **shape)


def _new_model(config_class: type, tokenizer: PreTrainedTokenizerBase, **shape: int) -> PreTrainedModel:
    config = config_class(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    numbers: list[int],
    write_answer: Callable[[int], str],
    steps: int,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    seed: int = 0,
    label: str = "",
) -> None:
    """Teach `model` to answer as `write_answer` does, in the words of its own chat template."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    model.train()
    bar = trange(steps, desc=label)
    for _ in bar:
        batch = rng.choices(numbers, k=batch_size)
        input_ids, labels = _as_batch(tokenizer, [(number, write_answer(number)) for number in batch])
        loss = model(input_ids=input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _as_batch(tokenizer: PreTrainedTokenizerBase, answers: list[tuple[int, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> input_ids (B, S) and labels (B, S), right-padded; labels are -100 on the prompt and the padding."""
    rows, prompt_lengths = [], []
    for number, answer in answers:
        prompt = tokenizer.apply_chat_template(as_prompt(number), add_generation_prompt=True, return_dict=False)
        rows.append(prompt + tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id])
        prompt_lengths.append(len(prompt))
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = input_ids.clone()
    for row, (ids, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        labels[row, :prompt_length] = -100
        labels[row, len(ids) :] = -100
    return input_ids, labels


def as_prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.question(number)}]


@torch.no_grad()
def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, numbers: list[int], batch_size: int = 256
) -> list[str]:
    """The model's greedy answers."""
    tokenizer.padding_side = "left"
    completions = []
    for start in range(0, len(numbers), batch_size):
        prompts = [as_prompt(number) for number in numbers[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        written = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        completions += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, numbers: list[int]) -> float:
    completions = write(model, tokenizer, numbers)
    return sum(map(task.is_right, numbers, completions)) / len(numbers)
