"""
A run whose completions a real vLLM writes beside it, in vLLM's own environment; started by test_vllm_colocate.py. What this
environment lacks (TRL, PEFT, datasets) comes from the site-packages of the tests' own, and is looked for there last.

Writes to a JSON file the steps' log, and how far the log-probs that the engine draws with are from those of the student as it
is after the last step, and as it was before the first.
"""

import json
import os
import sys
from pathlib import Path


def main(site_packages: str, folder: Path, kind: str):
    sys.path.append(site_packages)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over inside the process
    import torch
    from peft import LoraConfig
    from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer
    from transformers import AutoModelForCausalLM

    from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
    from trl_ctopd.rollouts.pairing import Prompt

    start = str(folder / "student")
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 64
    student_model(**shape, initializer_range=0.1).save_pretrained(start)
    student_tokenizer().save_pretrained(start)
    adapter = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear") if kind == "lora" else None
    trainer = CrossTokenizerGKDTrainer(
        start,
        teacher_model(),
        CrossTokenizerGKDConfig(
            str(folder / "out"),
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_new_tokens=16,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=4,
            optim="sgd",
            learning_rate=0.5,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=256,
            vllm_gpu_memory_utilization=0.2,
        ),
        prompts(),
        processing_class=student_tokenizer(),
        teacher_processing_class=teacher_tokenizer(),
        peft_config=adapter,
    )
    trainer.train()

    given = [row["prompt_ids"] for row in trainer.train_dataset]
    asked = [Prompt(ids, []) for ids in given]
    written = trainer.rollouts.write(trainer.model, asked, trainer.state.global_step)

    @torch.no_grad()
    def distance(model) -> float:
        apart = []
        for prompt, (ids, drawn) in zip(given, written, strict=True):
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            apart.append(logits.log_softmax(-1)[range(len(ids)), ids] - torch.tensor(drawn))
        return torch.cat(apart).abs().mean().item()

    found = {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "lengths": [len(ids) for ids, _ in written],
        "from_the_student_now": distance(trainer.model.eval()),
        "from_the_student_at_the_start": distance(AutoModelForCausalLM.from_pretrained(start).eval()),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
