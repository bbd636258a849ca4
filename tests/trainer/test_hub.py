"""Pushing and loading back, against a hub on the loopback.

huggingface_hub reads its environment when it is imported, so the work is done by this file run as a script in two
processes: `push` trains and pushes; `visit`, with a cache of its own and without the trainer, loads and runs what is
on the hub. The tests look at the hub's folder and at what the two wrote down.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from local_hub import LocalHub


BASE, FULL, LORA, CHECKPOINTS, LOCAL_LORA = (
    f"user/{name}" for name in ("base", "full", "lora", "checkpoints", "lora-on-a-folder")
)
RUNS = (FULL, LORA, CHECKPOINTS, LOCAL_LORA)
OTHER_EOS = 9  # in the base's configs: not the token that ends its tokenizer's turns
TEXT = "What is 12 plus 30? Ça fait 42 🙂"
PROBE = [[5, 9, 12, 40, 41, 7]]  # the ids on which logits are compared


def push(folder: Path):
    """Four runs of two steps: the whole student, an adapter, checkpoints pushed on the way, an adapter on a folder."""
    import torch
    import toys
    from huggingface_hub import ModelCard
    from peft import LoraConfig

    from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

    student = toys.student_model(eos_token_id=OTHER_EOS)
    student.push_to_hub(BASE)
    ModelCard("---\nlicense: apache-2.0\n---\n# The base\n").push_to_hub(BASE)
    student.save_pretrained(folder / "a-student")
    toys.teacher_model().save_pretrained(folder / "a-teacher")
    template_less = toys.student_tokenizer()
    template_less.chat_template = None
    runs = {
        FULL: {},
        LORA: {"model": BASE, "adapter": True},
        CHECKPOINTS: {
            "tokenizer": template_less,
            "push_to_hub": True,
            "hub_model_id": CHECKPOINTS,
            "hub_always_push": True,  # the second push waits for the first instead of being left out
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
        LOCAL_LORA: {"adapter": True},
    }
    notes = {}
    for repository, options in runs.items():
        name = repository.split("/")[1]
        model = options.pop("model", str(folder / "a-student"))
        tokenizer = options.pop("tokenizer", toys.student_tokenizer())
        adapter = options.pop("adapter", False)
        args = CrossTokenizerGKDConfig(
            output_dir=str(folder / name),
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            max_new_tokens=16,
            per_device_train_batch_size=2,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **{"save_strategy": "no", **options},
        )
        trainer = CrossTokenizerGKDTrainer(
            model=model,
            teacher_model=str(folder / "a-teacher"),
            args=args,
            train_dataset=toys.prompts(4),
            eval_dataset=toys.prompts(2),
            processing_class=tokenizer,
            teacher_processing_class=toys.teacher_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
        )
        trainer.train()
        if not args.push_to_hub:
            trainer.push_to_hub(dataset_name="someone/questions")
        with torch.no_grad():
            torch.save(trainer.model.eval()(torch.tensor(PROBE)).logits, folder / f"{name}.pushed.pt")
        notes[repository] = {"log": trainer.state.log_history, "ids": tokenizer.encode(TEXT)}
    (folder / "pushed.json").write_text(json.dumps(notes))


def visit(folder: Path):
    """Loads every repository as the hub's visitor does, notes its logits, and runs the card's quick start."""
    import contextlib
    import io

    import torch
    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(PROBE)).logits

    notes = {}
    for repository in RUNS:
        card = ModelCard.load(repository).content
        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(snippet.replace("path/to/the/base", str(folder / "a-student")), scope := {})  # noqa: S102
        notes[repository] = {
            "printed": printed.getvalue(),
            "prompt": scope["tokenizer"].decode(scope["inputs"]["input_ids"][0]),
            "ids": scope["tokenizer"].encode(TEXT),
            "stop": scope["model"].generation_config.eos_token_id,
            "end_of_turn": scope["tokenizer"].eos_token_id,
        }
        torch.save(logits(scope["model"]), folder / f"{repository.split('/')[1]}.loaded.pt")
    torch.save(logits(AutoModelForCausalLM.from_pretrained(BASE)), folder / "base.loaded.pt")
    merged = {
        "auto": AutoPeftModelForCausalLM.from_pretrained(LORA),
        "by_hand": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), LORA),
    }
    torch.save({name: logits(model.merge_and_unload()) for name, model in merged.items()}, folder / "lora.merged.pt")
    (folder / "visited.json").write_text(json.dumps(notes))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The hub after the four runs, with what `push` and `visit` wrote down."""
    import torch

    folder = tmp_path_factory.mktemp("hub")
    with LocalHub(folder / "hub") as hub:
        for part in ("push", "visit"):
            done = subprocess.run(
                [sys.executable, __file__, part, str(folder)],
                env=hub.environment(folder / f"home-of-{part}"),
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            assert done.returncode == 0, f"{part} failed:\n{done.stderr[-6000:]}"
        hub.pushed = json.loads((folder / "pushed.json").read_text())
        hub.visited = json.loads((folder / "visited.json").read_text())
        hub.logits = lambda name: torch.load(folder / f"{name}.pt")
        hub.card = lambda repository: hub.path(repository, "README.md").read_text()
        hub.local = str(folder)
        yield hub


def equal(one, other) -> bool:
    return bool(((one - other).abs() < 1e-5).all())


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_pushed_student_arrives_with_weights_configs_tokenizer_and_card(hub):
    assert hub.files(FULL) >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert hub.commits[FULL] == ["End of training"]


def test_a_student_loaded_from_the_hub_has_the_trainers_weights(hub):
    assert equal(hub.logits("full.loaded"), hub.logits("full.pushed"))
    assert not equal(hub.logits("full.loaded"), hub.logits("base.loaded"))


def test_a_student_loaded_from_the_hub_stops_where_its_turn_ends(hub):
    assert hub.visited[FULL]["end_of_turn"] != OTHER_EOS
    assert hub.visited[FULL]["end_of_turn"] in hub.visited[FULL]["stop"]


def test_a_pushed_adapter_arrives_without_the_base(hub):
    assert hub.files(LORA) >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"}
    assert "model.safetensors" not in hub.files(LORA)


def test_an_adapter_trained_on_a_hub_model_names_it_as_its_base(hub):
    assert json.loads(hub.path(LORA, "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert metadata(hub.card(LORA))["base_model"] == BASE


def test_an_adapter_loaded_from_the_hub_has_the_trainers_weights_before_and_after_merging(hub):
    trained, merged = hub.logits("lora.pushed"), hub.logits("lora.merged")
    assert not equal(trained, hub.logits("base.loaded"))
    assert equal(hub.logits("lora.loaded"), trained)
    assert equal(merged["auto"], trained)
    assert equal(merged["by_hand"], trained)


def test_an_adapter_on_a_folder_loads_as_its_card_says(hub):
    assert equal(hub.logits("lora-on-a-folder.loaded"), hub.logits("lora-on-a-folder.pushed"))
    assert not equal(hub.logits("lora-on-a-folder.loaded"), hub.logits("base.loaded"))


def test_with_push_to_hub_checkpoints_are_pushed_as_they_are_saved(hub):
    # Trainer uploads the first while it goes on; whether that is done before the second overwrites it is a race
    assert hub.commits[CHECKPOINTS][-1] == "Training in progress, step 2"
    assert hub.files(CHECKPOINTS) >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert not [name for name in hub.files(CHECKPOINTS) if "checkpoint-" in name]
    assert equal(hub.logits("checkpoints.loaded"), hub.logits("checkpoints.pushed"))


@pytest.mark.parametrize("repository", RUNS)
def test_a_tokenizer_loaded_from_the_hub_reads_as_the_trainers_did(hub, repository):
    assert hub.visited[repository]["ids"] == hub.pushed[repository]["ids"]


@pytest.mark.parametrize("repository", RUNS)
def test_the_cards_quick_start_runs_as_it_stands_and_prints_an_answer(hub, repository):
    visited = hub.visited[repository]
    opening = "<|start|>user\nWhy" if repository != CHECKPOINTS else "User:\nWhy"
    assert visited["prompt"].removeprefix("<|bos|>").startswith(opening)
    assert visited["printed"].strip()
    assert visited["prompt"] not in visited["printed"]


@pytest.mark.parametrize("repository", RUNS)
def test_the_card_shows_the_last_figures_that_the_trainer_logged(hub, repository):
    last = {name: value for entry in hub.pushed[repository]["log"] for name, value in entry.items()}
    rows = re.findall(r"^\| `(.+?)` \| (\S+) \| (\S+)", hub.card(repository).split("## Final metrics")[1], re.MULTILINE)
    assert {"loss", "gap/nats_per_byte", "alignment/masked_fraction"} <= {name for name, _, _ in rows}
    for name, training, evaluation in rows:
        assert float(training) == pytest.approx(last[name], rel=1e-3)
        if repository == CHECKPOINTS:
            assert float(evaluation) == pytest.approx(last[f"eval_{name}"], rel=1e-3)


@pytest.mark.parametrize("repository", RUNS)
def test_the_card_on_the_hub_is_this_librarys_and_not_pefts(hub, repository):
    card = hub.card(repository)
    outside_code = re.sub(r"^```.*?^```", "", card, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^# .*", outside_code, re.MULTILINE) == [f"# {repository.split('/')[1]}"]
    assert metadata(card)["library_name"] == ("peft" if "lora" in repository else "transformers")
    assert "Framework versions" not in card


@pytest.mark.parametrize("repository", RUNS)
def test_no_card_gives_away_a_path_or_says_none(hub, repository):
    card = hub.card(repository)
    assert hub.local not in card
    assert not re.search(r"(?<![\w/:.])/\w", card)
    assert "None" not in card and "null" not in card


@pytest.mark.parametrize("repository", [FULL, CHECKPOINTS, LOCAL_LORA])
def test_a_student_from_a_folder_is_named_by_its_last_part_and_is_no_base_model_of_the_hub(hub, repository):
    assert "base_model" not in metadata(hub.card(repository))
    assert "| student | `a-student` |" in hub.card(repository)


def test_an_adapter_takes_its_licence_from_the_card_of_its_base_on_the_hub(hub):
    assert metadata(hub.card(LORA))["license"] == "apache-2.0"
    assert "| apache-2.0 |" in hub.card(LORA)
    assert "license" not in metadata(hub.card(FULL))


@pytest.mark.parametrize("repository", RUNS)
def test_the_learning_curve_is_pushed_with_the_card_that_shows_it(hub, repository):
    assert "](learning_curve.png)" in hub.card(repository)
    assert hub.path(repository, "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("repository", RUNS)
def test_the_card_has_the_command_that_trained(hub, repository):
    assert re.search(r"```bash\npython\S* \S*test_hub.py push \S+\n```", hub.card(repository))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_of_two_processes_one_pushes(tmp_path):
    from distill_command import distill  # the scripts above do without the trainer, or set its hub before
    from strategies_run import save_models

    save_models(tmp_path)
    command = distill(tmp_path, "ddp", "--main_process_port", "0")
    command += ["--push_to_hub", "true", "--hub_model_id", "user/together", "--save_strategy", "no"]
    with LocalHub(tmp_path / "hub") as hub:
        env = hub.environment(tmp_path / "home")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-5000:]
        assert hub.commits["user/together"] == ["Model save", "End of training"], "each of them once"
        assert hub.files("user/together") >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
        assert (
            hub.path("user/together", "model.safetensors").read_bytes()
            == (tmp_path / "output" / "model.safetensors").read_bytes()
        )


if __name__ == "__main__":
    {"push": push, "visit": visit}[sys.argv[1]](Path(sys.argv[2]))
