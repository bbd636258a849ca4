"""
Train a student on pairs of answers, a chosen and a rejected one, with a teacher with another tokenizer as the reference (CTPD).

One GPU, LoRA:

    ctopd prefer \\
        --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \\
        --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
        --dataset_name trl-lib/ultrafeedback_binarized \\
        --dtype bfloat16 --use_peft --lora_r 16 --lora_target_modules all-linear --learning_rate 5e-6 \\
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --output_dir prefer_output

From a file of settings, which options on the command line override; on four GPUs:

    ctopd prefer --config settings.yaml --max_steps 100
    accelerate launch --num_processes 4 -m trl_ctopd.cli prefer --config settings.yaml

Chunks weighed by two more teachers, one trained on the preference and one on its opposite:

    ctopd prefer ... --positive_teacher teacher-dpo --negative_teacher teacher-dpo-swapped
"""

from collections.abc import Sequence

from .distill import run


def main(arguments: Sequence[str] | None = None) -> None:
    own = ("cli/pairs.py", "PreferArguments"), ("preference.py", "CrossTokenizerDPOConfig")
    run("ctopd prefer", __doc__, own, "pairs", arguments)
