"""A teacher in this process: token ids in, log-probs of those tokens out, without a (B, T, V) tensor; and, for the losses
that compare whole distributions, the hidden states that these are projected from."""

from contextlib import nullcontext

import torch
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from ..heads import base_model, hidden_states


class LocalTeacher:
    """
    A frozen causal language model, sharded as the student is (ZeRO-3, FSDP), that scores text it did not write.

    Args:
        model (`PreTrainedModel`): the teacher; it is put in eval mode and its parameters are frozen.
        accelerator (`accelerate.Accelerator`): the run's.
        temperature (`float`): the logits are divided by it, as the student's are.
        batch_size (`int`): rows in one forward pass.
    """

    signals = ("logprobs", "logits")

    def __init__(self, model: PreTrainedModel, accelerator, temperature: float = 1.0, batch_size: int = 8):
        model.requires_grad_(False)
        model.eval()
        self.base_model = base_model(model)
        add_fused_lm_head(self.base_model, temperature=temperature)
        self.config = model.config
        self.generation_config = model.generation_config
        self.batch_size = batch_size
        self._accelerator = accelerator
        self._padding = 0  # masked out, so any id within the vocabulary will do
        if accelerator.state.deepspeed_plugin is not None:
            self.model = prepare_deepspeed(model, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.model = prepare_fsdp(model, accelerator)
        elif getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False):
            self.model = model  # placed by the user
        else:
            self.model = model.to(accelerator.device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def log_probs(self, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
        """
        Log-probs of each completion's tokens given its prompt and the tokens before.

        Args:
            prompts, completions: token ids, B of each. Prompts have at least one id.

        Returns:
            B float32 tensors on the CPU, the b-th of shape (len(completions[b]),), in nats. Rows are scored
            `batch_size` at a time, long ones together, and come back in the order given.
        """
        return [log_probs for log_probs, _ in self._score(prompts, completions, with_hidden=False)]

    def log_probs_and_hidden(
        self, prompts: list[list[int]], completions: list[list[int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`log_probs`, and for each completion the (len(completions[b]), H) states that its tokens' distributions are
        projected from, on the CPU too."""
        return self._score(prompts, completions, with_hidden=True)

    @torch.no_grad()
    def _score(self, prompts, completions, with_hidden):
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(completions[row]))
        scores = [None] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            found = self._forward([prompts[r] for r in rows], [completions[r] for r in rows], with_hidden)
            for row, score in zip(rows, found, strict=True):
                scores[row] = score
        return scores

    def _forward(self, prompts, completions, with_hidden):
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        input_ids = torch.full((len(prompts), max(lengths)), self._padding)
        labels = torch.full_like(input_ids, -100)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            input_ids[row, : lengths[row]] = torch.tensor([*prompt, *completion])
            labels[row, len(prompt) : lengths[row]] = torch.tensor(completion, dtype=torch.long)
            attention_mask[row, : lengths[row]] = 1
        device = self.device
        capture = hidden_states(self.base_model) if with_hidden else nullcontext([])
        with self._accelerator.autocast(), capture as states:  # the precision the student is scored in
            outputs = self.model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                labels=labels.to(device),
                fused_lm_head=True,
            )
        log_probs = outputs.log_probs.float().cpu()
        hidden = states[0].cpu() if states else None
        spans = [slice(len(prompt) - 1, length - 1) for prompt, length in zip(prompts, lengths, strict=True)]
        return [
            (log_probs[row, span], None if hidden is None else hidden[row, span].clone())
            for row, span in enumerate(spans)
        ]


def load_teacher(path: str, init_kwargs: dict | None, trust_remote_code: bool, distributed: bool) -> PreTrainedModel:
    """
    The teacher from a hub name or folder; `init_kwargs` go to `from_pretrained` (dtype, quantization_config,
    device_map, revision, ...), in the dtype it was saved in unless they say otherwise. Each process of a distributed
    run places the whole teacher itself unless `device_map` does.
    """
    kwargs = {"dtype": "auto", "trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if distributed:
        kwargs.setdefault("device_map", None)
    return create_model_from_path(path, **kwargs)
