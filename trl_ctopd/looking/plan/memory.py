"""
What a device holds: bytes for weights, gradients, optimizer, and each phase of a step, by strategy.

Decisions:
- What a pass holds is no formula: the model is built without its numbers (PyTorch's `FakeTensorMode`), the pass that the
  trainer makes is run on it, and what is alive is added up, for any architecture.
- A phase's peak is what is always there and what it adds: while writing, the cache of keys and values of all the step's
  prompts; while the teacher reads, one forward pass; while the student learns, its activations and gradients; then the
  optimizer. Phases don't overlap, so the greatest counts.
- Sharding divides: ZeRO-2 the gradients and the optimizer, ZeRO-3 and FSDP2 the weights too, the teacher's as well; two
  layers are whole at a time (one is used, the next one comes), and the student as long as it writes, unless
  `gather_for_generation=False`. Of trained weights in half precision, DeepSpeed keeps a copy in float32, and under autocast
  Accelerate puts float32 in their place for FSDP2, whose gradients are whole until the last of several micro-batches.
- It counts tensors. A process takes some 0.5 GiB more for CUDA itself, and the allocator loses some to gaps.
"""

import contextlib
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from ...models import heads
from .work import Work


@dataclass(frozen=True)
class Pass:
    """Bytes. `peak` is what a pass holds at its fullest beside weights and buffers, gradients included."""

    weights: int
    layer: int  # the largest module that is brought together by itself under sharding
    trained: int  # weights that have gradients
    trained_in_float32: int  # the same, were they all in float32
    peak: int


@dataclass(frozen=True)
class Plan:
    """Bytes of one device: what is always there, and what each phase adds to it; the optimizer's step the gradients alone."""

    student: int
    teacher: int
    gradients: int
    optimizer: int
    writing: int
    reading: int
    learning: int

    @property
    def always(self) -> int:
        return self.student + self.teacher + self.optimizer

    @property
    def peak(self) -> int:
        return self.always + max(self.writing, self.reading, self.learning, self.gradients)


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made within and are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return found

    def leave_out(self, tensors) -> None:
        self._known |= {id(tensor.untyped_storage()) for tensor in tensors}

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self.now += storage.nbytes()
            weakref.finalize(storage, self._part, id(storage), storage.nbytes())

    def _part(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def run_pass(
    config: PretrainedConfig, work: Work, rows: int, learns: bool, lora_rank: int | None = None, micro_batches: int = 1
) -> Pass:
    """What a forward pass over `rows` full rows holds that scores their completions, and the backward pass if it learns."""
    length, scored = work.prompt_tokens + work.new_tokens, rows * work.new_tokens
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype)).requires_grad_(learns)
        heads.add_token_scores(model)
        if lora_rank is not None:
            lora = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    if learns and work.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    model.train(learns)
    tile = mock.patch.object(heads, "_SMALL_TILE_COLUMNS", heads._TILE_COLUMNS["cuda"])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=work.autocast)
    alive = Alive()
    with FakeTensorMode(allow_non_fake_inputs=True), tile if work.cuda else contextlib.nullcontext():
        _materialize(model)
        alive.leave_out([*model.parameters(), *model.buffers()])
        with alive, torch.set_grad_enabled(learns):
            for _ in range(micro_batches):
                inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
                inputs |= {"scored": torch.zeros(2, scored, dtype=torch.long), "targets": torch.zeros(scored).long()}
                with autocast:
                    log_probs = model(**inputs).log_probs
                if learns:
                    log_probs.sum().backward()
                del log_probs
    return Pass(
        weights=_bytes(model.parameters()),
        layer=max(_bytes(module.parameters()) for module in _shared_out(model)),
        trained=_bytes(p for p in model.parameters() if p.requires_grad),
        trained_in_float32=4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak=alive.most,
    )


def _materialize(model: nn.Module) -> None:
    """Parameters and buffers on the meta device become fake ones, tied ones together."""
    new = {}
    for module in model.modules():
        for parts in (module._parameters, module._buffers):
            for name, part in parts.items():
                if part is not None:
                    if part not in new:
                        new[part] = torch.empty(part.shape, dtype=part.dtype)
                        if isinstance(part, nn.Parameter):
                            new[part] = nn.Parameter(new[part], part.requires_grad)
                    parts[name] = new[part]


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in set(tensors))


def _shared_out(model: nn.Module) -> list[nn.Module]:
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    return [*layers, model.get_input_embeddings(), model.get_output_embeddings()]


def cache_bytes(config: PretrainedConfig, work: Work) -> int:
    """Keys and values of all prompts of a step, one layer of them twice while it grows, and a token's logits in float32
    with what sampling makes of them."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = 2 * heads * size * getattr(torch, work.dtype).itemsize
    rows = work.batch * work.accumulation
    layers = rows * (work.prompt_tokens + work.new_tokens) * width * (text.num_hidden_layers + 1)
    return layers + 4 * rows * text.vocab_size * torch.float32.itemsize


def passes(student: PretrainedConfig, teacher: PretrainedConfig, work: Work) -> tuple[Pass, Pass]:
    rows = min(work.teacher_batch or work.batch, work.batch * work.accumulation)
    own = run_pass(student, work, work.batch, True, work.lora_rank, min(work.accumulation, 2))
    return own, run_pass(teacher, work, rows, False)


def plan(own: Pass, read: Pass, cache: int, work: Work, strategy: str, devices: int) -> Plan:
    """Of one device, under one of `STRATEGIES`."""
    sharded, deepspeed = strategy in ("zero3", "zero3_offload", "fsdp2"), strategy.startswith("zero")
    over = devices if sharded else 1
    states_over = 1 if strategy == "ddp" else devices
    half = getattr(torch, work.dtype).itemsize == 2
    whole = sharded and devices > 1
    weights, trained = own.weights, own.trained
    if strategy == "fsdp2" and work.autocast:
        weights, trained = weights - trained + own.trained_in_float32, own.trained_in_float32
    gradients = trained // states_over
    # AdamW has two numbers a trained weight, of its kind; DeepSpeed's are float32, and so is a copy of the weight
    optimizer = (3 * own.trained_in_float32 if deepspeed and half else 2 * trained) // states_over
    student = weights // over
    if strategy == "zero3_offload":
        optimizer, student = 0, 0
    learning = own.peak + (gradients - own.trained) + (2 * own.layer if whole else 0)
    if strategy == "ddp" and devices > 1:
        learning += own.trained  # the buckets that are summed over the devices
    if strategy == "fsdp2" and whole and work.accumulation > 1:
        learning += own.trained  # Trainer has them summed over the devices once, at the end
    return Plan(
        student=student,
        teacher=0 if strategy == "zero3_offload" else read.weights // over,
        gradients=gradients,
        optimizer=optimizer,
        writing=cache + (own.weights if whole else 0),  # beside its share
        reading=read.peak + (2 * read.layer if whole else 0),
        learning=learning,
    )
