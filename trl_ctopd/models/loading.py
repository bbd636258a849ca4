"""Models and tokenizers as they come: whole models, adapters on a base; whether a model's tokenizer fits it, and whether what is
trained can be saved."""

import json
import os
import platform
import re
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import get_max_memory
from peft import AutoPeftModelForCausalLM, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file, is_sentencepiece_available, logging
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model

from .forwards import base_model
from .quantized import saved_config, saved_quantization, with_quantization_config


logger = get_logger(__name__)

_PROBE = "It's 12345 times HTTPServer's camelCase,  'The ÉCOLE'\n\n  don't (x) += \"naïve\"..."
# the same with indentation, and with a character that few vocabularies have
_SENTENCEPIECE_PROBE = _PROBE + "\n    return x \U0001f9ff"
_UNKNOWN = "an unknown token"
# How llama.cpp (src/llama-vocab.cpp, 2026-11) reads names of `tokenizer.ggml.pre`: which split text as GPT-2 does, and which take a word
# that is a token for that token, though no merges lead to it. transformers splits as GPT-2 for every name that it does not know, and always
# merges.
_SPLIT_AS_GPT2 = {"gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"}
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
_OF_THE_HUB = ("revision", "token", "cache_dir", "subfolder")  # arguments that find an adapter's file
_NAMES_OF_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")


def adapter_base(name: str, revision: str | None = None) -> str | None:
    """The base model's name of an adapter (a folder, or a name on the hub); None for a whole model. Raises `ValueError` for an
    adapter that does not say."""
    file = find_adapter_config_file(name, revision=revision)
    if file is None or (Path(name) / "config.json").exists():
        return None
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name} is an adapter, and its adapter_config.json does not say of which model: load the two with "
            "`PeftModel.from_pretrained(base, folder)`, and pass that."
        )
    return base


def check_goes_on(side: str, model: str | PreTrainedModel | PeftModel, revision: str | None = None):
    """Raises `ValueError` for an encoder, an encoder-decoder and a model without the head that goes on from a text. Of a name the config.json
    says it, before anything is loaded."""
    if isinstance(model, str):
        if (os.path.isabs(model) or model.startswith(("./", "../"))) and not os.path.exists(model):
            raise ValueError(
                f"The {side} {model!r} is a folder that does not exist: give the folder of a model, or its name on the hub."
            )
        base = adapter_base(model, revision)
        name, config = model, saved_config(base or model, None if base else revision)
        kind, both = (config.get("architectures") or [""])[0], config.get("is_encoder_decoder")
        kind_of_config, made = config.get("model_type"), getattr(transformers, kind, None) if kind else None
        goes_on = made is None or made.can_generate()  # None: its code is not in transformers
    else:
        name, own = "", base_model(model)
        kind, both = type(own).__name__, own.config.is_encoder_decoder
        kind_of_config, goes_on = own.config.model_type, own.can_generate()
    if goes_on and not both:
        return
    found = f"a {kind} without a head that writes text"
    if both:
        found = f"an encoder-decoder ({kind})"
    elif kind_of_config in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        found = f"an encoder ({kind})"
    raise ValueError(
        f"The {side}{f' {name!r}' if name else ''} is {found}: a causal language model is needed, which `AutoModelForCausalLM.from_pretrained` loads."
    )


def load_model(name: str, kwargs: dict, trainable: bool = False) -> PreTrainedModel | PeftModel:
    """A whole model, also one in a GGUF file, or an adapter on its base; `kwargs` go to `from_pretrained`. An adapter is frozen unless
    `trainable`. Beside a GGUF file, `config` may be the name of the model that it was made of."""
    warn_of_two_checkpoints(name)
    kwargs = _placed(name, with_quantization_config(kwargs))
    if "gguf_file" in kwargs:
        if kwargs.get("dtype") == "auto":  # it is none that weights in GGUF's blocks have
            kwargs = {**kwargs, "dtype": "float32"}
        if isinstance(kwargs.get("config"), str):
            kwargs = {**kwargs, "config": AutoConfig.from_pretrained(kwargs["config"])}
        if kwargs.get("config") is None:
            _check_gguf_positions(name, kwargs["gguf_file"], kwargs.get("revision"))
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        forget_gguf(model)
        return model
    if adapter_base(name, kwargs.get("revision")) is None:
        return create_model_from_path(name, **kwargs)
    dtype = kwargs.get("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=trainable, **{**kwargs, "dtype": dtype})
    _check_adapter_fits(model, name, {key: kwargs[key] for key in _OF_THE_HUB if key in kwargs})
    return model


def _check_adapter_fits(model: PeftModel, name: str, of_the_hub: dict):
    """Raises `ValueError` where the file of the adapter `name` has weights that fit nothing in `model`, or that PEFT 0.21.2 scales otherwise
    (findings/shared_experts_get_no_adapter.sh). It leaves the former out and says nothing; it says what it has left out to who loads weights into a
    model, and so they are loaded once more."""
    if model.active_peft_config.is_prompt_learning or any(part.is_meta for part in model.parameters()):
        return  # PEFT counts virtual tokens as unfit, and cannot load into weights that are on disk
    weights = load_peft_weights(name, device="cpu", **of_the_hub)
    instead = "With the versions that it was trained with, save the merged model (`merge_and_unload().save_pretrained(folder)`), and pass that."
    saved, built = (any(".experts.0." in key for key in keys) for keys in (weights, dict(model.named_modules())))
    if getattr(model.active_peft_config, "use_rslora", False) and saved and not built:
        raise ValueError(
            f"{name} is an adapter with rsLoRA on each expert, which PEFT {peft.__version__} reads into the fused ones of transformers "
            f"{transformers.__version__} with twice the rank and alpha: its part in them would be larger by the root of 2. {instead}"
        )
    if unfit := set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter).unexpected_keys:
        raise ValueError(
            f"{name} is an adapter with {len(weights)} weights, of which {len(unfit)} fit nothing in {type(model.get_base_model()).__name__} as "
            f"transformers {transformers.__version__} and PEFT {peft.__version__} build it ({unfit[0]}): they would be left out, and the model would "
            f"be another one. {instead}"
        )


def _check_gguf_positions(name: str, gguf_file: str, revision: str | None):
    """Raises `ValueError` where the file scales its rotary embeddings and transformers does not read how
    (findings/gguf_forgets_the_rope_scaling.sh)."""
    metadata, tensors = read_gguf_metadata(cached_file(name, gguf_file, revision=revision))
    scaled = [tensor for tensor in tensors if re.search(r"rope_freqs|rope_factors", tensor)]
    scaled += [key for key, value in metadata.items() if key.endswith(".rope.scaling.type") and value != "none"]
    if not scaled:
        return
    try:
        config = AutoConfig.from_pretrained(name, gguf_file=gguf_file, revision=revision)
        rope = config.get_text_config().rope_parameters
    except (TypeError, KeyError):  # what transformers raises for gpt-oss
        rope = {}
    kinds = [own["rope_type"] for own in (rope, *rope.values()) if isinstance(own, dict) and "rope_type" in own]
    if all(kind == "default" for kind in kinds):
        raise ValueError(
            f"{gguf_file} of {name} scales its rotary embeddings ({scaled[0]}), and transformers {transformers.__version__} reads it without: its "
            'scores would drift from the model\'s own, the further the longer a text. Add `"config": "<name of the model that the file was made of>"` '
            "to the model's init kwargs."
        )


def _placed(name: str, kwargs: dict) -> dict:
    """`kwargs` with the process's own device for a model that is quantized, where they say that nothing places it: Accelerate moves
    plain models alone. bitsandbytes' places itself."""
    given, device = kwargs.get("quantization_config"), PartialState().device
    if kwargs.get("device_map", device) is not None or device.type == "cpu" or is_deepspeed_zero3_enabled():
        return kwargs
    saved = saved_quantization(name, kwargs.get("revision"))
    if (
        not (given or saved)
        or isinstance(given, BitsAndBytesConfig)
        or (saved or {}).get("quant_method") == "bitsandbytes"
    ):
        return kwargs
    return {**kwargs, "device_map": {"": device}}


def computes_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in half precision. Without them, torch 2.13 takes ten times as long as in float32 with
    AVX2, and five times with AVX-512 (findings/half_precision_on_a_cpu.sh)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN calls any AVX-512 enough for bfloat16, and computes it in float32
    own = torch.cpu._is_avx512_bf16_supported() or platform.machine().lower() not in ("x86_64", "amd64")
    return own and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def slow_weights(side: str, model: nn.Module) -> str | None:
    """A sentence, where weights of `model` are of a half precision that the CPU which they are on computes slowly in. Quantized models
    compute otherwise."""
    weights = list(model.parameters())
    half = {own.dtype for own in weights} & {torch.bfloat16, torch.float16}
    if getattr(base_model(model), "is_quantized", False) or {own.device.type for own in weights} != {"cpu"}:
        return None
    slow = ", ".join(sorted(str(dtype) for dtype in half if not computes_fast(dtype)))
    return slow and (
        f"The {side}'s weights are {slow}, for which this CPU has no instructions: it computes several times slower than in float32"
    )


def widen_for_cpu(side: str, model: PreTrainedModel | PeftModel):
    """Makes weights float32 of which `slow_weights` tells, if that fits into memory."""
    said = slow_weights(side, model)
    if not said or any(hasattr(own, "ds_id") for own in model.parameters()):
        return
    added = sum(own.numel() * (4 - own.itemsize) for own in model.parameters() if own.itemsize < 4)
    free = get_max_memory()["cpu"]
    if added > free:
        logger.warning(f"In float32 the {side} would take {added / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free.")
        return
    logger.info(f"{said}. They are converted, which takes {added / 1e9:.1f} GB more; set a `dtype` to keep them.")
    model.float()


def warn_of_two_checkpoints(name: str):
    """Warns of a folder with weights in one file and in shards: transformers reads the file, and leaves it there when it saves shards
    beside it. Also of a whole model beside an adapter of another, which transformers puts on it (findings/merged_over_its_adapter.sh)."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.exists() and any(
        own for kind in ("model*.safetensors*", "pytorch_model*") for own in Path(name).glob(kind)
    ):
        logger.warning(
            f"{name} holds a whole model and an adapter, which is put on it: a model that the adapter was merged into would have it twice. "
            "If it is such a one, remove the adapter's files."
        )
    single, index = Path(name) / "model.safetensors", Path(name) / "model.safetensors.index.json"
    if not (single.exists() and index.exists()):
        return
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if single.name not in shards and all((single.parent / shard).exists() for shard in shards):
        logger.warning(
            f"{name} holds two models' weights: {single.name}, which is read, and {len(shards)} shards ({shards[0]}, ...), which are not. "
            "Shards that were saved over an older model leave its file there: remove what is out of date."
        )


def warn_of_cloned_tokens(source: str | None, tokenizer: PreTrainedTokenizerBase):
    """Warns where TRL, for a `chat_template_path` that is no file, is about to add white space to the tokens of the student's `tokenizer`: it adds
    all that the other tokenizer has and this one lacks (findings/cloned_templates_bring_white_space.sh)."""
    if source is None or os.path.isfile(source):
        return
    theirs = [token.content for token in AutoTokenizer.from_pretrained(source).added_tokens_decoder.values()]
    own = tokenizer.get_vocab()
    white = [token for token in theirs if not token.strip() and token not in own]
    if white:
        logger.warning(
            f"chat_template_path={source!r} gives the student {len(white)} tokens of white space too, such as {white[0]!r}: it will read such text, "
            "which it has tokens for, as tokens that were never trained. Give a .jinja file with the template."
        )


def load_tokenizer(
    tokenizer, model_id, revision, trust_remote_code, gguf_file=None, side="student"
) -> PreTrainedTokenizerBase:
    """`tokenizer`, or the one saved with the model where it is None. Raises `TypeError` for anything but a
    tokenizer, and `ValueError` for the folder of a model without the files of one.
    """
    if tokenizer is None and gguf_file is not None:
        return _tokenizer_beside(gguf_file, model_id, revision, trust_remote_code)
    if tokenizer is None:
        base = adapter_base(model_id, revision)
        if base is not None and not _has_tokenizer(model_id, revision):
            model_id, revision = base, None
        if os.path.isdir(model_id) and not any(map(_of_a_tokenizer, os.listdir(model_id))):
            name = "processing_class" if side == "student" else "teacher_processing_class"
            raise ValueError(
                f"The {side}'s folder {model_id!r} holds no tokenizer: save its own there (`tokenizer.save_pretrained({model_id!r})`), or pass it as "
                f"`{name}`."
            )
        return _saved_tokenizer(model_id, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        way = (
            "pass its `.tokenizer`" if hasattr(tokenizer, "tokenizer") else "pass `AutoTokenizer.from_pretrained(name)`"
        )
        if isinstance(tokenizer, str | os.PathLike):
            way = f"pass `AutoTokenizer.from_pretrained({os.fspath(tokenizer)!r})`"
        raise TypeError(f"A processing class must be a text tokenizer, got {type(tokenizer).__name__}: {way}.")
    if _is_mistral_common(tokenizer):
        raise TypeError(
            f"{type(tokenizer).__name__} writes prompts without a chat template that could be read: pass "
            "`AutoTokenizer.from_pretrained(name, mistral_format=False)`, with `chat_template` set where the model brings none."
        )
    if os.path.isdir(tokenizer.name_or_path):  # of a hub's name the revision is not known
        _warn_if_rebuilt(tokenizer, tokenizer.name_or_path, None)
    return tokenizer


def _saved_tokenizer(name: str, **kwargs) -> PreTrainedTokenizerBase:
    """As `AutoTokenizer` loads it, but where mistral-common is installed with the chat template and the special tokens of the
    model's other files, as where it is not.

    Raises `ValueError` where the model has only mistral-common's files, or where the others read text otherwise.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    if not _is_mistral_common(tokenizer):
        _warn_if_rebuilt(tokenizer, name, kwargs.get("revision"))
        return tokenizer
    expected = tokenizer.encode(_PROBE, add_special_tokens=False)
    for mended in ({}, {"fix_mistral_regex": True}):  # many a tokenizer.json on the hub has a wrong pattern
        found = AutoTokenizer.from_pretrained(name, mistral_format=False, **mended, **kwargs)
        if found.eos_token is None:
            raise ValueError(
                f"{name} has a tokenizer for mistral-common alone, which writes prompts without a chat template that could be read: "
                "pass as processing class a tokenizer of the same vocabulary with `chat_template` and special tokens, such as that of "
                "the model's conversion for transformers."
            )
        if found.encode(_PROBE, add_special_tokens=False) == expected:
            return found
    raise ValueError(
        f"{name} has a tokenizer for mistral-common and one for transformers, and the two read one text differently: pass the one that "
        "the model was trained with as processing class, loaded by `AutoTokenizer.from_pretrained(name, mistral_format=False)`."
    )


def _warn_if_rebuilt(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None):
    """Warns where transformers reads text, or what follows a control token, otherwise than the file of the tokenizer says: for some
    classes and types of model it builds another tokenizer around the vocabulary."""
    if not tokenizer.is_fast or tokenizer.init_kwargs.get("fix_mistral_regex"):
        return
    if (file := _file_of(name, "tokenizer.json", revision)) is not None:
        control = tokenizer.eos_token or tokenizer.sep_token or ""
        texts = (_PROBE, f"{control}The", f"{control} The")
        found = [_tokens(tokenizer, text) for text in texts]
        expected = _tokens_by_file(file, os.path.getmtime(file), texts)
        mended = f"`PreTrainedTokenizerFast.from_pretrained({name!r})`"
    else:
        kept_as = tokenizer.vocab_files_names.get("vocab_file")
        file = None if kept_as is None else _file_of(name, kept_as, revision)
        pieces = None if file is None else _pieces_by_sentencepiece(file)
        if pieces is None:
            return
        unknown = tokenizer.unk_token
        own = [_UNKNOWN if token == unknown else token for token in _tokens(tokenizer, _SENTENCEPIECE_PROBE)]
        texts, found, expected = (_SENTENCEPIECE_PROBE,), [own], [pieces]
        mended = "a tokenizer of the model with a `tokenizer.json` that reads text as that file does"
    for text, own, right in zip(texts, found, expected, strict=True):
        if own != right:
            same = len(os.path.commonprefix([own, right]))
            shown = slice(max(same - 1, 0), same + 5)
            logger.warning(
                f"The tokenizer of {name} reads text otherwise than its {os.path.basename(file)}: transformers {transformers.__version__} "
                f"has loaded it as {type(tokenizer).__name__}, which reads {own[shown]} in {text!r}, and the file says {right[shown]}. If "
                f"the model was trained with that file, pass as processing class {mended}."
            )
            return


def _file_of(name: str, file: str, revision: str | None) -> str | None:
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@cache
def _tokens_by_file(file: str, modified: float, texts: tuple[str, ...]) -> list[list[str]]:
    """What a `tokenizer.json` makes of texts."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file)
    return [_tokens(tokenizer, text) for text in texts]


def _pieces_by_sentencepiece(file: str) -> list[str] | None:
    """What a SentencePiece model makes of the probe text; None for another kind of file, such as tiktoken's."""
    if not is_sentencepiece_available():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=file)
    except RuntimeError:
        return None
    return [_UNKNOWN if model.is_unknown(i) else model.id_to_piece(i) for i in model.encode(_SENTENCEPIECE_PROBE)]


def _is_mistral_common(tokenizer: PreTrainedTokenizerBase) -> bool:
    return hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer")


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None):
    """Gives `tokenizer` a pad token: the one asked for, its own, or its EOS. Raises `ValueError` where there is
    none.
    """
    pad_token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None or pad_token not in tokenizer.get_vocab():
        missing = "no pad token and no eos_token to pad with" if pad_token is None else f"no token {pad_token!r}"
        raise ValueError(
            f"{type(tokenizer).__name__} has {missing}: set `pad_token` in the config to a token of its vocabulary."
        )
    tokenizer.pad_token = pad_token


def by_name(model):
    """A model, or a dict of them by name: given as a `Path` they become text, and else they stay as they are."""
    if isinstance(model, Mapping):
        return {name: by_name(own) for name, own in model.items()}
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def check_vocabulary(side: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Raises `ValueError` where the tokenizer, or what ends a text in the generation config, has ids that the model does not embed."""
    if any(type(module).__name__ == "TrainableTokensLayer" for module in model.get_output_embeddings().modules()):
        raise ValueError(
            f"The {side} has `trainable_token_indices` (TRL sets them for tokens that `chat_template_path` adds), and its LM head is "
            "trained in such rows, or is its embedding: PEFT keeps the trained rows beside the weight, and the head's weight is read by itself. Where the tokens "
            "are of a `chat_template_path`, give the path of a .jinja file whose tokens the tokenizer has already, or train the "
            "whole student, without `peft_config`. Else choose `modules_to_save=['embed_tokens', 'lm_head']` for them."
        )
    embedding = next(module for module in model.get_input_embeddings().modules() if isinstance(module, nn.Embedding))
    rows = embedding.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"The {side}'s tokenizer has ids up to {highest}, but its model embeds {rows} tokens: this is not the model's "
            "tokenizer, or `model.resize_token_embeddings(len(tokenizer))` is missing."
        )
    ends = model.generation_config.eos_token_id
    strange = [
        token for token in (ends if isinstance(ends, list | tuple) else [ends]) if token is not None and token >= rows
    ]
    if strange:
        raise ValueError(
            f"The {side}'s generation config ends a text at the token {strange[0]}, and its model embeds {rows}: set "
            f"`model.generation_config.eos_token_id` to the ids that do, such as the tokenizer's {tokenizer.eos_token_id}."
        )


def _tokenizer_beside(
    gguf_file: str, name: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The repository's own where it has one; else what the GGUF file says of it, which is not all. Raises `ValueError` where transformers
    does not know how the file's tokenizer splits text."""
    kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
    if _file_of(name, "tokenizer.json", revision) is not None:
        return _saved_tokenizer(name, **kwargs)
    logger.warning(
        f"The tokenizer of {name} is read from {gguf_file}, which keeps no normalizer: texts in other than composed characters (NFC) "
        "may be encoded otherwise than in the model's own training. Pass the original model's tokenizer as processing class."
    )
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file, **kwargs)
    metadata, _ = read_gguf_metadata(cached_file(name, gguf_file, revision=revision))
    if metadata.get("tokenizer.ggml.model") != "gpt2":  # the others do not split text
        return tokenizer
    split = metadata.get("tokenizer.ggml.pre")
    if split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _SPLIT_AS_GPT2:
        raise ValueError(
            f"The tokenizer in {gguf_file} of {name} splits text in the way {split!r}, which transformers {transformers.__version__} does not "
            "know: it would read text as GPT-2 does. Pass the original model's tokenizer as processing class."
        )
    tokenizer.backend_tokenizer.model.ignore_merges = split in _IGNORE_MERGES
    return tokenizer


def _of_a_tokenizer(file: str) -> bool:
    """Whether a file of that name is, as far as it tells, of a tokenizer."""
    return (
        "token" in file
        or file.startswith(("vocab", "merges", "spiece", "tekken"))
        or file.endswith((".model", ".tiktoken"))
    )


def _has_tokenizer(name: str, revision: str | None) -> bool:
    return _file_of(name, "tokenizer_config.json", revision) is not None


def disable_dropout(model: nn.Module):
    """In layers of their own, and where attention, adapters and others are only told a probability."""
    disable_dropout_in_model(model)
    for module in model.modules():
        drops = "dropout" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (drops and name == "p")):
                setattr(module, name, 0.0)
            elif isinstance(value, dict) and "drop" in name:
                value.update({key: 0.0 for key, held in value.items() if isinstance(held, float)})


def switch_router_logits_off(model: PreTrainedModel):
    """What SFTTrainer switches on for the loss of a mixture of experts: while it writes, one token at a time would meet the mask of a
    whole text. Scoring asks for them itself."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def warn_of_experts(model: nn.Module):
    """Says whether an adapter reaches the experts of a mixture: with "all-linear" PEFT takes some families' and leaves others'. Where it takes them,
    it takes the names of linear layers beside them for the experts' too (PEFT 0.21.2: shared experts, dense first layers), which have no adapter then."""
    if not isinstance(model, PeftModel):
        return
    experts = {
        name.rpartition(".")[2] for name, part in model.named_parameters() if ".experts." in name and part.ndim == 3
    }
    kind = type(model.get_base_model()).__name__
    if any(".experts." in name and part.requires_grad for name, part in model.named_parameters()):
        logger.info(f"The adapter reaches the experts of this {kind}.")
        names = (name for name, part in model.named_modules() if isinstance(part, nn.Linear))
        beside = {re.sub(r".*\.layers\.\d+\.", "", name) for name in names if name.endswith(_NAMES_OF_EXPERTS)}
        if beside:
            names = ", ".join(f"'{name}.weight'" for name in sorted(beside))
            logger.warning(
                f"The adapter reaches the experts of this {kind}, and leaves linear layers beside them as they are. To train them too, add target_parameters=[{names}] to its config."
            )
    elif experts:
        names = ", ".join(f"'mlp.experts.{name}'" for name in sorted(experts) if "lora_" not in name)
        logger.warning(
            f"The adapter leaves the experts of this {kind} as they are, and trains what is around them alone. To train them too, add target_parameters=[{names}] to its config."
        )


def check_saves(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | None):
    """
    Saves what a checkpoint is made of, with one small weight for all, where it will be: a run is not to end at its first
    checkpoint. `folder` is None in processes that save nothing. Sampling settings that a generation config has without `do_sample`, which transformers reads and does not save,
    are given it, with a warning.

    Raises `ValueError` with the reason where something cannot be saved.
    """
    base = base_model(model)
    _make_generation_config_whole(base)
    _forget_dequantizing(base)
    if not isinstance(model, PeftModel):
        forget_gguf(base)
    parameters = list(model.named_parameters())
    if folder is None or any(isinstance(part, DTensor) or hasattr(part, "ds_id") for _, part in parameters):
        return  # shared out: only all processes together can save it
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".dry-save-") as trial:
        try:
            tokenizer.save_pretrained(trial)
            if not isinstance(model, PeftModel):
                name, weight = min(parameters, key=lambda named: named[1].numel())
                with _without_progress_bars():
                    model.save_pretrained(trial, state_dict={name: weight.detach().cpu().clone()})
        except Exception as error:
            raise ValueError(
                f"The student could not be saved once it is trained: {type(error).__name__}: {error} Mend that before it is trained, or "
                "train an adapter (peft_config)."
            ) from error


@contextmanager
def _without_progress_bars():
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _make_generation_config_whole(model: PreTrainedModel):
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        greedy, config.do_sample = config.do_sample, True
        try:
            config.validate(strict=True)
        except ValueError as error:
            config.do_sample = greedy
            raise ValueError(
                f"The student's generation config could not be saved once it is trained: {error}"
            ) from error
        logger.warning(
            "The student's generation config has sampling settings without `do_sample`, which could not be saved: it is set to True."
        )


def _forget_dequantizing(model: nn.Module):
    """Weights that were dequantized as they were read (FP8, where there is no GPU for it or `dequantize=True`) are plain ones. Saving
    undoes how they were read: they would be quantized again, and config.json would not say so, with which they are read as noise."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [operation for conversion in conversions for operation in getattr(conversion, "operations", ())]
    if not hasattr(model.config, "quantization_config") and any(
        "Dequantize" in type(one).__name__ for one in operations
    ):
        del model._weight_conversions  # what every model of this class has is found again


def forget_gguf(model: nn.Module):
    """Weights read from a GGUF file are plain ones once they are read; only their loader is still there, with which nothing can be
    trained or saved."""
    model = base_model(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if type(quantizer).__name__ != "GgufHfQuantizer":
        return
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
