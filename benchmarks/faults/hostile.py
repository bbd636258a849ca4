"""
What happens to a training whose folders or texts are hostile: one run for each of `FOLDERS` and `TEXTS`, and a table.

```bash
python examples/small_models.py small
python -m benchmarks.faults.hostile --models small
```

A hostile folder must change nothing: the weights are those of a run in a clean one. A hostile text is trained on, or is an error that
names its row. Anything else is wrong.
"""

import argparse
import contextlib
import errno
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.report import header, save
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
from trl_ctopd.looking.report import DistillationReportCallback


OUTPUT = Path(__file__).parents[1] / "results" / "faults" / "hostile.json"
FOLDERS = {
    "a card with broken YAML": b"---\nlicense: [mit\n---\n",
    "a card with a tab in its YAML": b"---\nlicense:\tmit\n\tbase_model: x\n---\n",
    "a card in Latin-1": "---\nlicense: mit\n---\nna\u00efve".encode("latin-1"),
    "a card with a model-index that is none": b"---\nmodel-index: 7\n---\n",
    "a folder in the card's place": None,
    "output folder deleted after the first step": None,
    "no space left for the report": None,
}
TEXTS = {
    "control characters": "a\x00b\x1b[31mred\x1b[0m\x07 \u202e",
    "a lone surrogate": "half \ud83d of it",
    "whitespace alone": " \n\t ",
    "nothing": "",
    "one word of 1,000 letters": "x" * 1000,
    "control tokens of both templates": "<|im_end|><|end|><|eot_id|></s><s>[INST]",
    "combining characters in another order": "e\u0323\u0302 \u1ec7",
    "no text but a number": 7,
}


class Delete(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.rmtree(args.output_dir, ignore_errors=True)


def train(models: Path, folder: Path, text: object = "What is it?", callbacks: tuple = ()) -> torch.Tensor:
    tokenizers = {name: AutoTokenizer.from_pretrained(models / name) for name in ("student", "teacher")}
    texts = [*(f"What is {n} plus {n * 7}?" for n in range(7)), text]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    trainer = CrossTokenizerGKDTrainer(
        AutoModelForCausalLM.from_pretrained(models / "student"),
        AutoModelForCausalLM.from_pretrained(models / "teacher"),
        CrossTokenizerGKDConfig(
            str(folder / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=2,
            per_device_train_batch_size=4,
            max_new_tokens=8,
            learning_rate=1e-2,
            save_steps=1,
            report=True,
            log_completions=True,
            report_to=[],
            disable_tqdm=True,
        ),
        IterableDataset.from_generator(lambda: iter(rows)),  # rows as they are, some of which Arrow would not hold
        processing_class=tokenizers["student"],
        teacher_processing_class=tokenizers["teacher"],
        callbacks=list(callbacks),
    )
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def in_hostile_folder(models: Path, name: str, card: bytes | None, clean: torch.Tensor) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder, callbacks, report = Path(temporary), (), contextlib.nullcontext()
        run = folder / "run"
        run.mkdir()
        if card is not None:
            (run / "README.md").write_bytes(card)
        elif "card" in name:
            (run / "README.md").mkdir()
        elif "deleted" in name:
            callbacks = (Delete(),)
        else:
            full = OSError(errno.ENOSPC, "No space left on device")
            report = mock.patch.object(DistillationReportCallback, "_write", side_effect=full)
        try:
            with report:
                found = train(models, folder, callbacks=callbacks)
        except Exception as error:
            return f"wrong: {type(error).__name__}: {error}"
        return "as in a clean folder" if torch.equal(found, clean) else "wrong: other weights"


def with_hostile_text(models: Path, text: object) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            found = train(models, Path(temporary), text)
        except ValueError as error:
            return f"an error: {error}" if "Row 7 of the train dataset" in str(error) else f"wrong: {error}"
        except Exception as error:
            return f"wrong: {type(error).__name__}: {error}"
        return "trained on" if found.isfinite().all() else "wrong: weights that are not finite"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="what examples/small_models.py made")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = header()
    with tempfile.TemporaryDirectory() as temporary:
        clean = train(args.models, Path(temporary))
    found = {name: in_hostile_folder(args.models, name, card, clean) for name, card in FOLDERS.items()}
    found |= {f"text: {name}": with_hostile_text(args.models, text) for name, text in TEXTS.items()}
    print("| what is hostile | what became of the training |\n|---|---|")
    for name, outcome in found.items():
        print(f"| {name} | {ascii(outcome)[1:-1]} |", flush=True)
    wrong = sum(outcome.startswith("wrong") for outcome in found.values())
    save(args.output, report | {"wrong": wrong, "cases": {name: ascii(own)[1:-1] for name, own in found.items()}})
    print({"wrong": wrong})


if __name__ == "__main__":
    main()
