"""A teacher in this process: token ids in, log-probs of those tokens out, without a (B, T, V) tensor. For losses on whole
distributions, it also returns the hidden states that the logits are computed from.

With a device of its own it reads in a thread of its own, while the student reads and learns what is scored already.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel

from ..models.activated import activation, invocation_of
from ..models.closing import in_tile_order
from ..models.forwards import base_model, forget_preparation
from ..models.heads import add_token_scores, hidden_states
from ..models.loading import load_model, slow_weights, switch_router_logits_off, widen_for_cpu
from ..models.packing import Packed, packed_inputs, packer_for, turning_length
from ..models.products import use_faster_products
from ..models.sharding import SHARDING, is_on, is_sharded, place_teacher, stays
from ..models.trials import check_causal
from ..rollouts.pairing import by_length, of_like_length, pad_rows
from ..rollouts.waiting import result_of


logger = get_logger(__name__)

GoingOn = tuple[np.ndarray, np.ndarray]  # (K,) places among a completion's tokens, and (K,) ids


class TeacherScores(NamedTuple):
    """Of a completion of T tokens: (T,) their log-probs in nats; where asked for, (T,) log-probs that none of given ids is drawn there,
    and the (T, H) hidden states that the logits are computed from."""

    log_probs: torch.Tensor
    close: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


class LocalScores:
    """The scores of a step's rows, which the teacher may still be reading."""

    def __init__(self, count: int):
        self.futures: list[Future[TeacherScores]] = [Future() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.futures)

    def row(self, row: int) -> torch.Tensor:
        """Waits for the log-probs of that completion's tokens. Raises what the teacher's forward pass raised."""
        return result_of(self.futures[row]).log_probs

    def close(self, row: int) -> torch.Tensor | None:
        """Waits for `TeacherScores.close` of that completion."""
        return result_of(self.futures[row]).close

    def hidden(self, row: int) -> torch.Tensor | None:
        """Waits for `TeacherScores.hidden` of that completion."""
        return result_of(self.futures[row]).hidden

    def likeliest(self, row: int) -> None:
        """Only servers tell their likeliest tokens: here a loss reads what it needs in the teacher's LM head."""

    def failed(self, row: int) -> bool:
        return False


class LocalTeacher:
    """
    A frozen causal language model that scores text it did not write. It is sharded like the student (ZeRO-3, FSDP). Where the
    model can, completions of one prompt are read with one copy of it (see `models.packing`).

    Args:
        model (`PreTrainedModel`): the teacher. It is put in eval mode, and its parameters are frozen.
        accelerator (`accelerate.Accelerator`): that of the run.
        temperature (`float`): the logits are divided by it, like the student's.
        batch_size (`int`): rows in one forward pass.
        overlap (`bool`, *optional*): whether `start` reads in a thread, on a CUDA stream of its own. `None`: where no weight of the
            teacher is on the student's device.

    Raises:
        ValueError: `overlap=True` for a teacher that DeepSpeed or FSDP prepares, whose processes have to read in step with each other.
    """

    signals = ("logprobs", "logits")

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator,
        temperature: float = 1.0,
        batch_size: int = 8,
        overlap: bool | None = False,
    ):
        model.requires_grad_(False)
        model.eval()
        self.base_model = base_model(model)
        forget_preparation(model)
        switch_router_logits_off(self.base_model)
        add_token_scores(self.base_model, temperature)
        self.config = model.config
        self.generation_config = model.generation_config
        self.batch_size = batch_size
        self._accelerator, self._temperature = accelerator, temperature
        if not getattr(self.base_model, "is_quantized", False):  # many of these have no derivatives
            check_causal("teacher", model)
        self.model = place_teacher(model, accelerator)
        use_faster_products(model, accelerator)
        self._packer, self._invocation = packer_for("teacher", model, accelerator), invocation_of(model)
        self._turning_length = turning_length(model.config.get_text_config())
        if said := slow_weights("teacher", model):
            logger.warning(f"{said}. Load it with dtype='float32' (teacher_model_init_kwargs), if the memory is there.")
        self._reading = threading.Lock()
        in_step = accelerator.distributed_type in SHARDING and not stays(model)
        if overlap and in_step:
            raise ValueError(
                f"teacher_overlap=True under {accelerator.distributed_type.value}, which shards the teacher, so that the processes have to "
                "read in step with each other. Leave it out, or put the teacher on a device of its own "
                "(teacher_model_init_kwargs={'device_map': ...}) or behind a server."
            )
        self.overlaps = not in_step and not is_on(accelerator.device, model) if overlap is None else overlap

    @property
    def device(self) -> torch.device:
        if is_sharded(self.model, self._accelerator):
            return self._accelerator.device  # the shards may be offloaded to the CPU
        return next(self.model.parameters()).device

    def log_probs(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        other_ends: Sequence[Sequence[int]] | None = None,
    ) -> list[torch.Tensor]:
        """
        Log-probs of each completion's tokens, given its prompt and the tokens before them.

        Args:
            prompts, completions: token ids, B of each. Prompts have at least one id.
            other_ends: for each row, further ids that its last token may be. Its log-prob becomes that of any of them (a
                logsumexp). None: no such ids.

        Returns:
            B float32 tensors on the teacher's device, the b-th of shape (len(completions[b]),), in nats, in the order given.
            Rows are scored `batch_size` at a time, those of one prompt one after another, the longest first.
        """
        return [own.log_probs for own in self.scores(prompts, completions, other_ends)]

    def scores(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        other_ends: Sequence[Sequence[int]] | None = None,
        going_on: Sequence[Callable[[], GoingOn]] | None = None,
        with_hidden: bool = False,
    ) -> list[TeacherScores]:
        """
        As `log_probs`, and more.

        Args:
            going_on: for each row, gives places and ids, each pair once, without the id that is there: `close` at a place is the
                log-prob that none of its ids is drawn, 0 where it has none. None: not asked for. Each is called when its row's
                turn comes, since these may be thousands for each token.
            with_hidden: whether hidden states are returned. These are large, and stay on the CPU.
        """
        other_ends = [()] * len(prompts) if other_ends is None else other_ends
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = by_length(range(len(prompts)), lengths, list(map(tuple, prompts)) if self._packer else None)
        scores = dict(self._read(order, prompts, completions, other_ends, going_on, with_hidden))
        return [scores[row] for row in range(len(prompts))]

    def start(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        other_ends: Sequence[Sequence[int]],
        going_on: Sequence[Callable[[], GoingOn]] | None = None,
        with_hidden: bool = False,
    ) -> LocalScores:
        """
        The `scores`, which are waited for where they are asked for. A teacher that overlaps returns at once, and reads the rows in the order
        in which they are given; one that does not has read them.
        """
        scores, texts = LocalScores(len(prompts)), (prompts, completions, other_ends, going_on, with_hidden)
        if not self.overlaps:
            for future, found in zip(scores.futures, self.scores(*texts), strict=True):
                future.set_result(found)
            return scores

        def work():
            try:
                with self._reading, self._stream() as done:  # a step that was given up may still be read
                    for row, found in self._read(range(len(prompts)), *texts):
                        done(found)
                        scores.futures[row].set_result(found)
            except BaseException as error:  # it is raised in the thread that waits
                for future in scores.futures:
                    if not future.done():
                        future.set_exception(error)

        threading.Thread(target=work, name="teacher", daemon=True).start()
        return scores

    @contextmanager
    def _stream(self) -> Iterator[Callable[[TeacherScores], None]]:
        """What is queued inside runs beside the work of other threads. Yields what is to be called with scores before another thread
        may read them."""
        device = self.device
        if device.type != "cuda":
            yield lambda found: None
            return
        others = torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            own = torch.cuda.current_stream(device)
            own.wait_stream(others)

            def done(found: TeacherScores):
                own.synchronize()
                for part in found:
                    if part is not None and part.is_cuda:
                        part.record_stream(others)  # its memory is not used again before they have read it

            yield done

    @torch.no_grad()
    def _read(
        self, order: Sequence[int], prompts, completions, other_ends, going_on, with_hidden
    ) -> Iterator[tuple[int, TeacherScores]]:
        """Each row with its scores, at most `batch_size` rows of `order` in a forward pass."""
        for start in range(0, len(order), self.batch_size):
            for rows, packed in self._together(order[start : start + self.batch_size], prompts, completions):
                own = ([texts[r] for r in rows] for texts in (prompts, completions, other_ends))
                asked = None if going_on is None else [going_on[r]() for r in rows]
                yield from zip(rows, self._forward(*own, asked, with_hidden, packed), strict=True)

    def _together(self, rows: Sequence[int], prompts, completions) -> Iterator[tuple[Sequence[int], Packed | None]]:
        """`rows` by forward passes, packed where that pays. Rows that would be read otherwise for a long one among them are read apart from it.
        On a CPU, where padding costs more than further calls, rows that are not packed go with those of like length. Neither where the
        processes that share a teacher have to make the same calls."""
        if is_sharded(self.model, self._accelerator):
            yield rows, self._packed(rows, prompts, completions)
            return
        parts: tuple[list[int], list[int]] = [], []
        for row in rows:
            parts[len(prompts[row]) + len(completions[row]) <= self._turning_length].append(row)
        for part in filter(None, parts):
            packed = self._packed(part, prompts, completions)
            if packed is not None or self.device.type != "cpu":
                yield part, packed
                continue
            groups = of_like_length([len(prompts[row]) + len(completions[row]) for row in part])
            for group in groups:
                own = [part[place] for place in group]
                yield own, None if len(groups) == 1 else self._packed(own, prompts, completions)

    def _packed(self, rows: Sequence[int], prompts, completions) -> Packed | None:
        if not self._packer:
            return None
        width = max(len(prompts[row]) + len(completions[row]) for row in rows)
        return self._packer(*([texts[row] for row in rows] for texts in (prompts, completions)), width)

    def _forward(self, prompts, completions, other_ends, going_on, with_hidden, packed):
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        counts = [len(completion) for completion in completions]
        width = max(map(len, rows))
        columns = [torch.arange(count) + len(prompt) - 1 for prompt, count in zip(prompts, counts, strict=True)]
        scored = torch.stack(
            [torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)), torch.cat(columns) - width]
        )
        targets = [token for completion in completions for token in completion]
        ends = [(row, token) for row, own in enumerate(other_ends) for token in own]
        last = torch.tensor([(row, len(rows[row]) - 2 - width) for row, _ in ends], dtype=torch.long).reshape(-1, 2).T
        asked = torch.cat([scored, last], dim=1)
        if packed is None:  # no token sees the padding after it, so any id will do
            inputs = {"input_ids": pad_rows(rows, width, 0), "scored": asked}
        else:
            inputs = packed_inputs(packed, asked)
        inputs["targets"] = torch.tensor([*targets, *(token for _, token in ends)], dtype=torch.long)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        inputs |= activation(self._invocation, prompts, [width - len(prompt) for prompt in prompts])
        capture = hidden_states(self.base_model) if with_hidden else nullcontext([])
        if going_on is not None:
            places, ids = zip(*going_on, strict=True)
            starts = accumulate(counts[:-1], initial=0)
            places = [own + start for own, start in zip(places, starts, strict=True)]
            inputs["going_on"] = in_tile_order(places, ids).to(self.device)
        with self._accelerator.autocast(), capture as states:  # the precision that the student is scored in
            scores = self.model(**inputs, temperature=self._temperature)
        *log_probs, others = scores.log_probs.split([*counts, len(ends)])
        for (row, _), other in zip(ends, others, strict=True):
            log_probs[row][-1] = torch.logaddexp(log_probs[row][-1], other)
        close, hidden = [None] * len(rows), [None] * len(rows)
        if going_on is not None:
            *close, _ = scores.close_log_probs.split([*counts, len(ends)])
        if with_hidden:
            hidden = states[0][tuple(inputs["scored"][:, : len(targets)].to(states[0].device))].cpu().split(counts)
        return list(map(TeacherScores, log_probs, close, hidden))


def load_teacher(path: str, init_kwargs: dict | None, trust_remote_code: bool, accelerator) -> PreTrainedModel:
    """
    The teacher from a hub name or folder. `init_kwargs` go to `from_pretrained` (dtype, quantization_config, device_map,
    revision, ...). Without a dtype there, it keeps the one it was saved in, but for float32 on a CPU that is slow in that. Each process of a
    distributed run places the whole teacher itself, unless `device_map` does.
    """
    given = init_kwargs or {}
    kwargs = {"dtype": "auto", "trust_remote_code": trust_remote_code, **given}
    if accelerator.num_processes > 1:
        kwargs.setdefault("device_map", None)
    model = load_model(path, kwargs)
    if "dtype" not in given and (accelerator.device.type == "cpu" or getattr(model, "hf_device_map", None)):
        widen_for_cpu("teacher", model)
    return model
