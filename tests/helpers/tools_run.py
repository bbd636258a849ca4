"""One of one or two processes of a run in which only one prompt calls a tool; started by test_tools.py."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset


def main(folder: Path, rank: int, world: int, port: int):
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
    import test_tools as t
    from toys import SGD

    from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

    args = CrossTokenizerGKDConfig(
        str(folder / "run"),
        max_steps=1,
        per_device_train_batch_size=2 // world,
        max_new_tokens=600,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        **SGD,
    )
    rows = Dataset.from_list([{"prompt": [t.ASKED]}, {"prompt": [{"role": "user", "content": "Hello"}]}])
    trainer = CrossTokenizerGKDTrainer(
        model=t.model("qwen2_5", t.LlamaConfig, 0),
        teacher_model=t.model("gptoss", t.Qwen2Config, 1),
        args=args,
        train_dataset=rows,
        processing_class=t.side("qwen2_5").tokenizer,
        teacher_processing_class=t.side("gptoss").tokenizer,
        tools=t.TOOLS,
    )
    call, end = t.called("qwen2_5", t.a_call("add", {"a": 2, "b": 3})), t.said("qwen2_5", "Five.")
    asked = []

    def write(model, prompts, step):
        text = [trainer.processing_class.decode(prompt.student_ids) for prompt in prompts]
        asked.append(text)
        return [(call if "2 plus 3" in own and t.SECRET not in own else end, None) for own in text]

    trainer.rollouts.write = write
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    found = {
        "rounds": len(asked),
        "called": any("2 plus 3" in own for texts in asked for own in texts),
        "figures": trainer.state.log_history[0],
    }
    (folder / f"{rank}of{world}.json").write_text(json.dumps(found))
    torch.save(before - after, folder / f"{rank}of{world}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
