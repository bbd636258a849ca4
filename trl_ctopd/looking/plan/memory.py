"""
Estimates device memory: bytes for weights, gradients and optimizer, and for each phase of a step, by strategy.

Decisions:
- There is no formula for the memory of a forward or backward pass. The model is built without data (PyTorch's
  `FakeTensorMode`), the trainer's own pass is run on it, and the live tensors are added up. This works for any architecture.
- The peak of a phase is what is always allocated, plus what the phase adds: for generation, the KV cache of all prompts of the
  step; for the teacher, one forward pass; for the student's training step, its activations and gradients; then the optimizer
  step. Phases do not overlap, so the largest peak counts.
- Sharding divides: ZeRO-2 the gradients and the optimizer, ZeRO-3 and FSDP2 also the weights, the teacher's too. Two layers are
  gathered at a time (the current and the next one), and the whole student during generation, unless
  `gather_for_generation=False`. DeepSpeed keeps a float32 copy of trained weights in half precision. Under autocast,
  Accelerate replaces them by float32 for FSDP2, where gradients are unsharded until the last of several micro-batches.
- A quantized model's linear layers but the LM head have the bits that its config.json says, scales included, and one of them is
  unpacked at a time. It is whole on each device. What is unpacked as it is loaded, or at the first pass, counts as plain.
- A loss on distributions is computed between the two passes, in tiles of bounded memory.
- An adapter is merged into copies of the weights while the student writes.
- Only tensors count. CUDA itself takes some 0.5 GiB a process, and the allocator loses some memory to fragmentation.
"""

import contextlib
import weakref
from dataclasses import dataclass, replace
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from ...losses import LOSSES
from ...models import heads
from ...models.products import packing_is_faster
from .work import Work


@dataclass(frozen=True)
class Pass:
    """Bytes. `peak`: the largest memory of a pass besides weights and buffers, gradients included; `held`: that which is there between
    forward and backward pass, where the loss is computed."""

    weights: int
    layer: int  # the largest module that sharding gathers at once
    trained: int  # weights with gradients
    trained_in_float32: int  # the same weights, if all were float32
    peak: int
    held: int = 0
    # elements of the linear layers' weights that a quantization takes: all but the LM head's, which are `head`, and an adapter's
    linear: int = 0
    head: int = 0
    largest_linear: int = 0
    quantized: bool = False

    def in_bits(self, bits: float, itemsize: int) -> "Pass":
        """The same of a model whose linear layers have `bits` a weight, and whose others have `itemsize` bytes."""
        saved = self.linear * itemsize - round(self.linear * bits / 8)
        unpacked = self.largest_linear * itemsize
        return replace(self, weights=self.weights - saved, peak=self.peak + unpacked, quantized=True)


@dataclass(frozen=True)
class Plan:
    """Bytes of one device: what is always allocated, and what each phase adds. For the optimizer step that is the gradients."""

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
    """Counts bytes of the tensors that are created inside and still alive, and their maximum."""

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
    """The memory of a forward pass over `rows` full rows that scores their completions, and of the backward pass if it learns."""
    length, scored = work.prompt_tokens + work.new_tokens, rows * work.new_tokens
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype)).requires_grad_(learns)
        heads.add_token_scores(model)
        if lora_rank is not None:
            lora = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    if learns and work.activation_checkpointing:
        # transformers before 5.23 has the second alone
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.enable_input_require_grads()
    model.train(learns)
    tile = mock.patch.object(heads, "_SMALL_TILE_COLUMNS", heads._TILE_COLUMNS["cuda"])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=work.autocast)
    alive, held = Alive(), 0
    with FakeTensorMode(allow_non_fake_inputs=True), tile if work.cuda else contextlib.nullcontext():
        _materialize(model)
        alive.leave_out([*model.parameters(), *model.buffers()])
        with alive, torch.set_grad_enabled(learns):
            for _ in range(micro_batches):
                inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
                inputs |= {"scored": torch.zeros(2, scored, dtype=torch.long), "targets": torch.zeros(scored).long()}
                with autocast:
                    log_probs = model(**inputs).log_probs
                held = max(held, alive.now)
                if learns:
                    log_probs.sum().backward()
                del log_probs
    head = model.get_output_embeddings()
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and "lora_" not in name
    ]
    return Pass(
        weights=_bytes(model.parameters()),
        layer=max(_bytes(module.parameters()) for module in _sharded_units(model)),
        trained=_bytes(p for p in model.parameters() if p.requires_grad),
        trained_in_float32=4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak=alive.most,
        held=held,
        linear=sum(linear),
        head=head.weight.numel(),
        largest_linear=max(linear, default=0),
    )


def bits_of(quantization: dict | None, learns: bool = False) -> float | None:
    """Bits of a weight with its share of the scales, by the `quantization_config` of a config.json; None where the weights are plain
    once the model runs. Raises `ValueError` for a method that is not known here."""
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method in ("gptq", "awq"):
        bits, group = (
            quantization.get(name, quantization.get(old))
            for name, old in (("bits", "w_bit"), ("group_size", "q_group_size"))
        )
        return bits + ((16 + bits) / group if group > 0 else 0)
    if method == "bitsandbytes":
        if quantization.get("load_in_8bit"):
            return 8
        return 4 + (8 if quantization.get("bnb_4bit_use_double_quant") else 32) / 64
    if method in ("compressed-tensors", "gguf") or (method == "fp8" and learns):
        return None
    if method == "fp8":
        return 8
    raise ValueError(f"the planner does not know how many bits a weight has that is quantized with {method!r}")


def _materialize(model: nn.Module) -> None:
    """Turns parameters and buffers on the meta device into fake ones. Tied ones stay tied."""
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


def _sharded_units(model: nn.Module) -> list[nn.Module]:
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    return [*layers, model.get_input_embeddings(), model.get_output_embeddings()]


def cache_bytes(config: PretrainedConfig, work: Work) -> int:
    """Keys and values for all prompts of a step, with one layer's counted twice while it grows; and float32 logits of one token
    with the copies that sampling makes."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = 2 * heads * size * getattr(torch, work.dtype).itemsize
    rows = work.batch * work.accumulation
    layers = rows * (work.prompt_tokens + work.new_tokens) * width * (text.num_hidden_layers + 1)
    return layers + 4 * rows * text.vocab_size * torch.float32.itemsize


def loss_bytes(student: PretrainedConfig, teacher: PretrainedConfig, work: Work) -> int:
    """What a loss on distributions adds to the activations of a micro-batch: its tiles (`logit_tile_tokens`), and the teacher's hidden states.
    0 for a loss on log-probs. Raises `ValueError` for an unknown loss."""
    name = "reverse_kl" if work.loss == "auto" else work.loss
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}: choose one of auto, {', '.join(LOSSES)}")
    loss = LOSSES[name]
    if loss.signal != "logits":
        return 0
    own, read = student.get_text_config(), teacher.get_text_config()
    tokens = work.batch * work.new_tokens
    held = loss.numbers_held(tokens, work.logit_tile_tokens, own.vocab_size, read.vocab_size)
    return held * torch.float32.itemsize + tokens * read.hidden_size * getattr(torch, work.dtype).itemsize


def passes(student: PretrainedConfig, teacher: PretrainedConfig, work: Work) -> tuple[Pass, Pass]:
    rows = min(work.teacher_batch or work.batch, work.batch * work.accumulation)
    own = run_pass(student, work, work.batch, True, work.lora_rank, min(work.accumulation, 2))
    own = replace(own, peak=max(own.peak, own.held + loss_bytes(student, teacher, work)))
    read = run_pass(teacher, work, rows, False)
    size = getattr(torch, work.dtype).itemsize
    own_bits = _bits_as_loaded(work.student_bits) or bits_of(_quantization(student), learns=True)
    bits = own_bits, _bits_as_loaded(work.teacher_bits) or bits_of(_quantization(teacher))
    return tuple(
        one if given is None else one.in_bits(given, size) for one, given in zip((own, read), bits, strict=True)
    )


def _copied_to_write(own: Pass, work: Work) -> int:
    """Weights that lie there once more while the student writes, with an adapter merged, or packed."""
    if own.quantized:
        return 0
    whole = work.dtype == "float32" and not work.autocast
    packs = whole and not work.cuda and packing_is_faster(work.batch * work.accumulation)
    adapted = own.linear if work.lora_rank is not None or packs else 0
    return (adapted + packs * own.head) * getattr(torch, work.dtype).itemsize


def _bits_as_loaded(bits: int | None) -> float | None:
    return None if bits is None else bits_of({"quant_method": "bitsandbytes", f"load_in_{bits}bit": True})


def _quantization(config: PretrainedConfig) -> dict | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def plan(own: Pass, read: Pass, cache: int, work: Work, strategy: str, devices: int) -> Plan:
    """The memory of one device under one of `STRATEGIES`."""
    sharded, deepspeed = strategy in ("zero3", "zero3_offload", "fsdp2"), strategy.startswith("zero")
    over = devices if sharded else 1
    states_over = 1 if strategy == "ddp" else devices
    half = getattr(torch, work.dtype).itemsize == 2
    whole = sharded and devices > 1
    weights, trained = own.weights, own.trained
    if strategy == "fsdp2" and work.autocast:
        weights, trained = weights - trained + own.trained_in_float32, own.trained_in_float32
    gradients = trained // states_over
    # AdamW has two numbers for each trained weight, of the same dtype. DeepSpeed's are float32, with a float32 copy of the weight.
    optimizer = (3 * own.trained_in_float32 if deepspeed and half else 2 * trained) // states_over
    student = weights // over
    if strategy == "zero3_offload":
        optimizer, student = 0, 0
    learning = own.peak + (gradients - own.trained) + (2 * own.layer if whole else 0)
    if strategy == "ddp" and devices > 1:
        learning += own.trained  # buckets for the reduction over the devices
    if strategy == "fsdp2" and whole and work.accumulation > 1:
        learning += own.trained  # Trainer has them reduced over the devices once, at the end
    return Plan(
        student=student,
        teacher=read.weights if read.quantized else 0 if strategy == "zero3_offload" else read.weights // over,
        gradients=gradients,
        optimizer=optimizer,
        writing=cache + (own.weights if whole else _copied_to_write(own, work)),  # besides its own shard
        reading=read.peak + (2 * read.layer if whole and not read.quantized else 0),
        learning=learning,
    )
