"""Toy tokenizers and models, trained or built here: two families that have only the text in common that they can
spell.
"""

from functools import cache

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)


WORDS = (
    "one two three four five six seven eight nine ten eleven twelve hundred thousand and plus minus is the sum of what"
)
CORPUS = [f"What is {n} plus {n * 7 % 100}? {n * 8 % 100} is the sum of two. {WORDS}" for n in range(100)]

STUDENT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEACHER_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def student_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, one digit a token, with its own turn markers and a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|start|>", "<|eot|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|start|>"],
        chat_template=STUDENT_TEMPLATE,
    )


def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like Unigram with byte fallback and a dummy prefix, whole numbers, other turn markers, no BOS."""
    special = ["<unk>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]
    letters = sorted({*"".join(CORPUS)} - {" "})
    words = (
        [f"▁{word}" for word in WORDS.split()[::2]] + [f"▁{n}" for n in range(10, 100)] + ["sum", "tw", "▁th", "plu"]
    )
    pieces = [(piece, -2.0 - 4 / len(piece)) for piece in ["▁", *letters, *words]]
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary = [
        *((token, 0.0) for token in special),
        *pieces,
        *fallback,
    ]  # fixed, not trained: the same in every process
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|system|>", "<|assistant|>"],
        chat_template=TEACHER_TEMPLATE,
    )


@cache
def _sizes() -> tuple[int, int]:
    return len(student_tokenizer()), len(teacher_tokenizer())


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def student_model(seed: int = 0, **config) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "vocab_size": _sizes()[0], **config}))


def teacher_model(seed: int = 1, **config) -> torch.nn.Module:
    """With padded rows past its tokenizer, as published models have."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen2Config(**{**SHAPE, "vocab_size": _sizes()[1] + 11, **config}))


def prompts(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {n} plus {n % 5}?" + " and the sum of it" * (n % 3)}],
                "completion": [{"role": "assistant", "content": f"REFERENCE {n + n % 5}"}],
            }
            for n in range(rows)
        ]
    )


def trained_before(model, folder, bf16: bool):
    """`model` after a step of transformers' Trainer at a learning rate of 0, which leaves the weights as they were."""
    rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 4
    own = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    Trainer(model, TrainingArguments(str(folder), learning_rate=0.0, bf16=bf16, **own), train_dataset=rows).train()
    return model


SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def fix_rollouts(trainer):
    """The student 'writes' a text of uneven length that depends only on the prompt, so that runs can be compared."""
    tokenizer = trainer.processing_class

    def write(model, prompts, step):
        texts = [f"{len(p.student_ids)} is the sum" + " of what and two" * (sum(p.student_ids) % 4) for p in prompts]
        return [(tokenizer.encode(text)[:40] + [tokenizer.eos_token_id] * (len(text) % 2), None) for text in texts]

    trainer.rollouts.write = write
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def step_of(trainer) -> torch.Tensor:
    """The change of the weights by the run; with `SGD` and one step, minus the step's gradient."""
    before = weights(trainer).clone()
    trainer.train()
    return weights(trainer) - before
