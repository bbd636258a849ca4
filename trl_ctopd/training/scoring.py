"""The student's forward pass over a micro-batch of rollouts, and what a loss reads of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import CrossTokenizerGKDConfig
from ..losses import Distributions, Metrics, ScoredChunks
from ..models.activated import activation_of_rows, invocation_of
from ..models.forwards import base_model
from ..models.heads import AUTOCAST, add_token_scores, hidden_states, lm_head
from ..models.loading import disable_dropout, switch_router_logits_off
from ..models.packing import packed_inputs, unpacked
from ..models.reference import Reference
from ..rollouts.pairing import on_grid
from ..rollouts.stops import with_other_stops
from ..rollouts.vllm import importance
from ..teachers.panel import Panel
from ..teachers.readings import Awaited, arrived
from ..text.chat import Speaker
from ..text.vocabulary import VocabularyPair


def prepare_student(model: nn.Module, side: Speaker, args: CrossTokenizerGKDConfig) -> list[int]:
    """
    Makes the student, before it is wrapped, ready to be scored, and returns the ids that end its turn.

    Raises `ValueError` where nothing ends its turn.
    """
    student, tokenizer = base_model(model), side.tokenizer
    if args.disable_dropout:
        disable_dropout(model)
    add_token_scores(student, args.temperature, entropy=True)  # what was drawn at it is scored at it
    switch_router_logits_off(student)
    student.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    student.generation_config.pad_token_id = tokenizer.pad_token_id
    stop_ids = side.stop_ids(student.generation_config)
    if not stop_ids:
        raise ValueError(
            f"Nothing ends the student's turn: {type(tokenizer).__name__} has no eos_token and its "
            "generation config no eos_token_id. Set one of them."
        )
    student.generation_config.eos_token_id = stop_ids  # the saved student stops where it learned to
    return stop_ids


def _rows(model: nn.Module, inputs: dict, scored: torch.Tensor) -> dict[str, torch.Tensor | list[int]]:
    """What the student `model`, unwrapped, reads of a micro-batch for the scores at `scored`: packed rows where there are any."""
    if "packed" in inputs:
        return packed_inputs(inputs["packed"], scored)
    ids = inputs["input_ids"]
    begins = activation_of_rows(invocation_of(model), ids, inputs["prompt_lengths"])
    return {"input_ids": ids, "scored": scored, **begins}


def _of_ends(found: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) the log-probs of the tokens alone, and with the other stop tokens with which a text might have ended alike. `found` begins with
    those of the scored tokens, and ends with those of `other_stops`."""
    scored, stops = inputs["scored"], inputs.get("other_stops", ())
    alone = on_grid(found[: scored.shape[1]], scored, inputs["input_ids"])
    if not len(stops):
        return alone, alone
    others = on_grid(found[-len(stops) :].exp(), inputs["scored_ends"], inputs["input_ids"], add=True)
    return alone, with_other_stops(alone, others)


class Scorer:
    """
    Args:
        args: the run's settings.
        accelerator: the run's processes.
        panel: the teachers.
        vocabulary: what the two vocabularies have in common; called where a loss reads distributions.
        balances: whether the student is a mixture of experts whose load is balanced.
        reference: the student as it was at the start, where its text is to be scored by that too.
    """

    def __init__(
        self,
        args: CrossTokenizerGKDConfig,
        accelerator,
        panel: Panel,
        vocabulary: Callable[[], VocabularyPair],
        balances: bool = False,
        reference: Reference | None = None,
    ):
        self._reference = reference
        self._balances = balances
        self._args, self._accelerator, self._panel, self._vocabulary = args, accelerator, panel, vocabulary

    def __call__(
        self,
        model: nn.Module,
        inputs: dict,
        on_distributions: bool,
        old_scores: torch.Tensor | None,
        phase: Callable[[str], AbstractContextManager],
    ) -> tuple[ScoredChunks, torch.Tensor, Metrics]:
        """
        Args:
            model: the student as it is wrapped for training, with `add_token_scores`.
            inputs: a micro-batch of `RolloutSource`, on the student's device.
            on_distributions: whether the loss reads whole distributions.
            old_scores: (1 or 2, B, S) `ScoredChunks.policy_scores` of the student that wrote it, where it has been updated
                since.
            phase: called with the name of what begins, and times the `with` block.

        Returns:
            What the loss reads; the entropy (B, S) of the student's distributions, in nats; and figures of how the text was
            drawn and read.
        """
        unwrapped, scored = self._accelerator.unwrap_model(model), inputs["scored"]
        student = base_model(unwrapped)
        asked = torch.cat([scored, *(inputs[name] for name in ("scored_again", "scored_ends") if name in inputs)], 1)
        targets = inputs["input_ids"][asked[0], asked[1] + 1]
        stops = inputs["other_stops"] if "other_stops" in inputs else targets[:0]
        told = len(targets) - len(stops)
        targets[told:] = stops
        with phase("student"), hidden_states(student) if on_distributions else nullcontext() as states:
            scores = model(
                **_rows(unwrapped, inputs, asked),
                targets=targets,
                temperature=self._args.temperature,
                entropy=True,
                **self._routed(inputs),
                **({"going_on": inputs["going_on"]} if "going_on" in inputs else {}),
            )
        count = scored.shape[1]
        drawn, log_probs = _of_ends(scores[0], inputs)
        entropy = on_grid(scores[1][:count], scored, inputs["input_ids"])
        close = scores[3]
        if close is not None:
            mixes, close = "close_weights" in inputs, close[:told]
            close = close * inputs["close_weights"].to(close.device) if mixes else close
            close = on_grid(close, asked[:, :told], inputs["input_ids"], add=mixes)
        old, old_close = (None, None) if old_scores is None else (*old_scores.to(log_probs.device), None)[:2]
        teacher_log_probs, likeliest, metrics = self._settled(inputs["teacher_log_probs"], phase)
        batch = ScoredChunks(
            student_log_probs=log_probs,
            drawn_log_probs=drawn.detach(),
            teacher_log_probs=teacher_log_probs,
            student_chunks=inputs["student_chunks"],
            teacher_chunks=inputs["teacher_chunks"],
            student_widths=inputs["student_widths"],
            num_chunks=inputs["num_chunks"],
            student_ids=inputs["input_ids"][:, 1:],
            teacher_ids=inputs["teacher_ids"],
            old_log_probs=old,
            rewards=inputs.get("rewards"),
            prompts=inputs.get("prompts"),
            imbalance=scores[2],
            close_log_probs=close,
            teacher_close_log_probs=arrived(inputs.get("teacher_close_log_probs")),
            old_close_log_probs=old_close,
            unclosed=inputs.get("unclosed"),
            teacher_likeliest=likeliest,
            other_spelling=inputs.get("other_spelling"),
            markup=inputs.get("markup"),
            untold=inputs.get("untold"),
        )
        if "reference_teacher_log_probs" in inputs:
            own = self._settled(inputs["reference_teacher_log_probs"], phase)
            batch.reference_teacher_log_probs = own[0]
            metrics = {**metrics, **{f"reference_{name}": pair for name, pair in own[2].items()}}
        if "sampled_log_probs" in inputs:
            sampled = inputs["sampled_log_probs"].to(log_probs.device) + (log_probs - drawn).detach()
            batch.importance, of_sampling = importance(batch, sampled, self._args.vllm_importance_sampling_clip_max)
            metrics = {**metrics, **of_sampling}
        if self._reference is not None and inputs["on_policy"]:
            places, tokens = torch.cat([scored, asked[:, told:]], 1), torch.cat([targets[:count], targets[told:]])
            rows = _rows(unwrapped, inputs, places)
            found = self._reference.log_probs(model, **rows, targets=tokens, temperature=self._args.temperature)
            _, batch.reference_log_probs = _of_ends(found, inputs)
        if on_distributions:
            length = log_probs.shape[1]  # prompt-learning adapters put virtual tokens in front
            hidden = unpacked(inputs["packed"], states[0]) if "packed" in inputs else states[0]
            batch.student = self._distributions(student, hidden[:, :-1][:, -length:], log_probs)
            if "teacher_hidden" in inputs:
                hidden = arrived(inputs["teacher_hidden"])
                batch.teacher = self._distributions(self._panel.only.teacher.base_model, hidden)
            batch.vocabulary, batch.tile_tokens = self._vocabulary(), self._args.logit_tile_tokens
        return batch, entropy.detach(), metrics

    def _routed(self, inputs: dict) -> dict[str, torch.Tensor]:
        """Where the load of a mixture of experts is to be balanced, (B, L) True for tokens that are no padding."""
        if not self._balances:
            return {}
        columns = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
        return {"routed": columns < inputs["lengths"].to(columns.device)[:, None]}

    def _settled(
        self, scores: torch.Tensor | Awaited, phase: Callable[[str], AbstractContextManager]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None, Metrics]:
        """The teacher's log-probs, and its likeliest tokens where a server tells them; waits for those that one still works
        on."""
        if not isinstance(scores, Awaited):
            return scores, None, {}
        with phase("teacher_wait"):
            log_probs, likeliest = scores.log_probs, scores.likeliest
        return log_probs, likeliest, scores.metrics

    def _distributions(
        self, model: PreTrainedModel, hidden: torch.Tensor, output: torch.Tensor | None = None
    ) -> Distributions:
        """Of `model`, from the hidden states that its LM head reads, projected in the precision that the sampled log-probs are
        computed in. `output`: of its forward pass, where gradients are to reach the head (see `lm_head`)."""
        dtype = AUTOCAST.get(self._accelerator.mixed_precision, hidden.dtype)
        return Distributions(hidden, lm_head(model, dtype, self._args.temperature, output))
