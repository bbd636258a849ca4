"""Answers side by side: the student before training and now, and its teacher.

Decisions: answers are greedy, and use the chat templates of training. "Before" is the student with its adapter switched off.
It is left out where the whole student is trained, since its original weights are gone, and where that is not the model as it was: an
adapter that was trained before is part of the untrained student. The stop token at an answer's end is not shown. Other control tokens
are: in some templates they alone part a thought, an answer and calls.
"""

from collections.abc import Mapping, Sequence

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig

from ..models.reference import adapter_off
from ..rollouts.generation import write
from ..rollouts.tools import with_tools
from ..text.chat import Speaker
from ..text.conversation import Conversation, read_example
from .best_effort import best_effort
from .viewer.visible import legible


HEADINGS = {
    "prompt": "Prompt",
    "student_before": "Student before (adapter off)",
    "student_now": "Student now",
    "teacher": "Teacher",
}
CUT_OFF = "…"
NO_BEFORE = "No student before: the whole student is trained, and its first weights are gone. LoRA keeps them."


def compare(trainer, prompts: Sequence[str | list[dict] | Mapping], max_new_tokens: int | None = None) -> list[dict]:
    """See `CrossTokenizerGKDTrainer.compare`."""
    if isinstance(prompts, str):
        raise TypeError(f"compare takes a list of prompts, got the text {prompts!r}: put it in a list.")
    if not len(prompts):
        return []
    rows = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
    conversations = [_conversation(row, index, trainer._tools) for index, row in enumerate(rows)]
    limit = trainer.args.max_new_tokens if max_new_tokens is None else max_new_tokens

    def answers(
        model, side: Speaker, stop_ids: list[int], context: int | None, read: Sequence[Conversation]
    ) -> list[tuple[str, bool]]:
        """Each answer, and whether it has ended."""
        ids = [side.prompt_ids(conversation) for conversation in read]
        longest = max(map(len, ids), default=0)
        if context is not None and longest >= context:
            raise ValueError(f"A prompt of {longest} tokens leaves no room to answer in a context of {context}.")
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit if context is None else min(limit, context - longest),
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0] if side.tokenizer.pad_token_id is None else side.tokenizer.pad_token_id,
        )
        written = [own for own, _ in write(model, ids, config, trainer.accelerator, trainer.args)]
        ended = [own[-1] in stop_ids for own in written]
        texts = [side.tokenizer.decode(own[:-1] if end else own) for own, end in zip(written, ended, strict=True)]
        return list(zip(texts, ended, strict=True))

    asked = [conversation.for_student for conversation in conversations]
    student = trainer.model_wrapped, trainer.student_side, trainer.stop_ids, trainer.student_context, asked
    columns, missing = {}, NO_BEFORE
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(unwrapped, PeftModel):
        reason = trainer.start_is_not_base
        missing = None if reason is None else f"No student before: {reason}."
    if missing is None:
        with adapter_off(unwrapped):
            columns["student_before"] = answers(*student)
    columns["student_now"] = answers(*student)
    for name, seat in trainer.panel.seats.items():
        if not seat.remote:  # servers score, but do not generate here
            columns[f"teacher_{name}" if name else "teacher"] = answers(
                seat.teacher.model,
                seat.side,
                seat.stop_ids,
                seat.context,
                [conversation.for_teacher for conversation in conversations],
            )
    if trainer.is_world_process_zero():
        with best_effort("The table of answers"):
            _print(conversations, columns, limit, missing)
    prompts = [conversation.prompt for conversation in conversations]
    texts = {name: [text for text, _ in own] for name, own in columns.items()}
    return [dict(zip(["prompt", *texts], values, strict=True)) for values in zip(prompts, *texts.values(), strict=True)]


def _conversation(row: Mapping, index: int, tools: list[dict]) -> Conversation:
    try:
        conversation = read_example(row)
        return with_tools(conversation, tools) if tools else conversation
    except ValueError as error:
        raise ValueError(f"Prompt {index} of compare: {error}.") from error


def _print(
    conversations: list[Conversation],
    columns: dict[str, list[tuple[str, bool]]],
    limit: int,
    missing: str | None = None,
):
    cut = any(not ended for own in columns.values() for _, ended in own)
    notes = [f"{CUT_OFF}: cut off after {limit} tokens."] * cut + [missing] * (missing is not None)
    table = Table(title="Greedy answers", title_justify="left", caption="\n".join(notes), caption_justify="left")
    table.show_lines = True
    for name in ("prompt", *columns):
        table.add_column(HEADINGS.get(name, name), overflow="fold")
    for conversation, *answers in zip(conversations, *columns.values(), strict=True):
        cells = (legible(text) + CUT_OFF * (not ended) for text, ended in answers)
        table.add_row(Text(legible(_asked(conversation.prompt))), *map(Text, cells))
    Console().print(table)


def _asked(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)
