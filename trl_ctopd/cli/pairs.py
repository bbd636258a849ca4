"""What `ctopd prefer` runs: options in, a student trained on pairs out. `--dataset_name` is as for `ctopd distill`."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ..preference import CrossTokenizerDPOConfig, CrossTokenizerDPOTrainer
from .distillation import evaluated_split, set_init_kwargs, splits_of, train_and_save


@dataclass
class PreferArguments(ScriptArguments):
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the teacher, the reference; in the paper, after SFT."}
    )
    positive_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of the teacher after training on the preference. With `negative_teacher`, it weighs the chunks."
        },
    )
    negative_teacher: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the teacher after training on the opposite preference."}
    )


def parser(**options) -> TrlParser:
    """The command's options: those of dataset, training and student."""
    return TrlParser((PreferArguments, CrossTokenizerDPOConfig, ModelConfig), **options)


def prepare(
    script_args: PreferArguments, training_args: CrossTokenizerDPOConfig, model_args: ModelConfig
) -> CrossTokenizerDPOTrainer:
    """All that comes before training."""
    if script_args.teacher_model_name_or_path is None:
        raise ValueError("No teacher: pass `--teacher_model_name_or_path`.")
    set_init_kwargs(training_args, model_args)
    splits = splits_of(script_args)
    return CrossTokenizerDPOTrainer(
        model=model_args.model_name_or_path,
        teacher_model=script_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        eval_dataset=evaluated_split(script_args, training_args, splits),
        positive_teacher=script_args.positive_teacher,
        negative_teacher=script_args.negative_teacher,
        peft_config=get_peft_config(model_args),
    )


def finish(trainer: CrossTokenizerDPOTrainer, script_args: PreferArguments):
    train_and_save(trainer, script_args)
    trainer.accelerator.end_training()
