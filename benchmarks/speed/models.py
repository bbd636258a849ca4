"""
Models and trainers shared by `step.py`, `scaling.py` and the scaling benchmarks.

Decisions:
- Models have random weights, since the cost of a step does not depend on what they know. A random student writes random text, so
  sampling is limited to tokens of ASCII text: none that ends the turn, so that all completions have full length; no control
  tokens; nothing that a normalizer changes, for which TRL's byte offsets raise an error. The limit is in the weights
  (`only_text`), so neither trainer needs a logits processor.
- Both trainers run their own `train()`, one epoch at a time, and an epoch is one optimizer step. The time is that from
  `on_epoch_begin` to `on_epoch_end`, with loading the batch and logging the step, whatever the two loops do inside. What
  `train()` does before and after is not timed.
- TRL's trainer does not time itself, so its methods are wrapped. Time outside all of them is `rest`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from benchmarks.clock import Clock, Step
from benchmarks.report import gsm8k
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer, token_bytes


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from demo.from_nothing import byte_level_bpe


NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6} | {
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32} | {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28} | {
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
ROWS_1B_7B = (128_256, 152_064)  # of the embeddings of these two, as published
LEARNING_RATE = 1e-6
TURNS = (  # chat templates of the small tokenizers; text precedes the answer, which `only_text` needs
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
)


@dataclass(frozen=True)
class Setting:
    """The models, sizes and device of a trainer's step. Pairs are (student, teacher)."""

    tokenizers: tuple[Path, Path]
    rows: tuple[int, int]  # of the embeddings
    new_tokens: int
    batch: int = 4  # prompts in a micro-batch
    accumulation: int = 2
    shapes: tuple[dict, dict] = (NARROW, NARROW)
    lora: bool = False
    hybrid: bool = True  # whether GOLD's hybrid loss is measured too
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    uncompiled: bool = False  # whether our trainer is measured without a compiled decode step too

    @property
    def prompts(self) -> int:
        return self.batch * self.accumulation

    def tokenizer(self, side: int) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizers[side])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = "<|finetune_right_pad_id|>"
        return tokenizer

    def config(self, side: int) -> PretrainedConfig:
        tokenizer, rows = self.tokenizer(side), self.rows[side]
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        kind = (LlamaConfig, Qwen2Config)[side]
        return kind(vocab_size=rows, max_position_embeddings=32_768, **self.shapes[side], **ids)

    def model(self, side: int) -> PreTrainedModel:
        """The student (0) or the teacher (1); the same weights at every call."""
        tokenizer = self.tokenizer(side)
        torch.manual_seed(side)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(self.config(side), dtype=self.dtype)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        if side == 0:
            only_text(model, tokenizer)
        return model

    @property
    def peft_config(self) -> LoraConfig | None:
        return (
            LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if self.lora else None
        )

    def common(self, folder: Path) -> dict:
        """Settings that both trainers get."""
        return {
            "output_dir": str(folder),
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
            "dataloader_pin_memory": self.device != "cpu",
            "bf16": False,  # the weights are in `dtype` already
            "gradient_checkpointing": False,
            "max_length": None,
            "lmbda": 1.0,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
        }


def only_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Limits sampling to ids of ASCII text, after one of them: the first element of a hidden state is the token's own mark,
    which no layer changes, and only the rows of these ids in the tied head agree with it."""
    table, added = token_bytes(tokenizer), tokenizer.added_tokens_decoder
    text = [i for i, data in enumerate(table) if i not in added and data.isascii() and data]
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[:, 0] = -4
        rows[text, 0] = 4
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0


def conversations(assets: Path, rows: int) -> list[tuple[str, str]]:
    """The first questions and answers of GSM8K."""
    return [(row["question"], row["answer"]) for row in gsm8k(assets, rows)]


def published(assets: Path) -> tuple[Path, Path]:
    return assets / "tokenizers" / "llama-3.2", assets / "tokenizers" / "qwen2.5"


def small(assets: Path, folder: Path, sizes: tuple[int, int] = (1_000, 2_000)) -> tuple[Path, Path]:
    """Two byte-level BPE tokenizers of about `sizes` entries, saved with chat templates of their own."""
    texts = [text for row in conversations(assets, 2_000) for text in row]
    found = []
    for size, template, start in zip(sizes, TURNS, ("<|assistant|>", "<|start|>"), strict=True):
        tokenizer = byte_level_bpe(texts, size, ["<|end|>", "<|pad|>", "<|user|>", start])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
        fast.chat_template = template
        found.append(folder / f"bpe-{size}")
        fast.save_pretrained(found[-1])
    return found[0], found[1]


# Measuring


class Timed(TrainerCallback):
    """Times each epoch, which is one step, with `clock`. Keeps the seconds of all steps and the log of the last."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.seconds: list[float] = []
        self.log: dict[str, float] = {}

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._clock.start()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._clock.stop()
        self.seconds.append(self._clock.step.seconds)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.log = dict(logs)


class Ours:
    """Our trainer, with `dpca` unless `options` name another loss. `texts`: what the teacher read in the last step, prompts and completions."""

    def __init__(self, setting: Setting, rows: list[tuple[str, str]], folder: Path, **options: Any):
        self._clock = Clock(setting.device)
        self._timed = Timed(self._clock)
        self.trainer = CrossTokenizerGKDTrainer(
            setting.model(0),
            setting.model(1),
            CrossTokenizerGKDConfig(
                **{
                    "distillation_loss": "dpca",
                    **setting.common(folder),
                    "max_new_tokens": setting.new_tokens,
                    **options,
                }
            ),
            train_dataset=Dataset.from_list([{"prompt": [turn("user", question)]} for question, _ in rows]),
            processing_class=setting.tokenizer(0),
            teacher_processing_class=setting.tokenizer(1),
            callbacks=[self._timed],
            peft_config=setting.peft_config,
        )
        self.trainer.remove_callback(PrinterCallback)
        self.texts: tuple[list[list[int]], list[list[int]]] = ([], [])
        self._clock.watch(self.trainer.teacher, "scores", "teacher", self._count_teacher)
        self._clock.watch(self.trainer, "training_step", "student", self._count_student)

    def _count_teacher(self, args: tuple, kwargs: dict, result: Any) -> dict[str, Any]:
        self.texts = args[:2]  # prompts and completions
        return {"teacher": sum(len(row) for part in self.texts for row in part)}

    def _count_student(self, args: tuple, kwargs: dict, result: Any) -> dict[str, Any]:
        tokens, prompts = args[1]["lengths"].sum(), args[1]["prompt_lengths"].sum()
        return {"student": tokens, "written": tokens - prompts, "prompts": prompts}

    def run(self) -> Step:
        self.trainer.train()
        step, log = self._clock.step, self._timed.log
        phases = {name.removeprefix("seconds/"): value for name, value in log.items() if name.startswith("seconds/")}
        phases.pop("step", None)
        return finished(step, phases)

    @property
    def seconds(self) -> list[float]:
        """Of every step so far."""
        return self._timed.seconds

    @property
    def log(self) -> dict[str, float]:
        """What was logged last."""
        return self._timed.log

    @property
    def overhead(self) -> float | None:
        """The share of the last step that its log gives as its own overhead."""
        return self._timed.log.get("compute_overhead")


class Gold:
    """TRL's trainer, timed from outside. `student` is its forward pass and the whole backward pass."""

    def __init__(self, setting: Setting, rows: list[tuple[str, str]], folder: Path, hybrid: bool = False):
        self._clock = clock = Clock(setting.device)
        timed = Timed(clock)
        messages = [[turn("user", question), turn("assistant", answer)] for question, answer in rows]
        self.trainer = trainer = GOLDTrainer(
            setting.model(0),
            setting.model(1),
            GOLDConfig(
                **setting.common(folder),
                max_completion_length=setting.new_tokens,
                use_uld_loss=True,
                uld_use_hybrid_loss=hybrid,
                teacher_tokenizer_name_or_path=str(setting.tokenizers[1]),
            ),
            train_dataset=Dataset.from_list([{"messages": own} for own in messages]),
            processing_class=setting.tokenizer(0),
            callbacks=[timed, _OptimizerPhase(clock)],
            peft_config=setting.peft_config,
        )
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer, "generate_on_policy_outputs", "generation", self._count_student)
        clock.watch(trainer.teacher_model, "forward", "teacher", self._count_teacher)
        clock.watch(trainer.model, "forward", "student")
        clock.watch(trainer.uld_loss_fn, "_compute_distillation_loss", "loss")
        clock.watch(trainer.accelerator, "backward", "student")

    @staticmethod
    def _count_student(args: tuple, kwargs: dict, result: Any) -> dict[str, Any]:
        _, mask, labels, *_ = result
        student, written = mask.sum(), (labels != -100).sum()
        return {"student": student, "written": written, "prompts": student - written}

    @staticmethod
    def _count_teacher(args: tuple, kwargs: dict, result: Any) -> dict[str, Any]:
        return {"teacher": kwargs["attention_mask"].sum()}

    def run(self) -> Step:
        self.trainer.train()
        return finished(self._clock.step, self._clock.step.phases)


class _OptimizerPhase(TrainerCallback):
    def __init__(self, clock: Clock):
        self._clock = clock

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._phase = self._clock.phase("optimizer")
        self._phase.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._phase.__exit__(None, None, None)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def finished(step: Step, phases: dict[str, float]) -> Step:
    """`step` with the rest of its seconds assigned, so that `phases` add up to all of them."""
    step.phases = {**phases, "rest": step.seconds - sum(phases.values())}
    step.tokens = {name: int(number) for name, number in step.tokens.items()}
    return step


def quiet() -> None:
    """Silences warnings that two trainers would repeat each time they are built."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
