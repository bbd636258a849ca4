"""What functions of the user's say of whole completions: rewards beside the teacher, and which text the teacher is not to score.

Decisions
- Reward functions are called as TRL's `GRPOTrainer` calls them. A prompt's completions are all in one process, so that nothing
  is gathered.
- Rewards are for text that the student wrote. The gate is asked about every completion, the teacher's own (`seq_kd`) too.
- A completion that the gate calls wrong is rewarded like the others: it is in its prompt's mean. None of its tokens takes part.
- In evaluation nothing is called, unless `rewards_in_evaluation`. The gate never is: a gap of right answers alone would flatter.

Left out: `log_extra`, `environments`, and normalising each function's rewards before they are summed.
"""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import apply_chat_template

from ..config import CrossTokenizerGKDConfig
from ..losses.rewards import group_advantages, total_rewards
from ..text.token_bytes import TokenTable, UnsupportedTokenizerError, token_table
from .pairing import Prompt, Rollout, unscored
from .waiting import result_of


logger = get_logger(__name__)
_LOST = "\N{REPLACEMENT CHARACTER}"

Figures = dict[str, tuple[float, float]]


class Judges:
    """
    Args:
        reward_funcs: functions `(prompts, completions, completion_ids, **columns) -> rewards`, one number or None for each
            completion, plain or async; or reward models: sequence classifiers with one label, or their names.
        reward_processing_classes: tokenizers of the reward models, None for functions; loaded where they are None.
        gate: a function called like those above that returns, for each completion, True (right), False (wrong), or the
            `(start, stop)` ranges of its text's characters that are wrong.
        args: the run's settings.
        tokenizer: the student's.

    Raises `ValueError` where a setting would have no effect, or numbers of functions, weights and tokenizers do not match.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_processing_classes: Any,
        gate: Callable | None,
        args: CrossTokenizerGKDConfig,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._args, self._tokenizer, self._gate = args, tokenizer, gate
        funcs = _listed(reward_funcs)
        processing = _listed(reward_processing_classes) or [None] * len(funcs)
        weights = [1.0] * len(funcs) if args.reward_weights is None else args.reward_weights
        for what, count in (("reward_weights", len(weights)), ("reward_processing_classes", len(processing))):
            if count != len(funcs):
                raise ValueError(
                    f"{what} has {count} entries and reward_funcs {len(funcs)}: give one for each, or leave {what} out."
                )
        if funcs:
            _check_settings(args)
        self._weights = torch.tensor(weights, dtype=torch.float32)
        pairs = [_loaded(*pair) for pair in zip(funcs, processing, strict=True)]
        self._funcs = [func for func, _ in pairs]
        self._processing = [own for _, own in pairs]
        for judge in (*self._funcs, *([] if gate is None else [gate])):
            if not callable(judge):
                raise ValueError(
                    f"A reward function or a gate is called with completions, and {judge!r} cannot be: pass a function."
                )
        self._names = [_name(func) for func in self._funcs]
        if doubled := sorted({name for name in self._names if self._names.count(name) > 1}):
            raise ValueError(
                f"Several of reward_funcs are called {doubled[0]!r}, under which their rewards are logged: set `__name__` apart."
            )

    @property
    def reward(self) -> bool:
        return bool(self._funcs)

    @property
    def names(self) -> list[str]:
        """Of the reward functions, as their rewards are logged."""
        return list(self._names)

    @property
    def gate_name(self) -> str | None:
        return None if self._gate is None else _name(self._gate)

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[list[int]], size: int, state: Any, device: torch.device
    ) -> tuple[torch.Tensor, Figures]:
        """
        Args:
            prompts, completions: `size` completions of each prompt, one after the other, in student ids.
            state: the trainer's, for the functions' `trainer_state`.

        Returns:
            (N,) what is added to the advantages of each completion's tokens, 0 with `size` 1; and the figures.

        Raises `ValueError` for a function that returns anything but one number or None a completion.
        """
        figures: Figures = {}

        def log_metric(name: str, value: float):
            total, count = figures.get(name, (0.0, 0))
            figures[name] = (total + value, count + 1)

        asked = self._asked(prompts, completions)
        found = [
            self._of_model(func, processing, asked, device)
            if isinstance(func, nn.Module)
            else self._of_function(func, name, {**asked, "trainer_state": state, "log_metric": log_metric})
            for func, processing, name in zip(self._funcs, self._processing, self._names, strict=True)
        ]
        rewards = torch.tensor(found, dtype=torch.float32).T
        if unrewarded := int(rewards.isnan().all(1).sum()):
            logger.warning_once(
                f"{unrewarded} of {len(rewards)} completions got no reward from any function (None or NaN): they have advantage 0."
            )
        total = total_rewards(rewards, self._weights)
        advantages, std = torch.zeros(len(total)), None
        if size > 1:
            advantages, std = group_advantages(total, size, self._args.scale_rewards == "group")
        real = torch.tensor([not prompt.is_padding for prompt in prompts])
        for name, column in zip(
            ("reward", *(f"rewards/{own}/mean" for own in self._names)), (total, *rewards.T), strict=True
        ):
            figures[name] = _summed(column[real])
        if std is not None:
            told = std[real.view(-1, size)[:, 0]]
            figures["reward_std"] = _summed(told)
            told = told[~told.isnan()]
            figures["frac_reward_zero_std"] = float((told < 1e-8).sum()), len(told)
        return self._args.reward_weight * advantages, figures

    def gated(self, rollouts: Sequence[Rollout], state: Any, log: Callable[[Figures], None]) -> list[Rollout]:
        """`rollouts` without what the gate calls wrong; the teacher does not read those that are wrong as a whole."""
        if self._gate is None:
            return list(rollouts)
        asked = self._asked([rollout.prompt for rollout in rollouts], [rollout.student_ids for rollout in rollouts])
        name = _name(self._gate)
        verdicts = _answers(self._gate, {**asked, "trainer_state": state}, name)
        kept = [self._without(rollout, verdict, name) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
        real = [row for row, rollout in enumerate(rollouts) if not rollout.prompt.is_padding]
        before = sum(int((rollouts[row].student_chunks >= 0).sum()) for row in real)
        after = sum(int((kept[row].student_chunks >= 0).sum()) for row in real)
        wrong = sum(
            not bool(verdicts[row]) if isinstance(verdicts[row], bool | np.bool_) else len(verdicts[row]) > 0
            for row in real
        )
        log({"gate/wrong_fraction": (wrong, len(real)), "gate/masked_fraction": (before - after, before)})
        return kept

    def _without(self, rollout: Rollout, verdict: Any, name: str) -> Rollout:
        if isinstance(verdict, bool | np.bool_):
            return rollout if verdict else unscored(rollout)
        try:
            ranges = [(int(start), int(stop)) for start, stop in verdict]
        except (TypeError, ValueError):
            raise ValueError(
                f"The gate {name!r} returned {verdict!r} for a completion: return True (right), False (wrong) or the ranges "
                "of its wrong characters, a list of (start, stop)."
            ) from None
        if not ranges:
            return rollout
        turns = [turn.student_ids for turn in rollout.prompt.turns(rollout.student_ids)]
        lengths = [len(self._text(ids)) for ids in turns]
        for start, stop in ranges:
            if not 0 <= start < stop <= sum(lengths):
                raise ValueError(
                    f"The gate {name!r} returned the range ({start}, {stop}) for a completion of {sum(lengths)} characters: ranges "
                    "lie within the text, start before stop."
                )
        wrong, before = [], 0
        for ids, length in zip(turns, lengths, strict=True):
            wrong.append(self._touching(ids, (np.array(ranges) - before).clip(0, length)))
            before += length
        written = np.ones(len(rollout.student_ids), dtype=bool)
        for start, stop in rollout.given:
            written[start:stop] = False
        chunks = rollout.student_chunks[written][np.concatenate(wrong)]
        return without_chunks(rollout, set(chunks.tolist()) - {-1})

    @cached_property
    def _table(self) -> TokenTable | None:
        """The bytes of the student's tokens; None for a tokenizer of which they are not known."""
        try:
            return token_table(self._tokenizer)
        except UnsupportedTokenizerError:
            return None

    def _spelled(self, ids: list[int]) -> tuple[bytes, np.ndarray]:
        """As `TokenTable.read`."""
        return self._table.read(np.array(ids, dtype=np.int64))

    def _touching(self, ids: list[int], ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """(S,) True for tokens that spell a part of a character of `ranges`. Reads the text once, where the tokens' bytes are its
        own; else, as where the bytes are no UTF-8, every beginning of it, in quadratic time."""
        text = self._text(ids)
        spelled, widths = (b"", ()) if self._table is None else self._spelled(ids)
        for dropped in (0, 1) if spelled else ():  # the space that some tokenizers put before a text and take off again
            if spelled[dropped:] == text.encode():
                ends = (np.cumsum([0, *widths]) - dropped).clip(0)
                at = np.cumsum([0, *(len(character.encode()) for character in text)])
                break
        else:
            ends = np.array([len(self._text(ids[:end])) for end in range(len(ids) + 1)])
            ends = np.minimum.accumulate(ends[::-1])[::-1]  # bytes of an unfinished character may be shown as one each
            at = np.arange(len(text) + 1)
        touching = np.zeros(len(ids), dtype=bool)
        for start, stop in ranges:
            touching |= (ends[1:] > at[start]) & (ends[:-1] < at[stop])
        return touching

    # What functions are called with

    def _text(self, ids: list[int]) -> str:
        """As TRL decodes it. Where that has U+FFFD, the tokens' own bytes are read: with byte fallback a character that is cut off takes all bytes
        beside it along, and byte-level decoders take letters of an added token for names of bytes (tokenizers 0.23.3)."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        if _LOST not in text or self._table is None:
            return text
        spelled = self._spelled(ids)[0].decode(errors="replace")
        return spelled[1:] if spelled[:1] == " " != text[:1] else spelled

    def _asked(self, prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> dict[str, list]:
        """As TRL calls its reward functions: the prompts as the dataset has them, the completions of the same kind, the student's
        ids, and the dataset's other columns. With tools a completion is one assistant message a turn; results are left out."""
        rows = [json.loads(prompt.row) for prompt in prompts]
        texts = []
        for prompt, row, ids in zip(prompts, rows, completions, strict=True):
            turns = [self._text(turn.student_ids) for turn in prompt.turns(ids)]
            plain = isinstance(row["prompt"], str)
            texts.append("".join(turns) if plain else [{"role": "assistant", "content": text} for text in turns])
        columns = sorted({name for row in rows for name in row} - {"prompt", "completion", "completion_ids"})
        return {
            "prompts": [row["prompt"] for row in rows],
            "completions": texts,
            "completion_ids": list(completions),
            **{name: [row.get(name) for row in rows] for name in columns},
        }

    def _of_function(self, func: Callable, name: str, asked: dict) -> list[float]:
        found = _answers(func, asked, name)
        try:
            numbers = [math.nan if value is None else float(value) for value in found]
        except (TypeError, ValueError):
            raise ValueError(
                f"The reward function {name!r} returned {found!r}: return a number or None for each completion."
            ) from None
        if any(map(math.isinf, numbers)):
            raise ValueError(
                f"The reward function {name!r} returned an infinite reward: return None where there is none."
            )
        return numbers

    def _of_model(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: dict, device) -> list[float]:
        texts = []
        for prompt, completion in zip(asked["prompts"], asked["completions"], strict=True):
            if isinstance(prompt, str):
                texts.append(prompt + completion)
            else:
                texts.append(apply_chat_template({"messages": prompt + completion}, tokenizer)["text"])
        model.to(device)
        inputs = tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        with torch.inference_mode():
            return model(**inputs.to(device)).logits[:, 0].float().tolist()


def without_chunks(rollout: Rollout, dropped: set[int]) -> Rollout:
    """The rollout, of which the chunks `dropped` take no part."""
    student, teacher = (
        np.where(np.isin(own, list(dropped)), -1, own) for own in (rollout.student_chunks, rollout.teacher_chunks)
    )
    return replace(rollout, student_chunks=student, teacher_chunks=teacher)


def row_as_json(example: dict, prompt: str | list[dict], row: int, dataset_name: str) -> str:
    """A dataset row for `Prompt.row`, with its prompt as the trainer reads it. Raises `ValueError` for a column that JSON cannot
    hold."""
    for name, value in example.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"Row {row} of the {dataset_name} dataset: its column {name!r} cannot be handed to reward functions ({error}): drop "
                "the column, or make it text."
            ) from None
    return json.dumps({**example, "prompt": prompt}, ensure_ascii=False)


def _listed(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _check_settings(args: CrossTokenizerGKDConfig):
    if args.num_generations < 2:
        raise ValueError(
            f"reward_funcs are normalised within a prompt's completions, and num_generations={args.num_generations} makes one: set "
            "num_generations to 2 or more (4 to 8 are usual)."
        )
    if args.lmbda == 0:
        raise ValueError("reward_funcs have no effect with lmbda=0.0: rewards are for text that the student writes.")


def _loaded(func: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A reward function as it is; a reward model frozen, with its tokenizer."""
    if isinstance(func, str):
        func = AutoModelForSequenceClassification.from_pretrained(func, num_labels=1)
    if not isinstance(func, nn.Module):
        return func, None
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "reward_funcs has a reward model, which ZeRO-3 would split up: pass a function that asks a server for its rewards, or "
            "train with ZeRO-2 or FSDP."
        )
    tokenizer = AutoTokenizer.from_pretrained(func.config._name_or_path) if tokenizer is None else tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    func.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # where the last token's score is looked for
    return func.requires_grad_(False).eval(), tokenizer


def _name(func: Any) -> str:
    if isinstance(func, nn.Module):
        return func.config._name_or_path.split("/")[-1] or type(func).__name__
    return getattr(func, "__name__", None) or type(func).__name__


def _answers(func: Callable, asked: dict, name: str) -> list:
    """What `func` says of each completion."""
    _check_arguments(func, asked, name)
    return _one_each(_called(func, asked), len(asked["prompts"]), name)


def _called(func: Callable, asked: dict) -> Any:
    found = func(**asked)
    if not inspect.isawaitable(found):
        return found

    async def waited():
        return await found

    with ThreadPoolExecutor(1) as pool:  # a notebook's own thread has a loop that runs already
        return result_of(pool.submit(asyncio.run, waited()))


def _check_arguments(func: Callable, asked: dict, name: str) -> None:
    try:
        taken = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):
        return  # written in C, which may not say what it takes
    given = f"It is called with {', '.join(asked)}: the prompts, what was written to them, and the dataset's columns"
    needed = [
        own.name
        for own in taken
        if own.default is own.empty and own.kind in (own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)
    ]
    if missing := sorted({*needed} - {*asked}):
        raise ValueError(
            f"{name!r} needs {', '.join(missing)}, which no row has. {given}. Name the column so, or give the parameter a default."
        )
    refused = {*asked} - {own.name for own in taken}
    if refused and all(own.kind is not own.VAR_KEYWORD for own in taken):
        raise ValueError(f"{name!r} does not take {', '.join(sorted(refused))}. {given}. Let it take **kwargs too.")


def _one_each(found: Any, count: int, name: str) -> list:
    try:
        found = list(found)
    except TypeError:
        raise ValueError(f"{name!r} returned {found!r}: return a list with one entry for each completion.") from None
    if len(found) != count:
        raise ValueError(
            f"{name!r} returned {len(found)} entries for {count} completions: return one for each, None where it has nothing to say."
        )
    return found


def _summed(values: torch.Tensor) -> tuple[float, float]:
    given = values[~values.isnan()]
    return given.sum().item(), len(given)
