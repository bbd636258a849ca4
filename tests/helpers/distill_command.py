"""The command line of `examples/distill.py` with toy models under a config of `examples/accelerate_configs/cpu`."""

import json
import sys
from pathlib import Path

from toys import prompts


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"


def distill(folder: Path, name: str, *options: object) -> list[object]:
    """Trains the models in `folder`; the output goes to `folder / "output"`."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts(8)))
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "cpu" / f"{name}.yaml"),
        *(*options, CONFIGS / "cpu" / "on_cpu.py", EXAMPLES / "distill.py"),
        *("--model_name_or_path", folder / "student", "--teacher_model_name_or_path", folder / "teacher"),
        *("--dataset_name", data, "--use_cpu", "--bf16", "false", "--max_new_tokens", "8", "--max_steps", "2"),
        *("--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "1e-2"),
        *("--report_to", "none", "--output_dir", folder / "output"),
    ]
