"""What is used of TRL is there, and where TRL has dropped `experimental.gkd`, the same trainer is built on `SFTTrainer`."""

import inspect
import json
import subprocess
import sys

import pytest
from trl import SFTTrainer

from trl_ctopd import CrossTokenizerGKDTrainer
from trl_ctopd.training.resuming import ResumableTrainer


RUN = """
import json, logging, sys
if {hidden!r}:
    sys.modules["trl.experimental.gkd"] = None
import torch
from toys import SGD, fix_rollouts, prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer, weights
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
logging.getLogger("trl_ctopd").setLevel("INFO")
logging.basicConfig(stream=sys.stderr)
args = CrossTokenizerGKDConfig({out!r}, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, max_new_tokens=8,
    max_steps=2, save_strategy="no", per_device_train_batch_size=4, **SGD)
trainer = fix_rollouts(CrossTokenizerGKDTrainer(student_model(), teacher_model(), args, prompts(),
    processing_class=student_tokenizer(), teacher_processing_class=teacher_tokenizer()))
trainer.train()
trainer.save_model()
print(json.dumps({{
    "weights": weights(trainer)[:2000].double().tolist(),
    "parents": [base.__module__ for base in type(trainer).__mro__[4:6]],
    "settings": {{name: str(value) for name, value in args.to_dict().items() if name != "output_dir"}},
}}))
"""


def run(tmp_path, hidden: bool) -> tuple[dict, str]:
    """A training in a fresh process, and what its log says."""
    code = RUN.format(hidden=hidden, out=str(tmp_path / str(hidden)))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_without_experimental_gkd_the_same_run_stands_on_sft_trainer_and_the_log_says_which_it_was(tmp_path):
    (there, told), (gone, told_without) = run(tmp_path, hidden=False), run(tmp_path, hidden=True)
    assert there["parents"] == ["trl.experimental.gkd.gkd_trainer", "trl.trainer.sft_trainer"]
    assert gone["parents"] == ["trl_ctopd.gkd", "trl.trainer.sft_trainer"]
    assert gone["weights"] == pytest.approx(there["weights"], rel=0, abs=1e-9)
    differ = {name for name in there["settings"] if there["settings"][name] != gone["settings"].get(name)}
    assert differ <= {"logging_dir", "run_name"} and set(there["settings"]) == set(gone["settings"])
    assert "the trainer is built on TRL's experimental.gkd" in told
    assert "the trainer is built on SFTTrainer, since this TRL has no experimental.gkd" in told_without


def test_another_import_error_of_trl_is_not_taken_for_a_dropped_trainer():
    code = "import sys\nsys.modules['trl.trainer.sft_config'] = None\nimport trl_ctopd.gkd"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "sft_config" in done.stderr


@pytest.mark.parametrize(
    "name", [name for name, own in vars(CrossTokenizerGKDTrainer).items() if inspect.isfunction(own)]
)
def test_what_is_overridden_is_there_and_takes_the_arguments_it_is_given(name):
    """A method of ours that has a parent's name is called by that parent, with its arguments."""
    own, parents = getattr(CrossTokenizerGKDTrainer, name), getattr(SFTTrainer, name, None)
    if parents is None or name in OTHER_ARGUMENTS:
        return
    taken = inspect.signature(own).parameters
    if any(one.kind == inspect.Parameter.VAR_POSITIONAL for one in taken.values()):
        return
    assert set(inspect.signature(parents).parameters) <= {*taken, "args", "kwargs"}, name


OTHER_ARGUMENTS = {"__init__"}


@pytest.mark.parametrize(("trainer", "overridden"), [(CrossTokenizerGKDTrainer, 9), (ResumableTrainer, 5)])
def test_every_method_that_the_trainer_says_it_overrides_is_one_of_its_parents(trainer, overridden):
    told = trainer.__doc__.partition("Args:")[0]
    named = [word for word in set(told.replace("`", " ").replace(",", " ").replace(":", " ").split()) if "_" in word]
    named = [name for name in named if name in vars(trainer) and name != "_prepare_to_resume"]
    assert len(named) >= overridden
    assert not [name for name in named if not hasattr(SFTTrainer, name)]
