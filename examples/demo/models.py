"""The teacher and the weak student: two small transformers of different families, trained from nothing.

Decisions:
- Teacher: OLMo 2, trained on right answers. Student: Llama, smaller, trained on the answers of children. Both read the
  conversation through their own chat template.
- Only the answer and the end of the turn are learned, not the prompt.
- Every batch is fresh; AdamW, short warm-up, linear decay to zero. No validation and no early stop.
- Input and output embeddings are apart. With tied ones a student that is as good when greedy makes three times the slips
  when sampled, 3.5 % against 1 %, and each of them costs the distillation a gradient that teaches nothing.
"""

from collections.abc import Callable, Sequence

import torch
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, PreTrainedModel, PreTrainedTokenizerBase

from . import task


MAX_NEW_TOKENS = 64


def new_teacher(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return _new_model(Olmo2Config, tokenizer, hidden_size=128, intermediate_size=320)


def new_student(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return _new_model(LlamaConfig, tokenizer, hidden_size=96, intermediate_size=256)


def _new_model(config_class: type, tokenizer: PreTrainedTokenizerBase, **width: int) -> PreTrainedModel:
    config = config_class(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **width,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[], int],
    write_answer: Callable[[int], str],
    steps: int,
    label: str,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
) -> None:
    """Teaches `model` to answer as `write_answer` does, after its own chat template's prompt."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    model.train()
    with trange(steps, desc=label) as bar:
        for _ in bar:
            amounts = [draw() for _ in range(batch_size)]
            loss = model(**as_batch(tokenizer, amounts, [write_answer(amount) for amount in amounts])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def as_batch(
    tokenizer: PreTrainedTokenizerBase, amounts: Sequence[int], answers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` (B, S), right-padded; labels are -100 on prompts and padding."""
    prompts = [prompt_ids(tokenizer, amount) for amount in amounts]
    answer_ids = [tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id] for answer in answers]
    width = max(len(prompt) + len(ids) for prompt, ids in zip(prompts, answer_ids, strict=True))
    input_ids = torch.full((len(amounts), width), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, ids) in enumerate(zip(prompts, answer_ids, strict=True)):
        start, end = len(prompt), len(prompt) + len(ids)
        input_ids[row, :end] = torch.tensor(prompt + ids)
        attention_mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, amount: int) -> list[int]:
    return tokenizer.apply_chat_template(task.as_messages(amount), add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The log-prob of each token of one `completion`, in nats, of shape (S,)."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, amounts: Sequence[int]) -> list[str]:
    """The model's greedy answers."""
    answers = []
    for start in range(0, len(amounts), 256):
        prompts = tokenizer.apply_chat_template(
            [task.as_messages(amount) for amount in amounts[start : start + 256]],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        written = model.generate(**prompts, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers += tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, amounts: Sequence[int]) -> float:
    return task.share_right(amounts, write(model, tokenizer, amounts))
