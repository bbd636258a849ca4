#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# A reference or a teacher that follows the student is in no checkpoint. A resumed run of SDFTTrainer with teacher_model_kind="ema" has the untrained
# model as its teacher again, one of DPOTrainer with sync_ref_model=True as its reference, and the average of BEMACallback starts at the checkpoint. The
# student, optimizer and random numbers are those of the checkpoint. No error, no warning.
#
# Seen: eight steps, resumed after the fourth. In the uninterrupted run SDFT's teacher and DPO's reference have moved by then; in the resumed one
# both are the first model again, to the last bit. DPO's loss of the fifth step is 0.50 in the one and 0.04 in the other, where it has counted what was
# learned before as a margin. The students and BEMA's averages end as others.
#
# Why it matters: a run that is killed often enough is distilled from the untrained model all along, or held near it, though its settings say that
# the teacher follows. Results depend on where a cluster ended the job, and the student of the checkpoint itself is right, so that a look at it shows nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import BEMACallback, DPOConfig, DPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
PAIRS = Dataset.from_list([{"prompt": f"hello {n}", "chosen": " good day", "rejected": " go away"} for n in range(16)])
TOLD = Dataset.from_list([{"prompt": f"hello {n}", "privileged_context": "good day"} for n in range(16)])
quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
plain = {"per_device_train_batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
saved = {"save_strategy": "steps", "save_steps": 4}


def flat(model):
    return torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])


class Beginnings(TrainerCallback):
    """The weights of the model that follows, and of the student, at the beginning of each step."""

    def __init__(self, following):
        self.following, self.at = following, {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = flat(self.following), flat(model)


def run(name, checkpoint=None):
    output = f"{folder}/{name}"
    if name == "SDFT":
        args = SDFTConfig(output, teacher_model_kind="ema", num_generations=1, max_completion_length=4, **plain, **saved, **quiet)
        trainer = SDFTTrainer(model=f"{folder}/student", args=args, train_dataset=TOLD, processing_class=tokenizer)
        following = trainer.teacher_model
    else:
        args = DPOConfig(output, sync_ref_model=True, ref_model_sync_steps=2, **plain, **saved, **quiet)
        trainer = DPOTrainer(model=f"{folder}/student", args=args, train_dataset=PAIRS, processing_class=tokenizer)
        following = trainer.ref_model
    beginnings, average = Beginnings(following), BEMACallback(update_freq=1)
    trainer.add_callback(beginnings)
    trainer.add_callback(average)
    trainer.train(resume_from_checkpoint=checkpoint and f"{output}/{checkpoint}")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return beginnings.at, losses, flat(trainer.model), flat(average.running_model)


torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=2)
LlamaForCausalLM(config).save_pretrained(f"{folder}/student")
tokenizer.save_pretrained(f"{folder}/student")
right = True
for name in ("SDFT", "DPO"):
    (whole, losses, end, average), (again, losses_again, end_again, average_again) = run(name), run(name, "checkpoint-4")
    first = whole[0][0]
    moved, moved_again = ((at[4][0] - first).norm().item() for at in (whole, again))
    same = whole[4][1].equal(again[4][1])
    apart, apart_average = (end - end_again).norm().item(), (average - average_again).norm().item()
    print(f"seen: {name}: the model that follows has moved by {moved:.2f} after four steps, and by {moved_again} where the run is resumed there")
    print(f"seen: {name}: the student is {'the same' if same else 'another'} there; loss of the fifth step {losses[4]:.2f}, {losses_again[4]:.2f}")
    print(f"seen: {name}: at the end the students are {apart:.2f} apart, BEMA's averages {apart_average:.2f}")
    right = right and moved > 0.05 and moved_again == 0 and same and min(apart, apart_average) > 1e-3
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
