"""What several processes share: the rows of a dataset, the weights of a teacher, and a student's weights while it writes.

Decisions: a teacher is sharded layer by layer like the student, so that no device ever holds all of it. Under FSDP2 that is
done by Accelerate's own preparation. (TRL's makes one unit of the whole model, and does not send out weights that only the
first process has loaded.) Under DDP and ZeRO-2 every process has the whole teacher.
"""

import copy
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.data_loader import SkipBatchSampler
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from trl.models.utils import prepare_deepspeed


def own_rows(accelerator, rows: int) -> int:
    """
    How many of the `rows` that this process has just read count, from the first on. Where a dataset ends in the middle of a
    global batch, Accelerate fills it up with rows from the start of the dataset. A stream's are marked where they are read.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader:
        return rows
    loader, remainder = state.active_dataloader, state.remainder
    if isinstance(
        loader.batch_sampler, SkipBatchSampler
    ):  # resumed inside an epoch: Accelerate does not set the remainder
        sampler = loader.batch_sampler.batch_sampler
        sharers = 1 if getattr(sampler, "split_batches", False) else getattr(sampler, "num_processes", 1)
        remainder = 0 if sampler.drop_last else len(loader.dataset) % (sampler.batch_size * sharers)
    return min(max(remainder - rows * accelerator.process_index, 0), rows) if remainder > 0 else rows


SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP)  # under which a model may be split over processes


def shards_student(accelerator) -> bool:
    """Whether the student's weights are split over processes, once they are wrapped."""
    return accelerator.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled()


def is_sharded(model: nn.Module, accelerator) -> bool:
    """Whether a forward pass of `model` needs the other processes."""
    return accelerator.num_processes > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def keep_scores_in_float32(accelerator):
    """Call this before a model is prepared. Under mixed precision, Accelerate makes FSDP2 round all outputs of a model to half
    precision, log-probs too."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def stays(model: PreTrainedModel) -> bool:
    """Whether the user has placed `model` on devices, or it is quantized, so that nothing moves or shards it."""
    return getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)


def place_teacher(model: PreTrainedModel, accelerator) -> nn.Module:
    """The frozen `model`, on its device or sharded as the student will be. A model that is quantized, or that the user has
    placed on devices, stays where it is, whole in every process."""
    if stays(model):
        return model
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        keep_apart(model)
        state, plugin = accelerator.state, accelerator.state.fsdp_plugin
        # the plugin stores which layers it wraps, and the student's are others
        state.fsdp_plugin = copy.copy(plugin)
        try:
            model = fsdp2_prepare_model(accelerator, model).eval()
        finally:
            state.fsdp_plugin = plugin
        model.set_reshard_after_forward(True)  # there is no backward pass that needs the LM head again
        return model
    return model.to(accelerator.device)


def keep_apart(model: PreTrainedModel):
    """A head that the checkpoint has beside the embeddings stays apart from them, also where the config says that they are tied: transformers
    has warned of it, and Accelerate would tie them as it shards the model (findings/a_head_of_its_own_is_tied_after_all.sh)."""
    ends = [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    if all(weight is not None for weight in ends) and ends[0] is not ends[1]:
        model.config.tie_word_embeddings = False


def is_on(device: torch.device, model: nn.Module) -> bool:
    """Whether `model` computes on `device`, at least in part. Weights that are offloaded to the CPU or the disk are taken to a GPU that
    others of the model are on."""
    spread = {torch.device(own) for own in (getattr(model, "hf_device_map", None) or {}).values() if own != "disk"}
    spread = spread or {parameter.device for parameter in model.parameters()}
    computing = {own for own in spread if own.type != "cpu"} or spread
    return _numbered(device) in map(_numbered, computing)


def _numbered(device: torch.device) -> torch.device:
    """`device` with its number, where devices of its kind have one: without one, the current device is meant."""
    if device.type in ("cpu", "mps", "meta"):
        return torch.device(device.type)
    if device.index is None:
        return torch.device(device.type, torch.get_device_module(device).current_device())
    return device


@contextmanager
def gathered_under_fsdp(model: nn.Module):
    """Gathers all weights of `model` that FSDP2 has sharded, so that each process can run it apart from the others."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [
        module._get_fsdp_state()._fsdp_param_group for module in modules
    ]  # None if submodules hold all parameters
    freed = [module for module, group in zip(modules, groups, strict=True) if group and group._reshard_after_forward]
    for module in modules:
        module.unshard()
    for module in freed:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in freed:
            module.set_reshard_after_forward(True, recurse=False)
        for module in modules:
            module.reshard()
