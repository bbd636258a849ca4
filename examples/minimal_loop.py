"""The method without a trainer: on-policy distillation across tokenizers (DPCA) as one flat loop of plain PyTorch.

    python examples/minimal_loop.py

One step: the student writes, the teacher reads the same text in its own tokens, the teacher's scores are shared out over the
chunks on which both tokenizations agree, and a policy gradient follows. It takes about a minute on one CPU core, half of it for
making the two models. The task is the demo's (`demo/task.py`), with one digit of euros.

Left out, and done by the trainer: several processes, LoRA, mixed precision, gradient accumulation, evaluation, checkpoints,
logging, and all edge cases of real tokenizers and chat templates.
"""

import random
from functools import partial

import torch
from demo import models, task, toy_tokenizers

from trl_ctopd import TextAligner
from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.losses.credit import gaps


STEPS, PROMPTS = 50, 64
torch.manual_seed(0)
torch.set_num_threads(1)  # a second thread does not help models this small

# A teacher that is right, a student that writes "fivety", and two tokenizers that have little in common.
rng = random.Random(0)
held_out = task.draw_different(200, rng, digits=[1])
draw = partial(task.draw, rng, frozenset(held_out), digits=[1])
tokenizer_text = [task.draw(rng) for _ in range(4000)]
teacher_tokenizer = toy_tokenizers.build_teacher_tokenizer(tokenizer_text)
student_tokenizer = toy_tokenizers.build_student_tokenizer(tokenizer_text)
teacher, student = models.new_teacher(teacher_tokenizer), models.new_student(student_tokenizer)
childish_answer = partial(task.answer, childishness=0.7, rng=rng)
models.pretrain(teacher, teacher_tokenizer, draw, task.answer, 250, "training the teacher")
models.pretrain(student, student_tokenizer, draw, childish_answer, 350, "training the weak student")

aligner = TextAligner(student_tokenizer, teacher_tokenizer)
loss_function = DPCA(credit="semantic", advantage_clip=10.0, event="open")
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def padded(rows: list[list], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def log_probs(model, prompts: list[list[int]], completions: list[list[int]], pad: int) -> torch.Tensor:
    """Log-prob in nats of every token after the first, prompt and completion together: (B, S).

    Rows are padded on the right, so that tokens keep their positions. Log-probs on the padding are in no chunk.
    """
    ids = padded([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)], pad)
    logits = model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


print(f"held-out amounts: teacher {models.accuracy(teacher, teacher_tokenizer, held_out):.1%} right, ", end="")
print(f"student {models.accuracy(student, student_tokenizer, held_out):.1%}")
nats = num_bytes = 0.0
for step in range(1, STEPS + 1):
    # 1. The student writes. It never sees an answer: the loop takes only questions from the task.
    amounts = [draw() for _ in range(PROMPTS)]
    student_prompts = [models.prompt_ids(student_tokenizer, amount) for amount in amounts]
    teacher_prompts = [models.prompt_ids(teacher_tokenizer, amount) for amount in amounts]
    inputs = student_tokenizer.pad({"input_ids": student_prompts}, return_tensors="pt")  # on the left, for generate
    with torch.no_grad():
        # temperature 1 and no truncation, because the gradient is that of the whole distribution
        written = student.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=models.MAX_NEW_TOKENS)
    completions, ended = [], []
    for row in written[:, inputs["input_ids"].shape[1] :].tolist():
        stop = row.index(student_tokenizer.eos_token_id) if student_tokenizer.eos_token_id in row else None
        completions.append(row[:stop])
        ended.append(stop is not None)

    # 2. One text, two tokenizations. The sampled ids are kept; the teacher's ids encode the text that they spell.
    student_ids, teacher_ids, student_chunks, teacher_chunks, widths = [], [], [], [], []
    for alignment, end, own_prompt, prompt in zip(
        aligner(completions), ended, student_prompts, teacher_prompts, strict=True
    ):
        # The end of the turn is one event with two spellings, <|end|> and <|im_end|>: one more chunk, without bytes.
        end_chunk = [len(alignment.chunk_bytes)] * end
        student_ids.append(alignment.student_ids + [student_tokenizer.eos_token_id] * end)
        teacher_ids.append(alignment.teacher_ids + [teacher_tokenizer.eos_token_id] * end)
        # A chunk number for each log-prob. The prompt's first token has no log-prob. -1 leaves the prompt out.
        student_chunks.append([-1] * (len(own_prompt) - 1) + alignment.student_chunks + end_chunk)
        teacher_chunks.append([-1] * (len(prompt) - 1) + alignment.teacher_chunks + end_chunk)
        widths.append([0] * (len(own_prompt) - 1) + alignment.student_widths + [0] * end)

    # 3. Both models score the text, each in its own tokens and after its own chat template.
    with torch.no_grad():
        judged = log_probs(teacher, teacher_prompts, teacher_ids, teacher_tokenizer.pad_token_id)
    batch = ScoredChunks(
        student_log_probs=log_probs(student, student_prompts, student_ids, student_tokenizer.pad_token_id),
        teacher_log_probs=judged,
        student_chunks=padded(student_chunks, -1),
        teacher_chunks=padded(teacher_chunks, -1),
        student_widths=padded(widths, 0),
        num_chunks=1 + max(max(row) for row in student_chunks),
    )

    # 4. Each chunk's gap L_T - L_S is shared among its student tokens, and gives the policy gradient.
    num_items = (batch.student_chunks >= 0).sum()
    loss, _ = loss_function(batch, num_items)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

    # The sampled reverse KL in nats a byte, which can be compared between tokenizers.
    gap, _ = gaps(
        batch.student_log_probs.detach(), judged, batch.student_chunks, batch.teacher_chunks, batch.num_chunks
    )
    nats, num_bytes = nats - gap.sum().item(), num_bytes + batch.student_widths.sum().item()
    if step % 10 == 0:
        right = models.accuracy(student, student_tokenizer, held_out)
        print(f"step {step:3}: {right:6.1%} right; gap {nats / num_bytes:.3f} nats/byte over the last 10 steps")
        nats = num_bytes = 0.0
