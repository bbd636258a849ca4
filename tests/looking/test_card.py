"""The card's text and metadata, variant by variant, as a visitor of the hub reads them. No network."""

import ast
import re
from dataclasses import fields

import pytest
import torch
import toys
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

from trl_ctopd import CrossTokenizerGKDConfig, __version__
from trl_ctopd.looking import card
from trl_ctopd.looking.provenance import PACKAGES
from trl_ctopd.losses import ALM, LOSSES


STUDENT, TEACHER = toys.student_tokenizer(), toys.teacher_tokenizer()
TWO = {"maths": ("lab/Maths-7B", TEACHER), "code": ("lab/Code-7B", STUDENT)}
LOG = [
    {"loss": 0.5, "gap/nats_per_byte": 0.4, "step": 10},
    {"eval_loss": 0.3, "eval_gap/nats_per_byte": 0.21, "eval_runtime": 1.0, "step": 20},
    {"loss": 0.123456, "gap/nats_per_byte": -0.00001234, "alignment/masked_fraction": 0.0, "step": 20},
    {"train_runtime": 3.0, "train_loss": 0.3, "step": 25},
]


def my_loss(batch, num_items):
    return batch.student_log_probs.sum() / num_items, {}


@pytest.fixture
def make(tmp_path):
    """`make(**changes)`: a card; `config` holds changed settings."""

    def build(config=None, **changes) -> ModelCard:
        config = {"distillation_loss": "dpca", **(config or {})}  # the trainer has chosen one by now
        args = CrossTokenizerGKDConfig(output_dir=str(tmp_path / "out"), report_to="none", bf16=False, **config)
        options = {
            "model_name": "my-run",
            "hub_model_id": "me/my-run",
            "student": "org/student-1B",
            "teacher": "lab/Teacher-7B",
            "student_tokenizer": STUDENT,
            "teacher_tokenizer": TEACHER,
            "args": args,
            "adapters": [],
            "datasets": [],
            "tags": ["trl", "ctopd"],
            "log_history": LOG,
        }
        options |= changes
        teacher = options.pop("teacher"), options.pop("teacher_tokenizer")
        return card.model_card(**{"teachers": {"": teacher}, **options})

    return build


VARIANTS = {
    "full": {},
    "adapter": {"adapters": ["default"]},
    "adapter of another name": {"adapters": ["second"]},
    "several adapters": {"adapters": ["default", "second"], "student": ""},
    "made in place": {"student": "", "teacher": ""},
    "adapter on a model made in place": {"student": "", "adapters": ["default"]},
    "folders": {
        "student": "/data/runs/student",
        "teacher": "/data/models/teacher/",
        "datasets": ["/data/prompts.jsonl"],
    },
    "alm": {"config": {"distillation_loss": "alm"}},
    "sft": {"config": {"distillation_loss": "sft", "lmbda": 0.0, "seq_kd": True}},
    "own loss": {"config": {"distillation_loss": my_loss}},
    "a loss object": {"config": {"distillation_loss": ALM(temperature=10.0), "lmbda": 0.5}},
    "mixed": {"config": {"lmbda": 0.5, "advantage_clip": None}},
    "one tokenizer": {"teacher_tokenizer": STUDENT},
    "no template": {"student_tokenizer": TEACHER, "teacher_tokenizer": STUDENT},
    "before the first log": {"log_history": [], "hub_model_id": None},
    "several teachers made in place": {"teachers": {"a|b": ("", TEACHER), "code": ("", TEACHER)}},
    "a blend": {"teachers": TWO, "blended": True, "config": {"teacher_weights": {"maths": 0.9, "code": 0.1}}},
    "rewards, a gate and tools": {"reward_funcs": ["<lambda>", "a|b"], "teacher_gate": "right", "tools": ["add"]},
}


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {first.strip().strip("`"): [cell.strip() for cell in rest] for first, *rest in cells}


def quick_start(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_card_is_valid_and_says_nothing_it_does_not_know(make, variant):
    written = make(**VARIANTS[variant])
    metadata = ModelCardData(**ModelCard(written.content).data.to_dict())
    assert metadata.license is None and metadata.language is None
    assert metadata.pipeline_tag == "text-generation"
    assert metadata.tags == ["generated_from_trainer", "trl", "ctopd"]
    assert "None" not in written.content and "null" not in written.content
    assert "/data/" not in written.content
    assert "{%" not in written.content and "{{ " not in written.content
    assert "\n\n\n" not in written.content


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_table_has_as_many_cells_in_each_row_as_in_its_head(make, variant):
    tables = re.findall(r"(?:^\|.*\n)+", make(**VARIANTS[variant]).content, re.MULTILINE)
    assert len(tables) >= 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_quick_start_is_python_that_loads_the_pushed_repository(make, variant):
    snippet = quick_start(make(**VARIANTS[variant]).content)
    ast.parse(snippet)
    name = "my-run" if variant == "before the first log" else "me/my-run"
    assert snippet.count(f'from_pretrained("{name}"') + snippet.count(f'from_pretrained(base, "{name}"') == 2


def test_the_card_names_both_models_both_tokenizers_the_method_its_paper_and_the_versions(make):
    text = make().content
    assert rows(text)["student"] == [
        "[org/student-1B](https://huggingface.co/org/student-1B)",
        f"BPE, {len(STUDENT)} tokens",
    ]
    assert rows(text)["teacher"] == [
        "[lab/Teacher-7B](https://huggingface.co/lab/Teacher-7B)",
        f"Unigram, {len(TEACHER)} tokens",
    ]
    paper = card.PAPERS["dpca"]
    assert f"- Method: `dpca`, [{paper.title}](https://huggingface.co/papers/{paper.arxiv})" in text
    assert f"- trl_ctopd {__version__}\n- trl 1." in text
    for package in PACKAGES:
        assert re.search(rf"^- {package} \d+\.\d+", text, re.MULTILINE)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_citation_is_balanced_bibtex_of_the_method_used(make, loss):
    text = make(config={"distillation_loss": loss, "lmbda": 0.0 if loss == "sft" else 1.0}).content
    [entry] = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    paper = card.PAPERS[loss]
    assert f"title   = {{{{{paper.title}}}}}," in entry
    assert (f"author  = {{{paper.authors}}}," in entry) == bool(paper.authors)
    assert "author  = {}" not in entry
    if paper.arxiv:
        assert entry.startswith(f"@article{{arxiv{paper.arxiv.replace('.', '')},\n")
        assert f"arXiv:{paper.arxiv}" in entry and f"year    = {{20{paper.arxiv[:2]}}}" in entry
    else:
        assert entry.startswith("@misc{") and f"url     = {{{paper.url}}}" in entry
    assert entry.count("{") == entry.count("}")


def test_a_loss_without_a_paper_cites_that_of_the_alignment(make, monkeypatch):
    monkeypatch.delitem(card.PAPERS, "escd")
    text, paper = make(config={"distillation_loss": "escd"}).content, card.PAPERS["dpca"]
    assert (
        f"- Method: `escd`, on text aligned as in [{paper.title}](" in text
        and f"@article{{arxiv{paper.arxiv.replace('.', '')}" in text
    )


def test_a_run_on_the_datasets_text_alone_names_the_loss_that_it_learned_by(make):
    text = make(
        config={"distillation_loss": "dpca", "lmbda": 0.0, "off_policy_loss_kwargs": {"temperature": 10.0}}
    ).content
    assert "- Method: `alm`" in text and card.PAPERS["alm"].title in text and card.PAPERS["dpca"].title not in text
    assert "advantage_clip" not in text and "`off_policy_loss_kwargs`" in text


def test_the_figures_are_the_last_ones_logged_for_training_and_evaluation(make):
    table = rows(make().content)
    assert table["loss"][:2] == ["0.1235", "0.3"]
    assert table["gap/nats_per_byte"][:2] == ["-1.234e-05", "0.21"]
    assert table["alignment/masked_fraction"][:2] == ["0", ""]
    assert "- Optimizer steps: 25, each of 8 prompts, one completion of each\n" in make().content


def test_without_evaluation_the_figures_have_no_evaluation_column(make):
    text = make(log_history=[entry for entry in LOG if "eval_loss" not in entry]).content
    assert "| metric | training | meaning |" in text
    assert "| evaluation |" in make().content


def test_before_the_first_log_there_are_no_figures_and_no_steps(make):
    text = make(log_history=[]).content
    assert "Final metrics" not in text and "Optimizer steps" not in text


@pytest.mark.parametrize("name", ["org/student-1B", "/caches/hub/models--org--student-1B/snapshots/0123abcd"])
def test_a_student_of_the_hub_is_its_cards_base_model_read_from_the_cache_or_not(make, name):
    written = make(student=name)
    assert written.data.base_model == "org/student-1B"
    assert rows(written.content)["student"][0] == "[org/student-1B](https://huggingface.co/org/student-1B)"
    assert "snapshots" not in written.content


@pytest.mark.parametrize("name", ["/data/runs/student", "./student", "../runs/student", "student", ""])
def test_a_student_that_is_not_on_the_hub_is_no_base_model(make, name):
    written = make(student=name)
    assert written.data.base_model is None
    assert rows(written.content)["student"][0] == ("`student`" if name else "an unnamed model")


def test_a_relative_folder_that_looks_like_a_hub_name_is_a_folder(make, tmp_path, monkeypatch):
    (tmp_path / "runs" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert make(student="runs/student").data.base_model is None


def test_a_dataset_of_the_hub_is_linked_and_a_local_one_named_only(make):
    ours, local = make(datasets=["lab/questions"]), make(datasets=["/data/questions.jsonl"])
    both = make(datasets=["lab/questions", "/data/questions.jsonl", "lab/tasks"])
    assert ours.data.datasets == ["lab/questions"] and both.data.datasets == ["lab/questions", "lab/tasks"]
    assert (
        "[lab/questions](https://huggingface.co/datasets/lab/questions), `questions.jsonl`, [lab/tasks]("
        in both.content
    )
    assert "- Prompts: [lab/questions](https://huggingface.co/datasets/lab/questions)\n" in ours.content
    assert local.data.datasets is None
    assert "- Prompts: `questions.jsonl`\n" in local.content


def test_an_adapter_is_a_peft_model_of_its_base_and_the_quick_start_loads_both(make):
    written = make(adapters=["default"])
    assert written.data.library_name == "peft"
    assert written.data.base_model == "org/student-1B"
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/my-run")' in quick_start(written.content)
    assert make().data.library_name == "transformers"


def test_an_adapter_whose_base_is_not_on_the_hub_asks_for_the_base_in_the_quick_start(make):
    snippet = quick_start(make(adapters=["default"], student="/data/student").content)
    assert 'base = AutoModelForCausalLM.from_pretrained("path/to/the/base")  # `student`' in snippet
    assert 'PeftModel.from_pretrained(base, "me/my-run")' in snippet


@pytest.mark.parametrize("active", [("second",), ("default", "second"), ("second", "first")], ids="+".join)
def test_the_quick_start_loads_the_adapters_that_are_on_from_where_they_are_saved(build, tmp_path, monkeypatch, active):
    """PEFT saves those that are not called "default" in folders of their own. Beside them "default" would be read without a word."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(toys.student_model(), adapter)
    for name in ("first", "second"):
        model.add_adapter(name, adapter)
    model.base_model.set_adapter(list(active))
    monkeypatch.chdir(tmp_path)
    toys.student_model().save_pretrained("base")
    trainer = build(model=model)
    trainer.save_model()
    trainer.create_model_card()
    code = quick_start((tmp_path / "run" / "README.md").read_text()).replace("path/to/the/base", "base")
    loaded: dict = {}
    exec(code.partition("messages =")[0], loaded)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        own, found = (each.eval()(input_ids=ids).logits for each in (trainer.model, loaded["model"]))
    torch.testing.assert_close(found, own)
    with torch.no_grad(), loaded["model"].disable_adapter():
        assert (loaded["model"](input_ids=ids).logits - own).abs().max() > 1e-3


def test_the_quick_start_reads_the_base_of_an_adapter_in_a_folder_from_where_it_is(make):
    """`AutoPeftModelForCausalLM` would look for the base in a folder of that name too."""
    snippet = quick_start(make(adapters=["second"]).content)
    assert 'base = AutoModelForCausalLM.from_pretrained("org/student-1B")\n' in snippet
    assert 'PeftModel.from_pretrained(base, "me/my-run", subfolder="second")' in snippet
    assert "path/to/the/base" not in snippet and "only the adapter" not in snippet


@pytest.mark.parametrize("student", ["org/student-1B", "/data/runs/student"])
@pytest.mark.parametrize(
    ("quantization", "kind", "given"),
    [
        ({"quant_method": "fp8", "dequantize": True}, FineGrainedFP8Config, {"dequantize": True}),
        ({"load_in_8bit": True}, BitsAndBytesConfig, {"load_in_8bit": True}),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0),
            BitsAndBytesConfig,
            {"load_in_8bit": True, "llm_int8_threshold": 5.0},
        ),
    ],
)
def test_the_quick_start_loads_the_base_of_an_adapter_with_the_quantization_of_the_run(
    make, student, quantization, kind, given
):
    config = {"model_init_kwargs": {"quantization_config": quantization}}
    [code] = re.findall(r"```python\n(.*?)```", make(config, student=student, adapters=["default"]).text, re.DOTALL)
    imported = [
        name.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    assert kind.__name__ in imported
    [call] = [node.value for node in ast.walk(ast.parse(code)) if getattr(node, "arg", None) == "quantization_config"]
    found = eval(ast.unparse(call), {kind.__name__: kind})
    assert {name: getattr(found, name) for name in given} == given
    assert "quantization" not in make(config, student=student).text.partition("```python")[2].partition("```")[0]


@pytest.mark.parametrize("on_text", [False, True])
def test_the_quick_start_asks_as_the_training_did(make, on_text):
    without = toys.student_tokenizer()
    without.chat_template = None
    chat, base = (quick_start(make(on_text=on_text, **own).content) for own in ({}, {"student_tokenizer": without}))
    assert ("apply_chat_template(messages" in chat) == (not on_text)
    assert "apply_chat_template" not in base
    turns = 'tokenizer("User:\\nWhy is the sky blue?\\n\\nAssistant:\\n", return_tensors="pt")'
    assert (turns in base) == ("# the tokenizer has no chat template" in base) == (not on_text)
    assert ('tokenizer("The sky is blue because", return_tensors="pt")' in base) == on_text


def test_the_quick_start_renders_prompts_with_the_template_kwargs_of_the_run(make):
    kwargs = {"enable_thinking": False, "effort": "low"}
    written = make(config={"chat_template_kwargs": kwargs, "max_new_tokens": 77})
    snippet = quick_start(written.content)
    assert "return_tensors=\"pt\", enable_thinking=False, effort='low')" in snippet
    assert "max_new_tokens=77" in snippet
    assert rows(written.content)["chat_template_kwargs"] == ["enable_thinking=False, effort='low'"]


def test_the_settings_are_those_of_the_run_and_of_its_method_only(make):
    table = rows(make(config={"learning_rate": 3e-5, "num_generations": 4, "top_p": 0.9, "credit": "macro"}).content)
    assert table["learning_rate"] == ["3e-05"] and table["num_generations"] == ["4"] and table["top_p"] == ["0.9"]
    assert table["credit"] == ["macro"] and table["advantage_clip"] == ["10.0"]
    assert not {"top_k", "min_p", "off_policy_loss", "generation_kwargs"} & set(table)

    table = rows(make(config={"distillation_loss": "alm", "distillation_loss_kwargs": {"temperature": 50.0}}).content)
    assert not {"credit", "advantage_clip"} & set(table)


def test_a_setting_of_the_loss_is_not_taken_for_one_of_sampling_by_the_same_name(make):
    config = {"distillation_loss": "alm", "distillation_loss_kwargs": {"temperature": 50.0}, "temperature": 0.7}
    table = rows(make(config=config).content)
    assert table["temperature"] == ["0.7"]
    assert table["distillation_loss_kwargs"] == ["temperature=50.0"]


def test_a_setting_with_a_bar_or_a_gap_in_it_stays_one_row_of_the_table(make):
    text = make(
        config={"generation_kwargs": {"cache_implementation": "a|b", "min_length": None, "watermarking_config": "x  y"}}
    ).content
    assert "| `generation_kwargs` | cache_implementation='a\\|b', watermarking_config='x y' |\n" in text


def test_no_clip_is_said_to_be_no_bound(make):
    assert rows(make(config={"advantage_clip": None}).content)["advantage_clip"] == ["no bound"]


def test_a_loss_of_ones_own_is_named_and_takes_no_papers_name(make):
    text = make(config={"distillation_loss": my_loss}).content
    assert "- Method: `my_loss`, a loss of the author's own, on text aligned as in [Breaking the Tokenizer" in text
    assert "`dpca`" not in text and "credit" not in rows(text)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "The student wrote completions itself; the teacher, which has another tokenizer, scored"),
        ({"lmbda": 0.25}, "The student wrote about 25% of the completions itself, and the others were the dataset's;"),
        (
            {"lmbda": 0.0, "distillation_loss": "alm"},
            "The completions were the dataset's; the teacher, which has another",
        ),
        (
            {"lmbda": 0.0, "seq_kd": True, "distillation_loss": "sft"},
            "The completions were the teacher's; the student learned",
        ),
    ],
)
def test_the_card_tells_who_wrote_and_who_scored(make, config, told):
    assert told in make(config=config).content


def test_two_models_of_one_tokenizer_are_not_said_to_have_two(make):
    text = make(teacher_tokenizer=toys.student_tokenizer()).content
    assert "the teacher, which has the same tokenizer, scored them token by token." in text
    assert "another tokenizer" not in text


def test_several_teachers_have_a_row_each(make):
    text = make(teachers=TWO).content
    assert "distilled from [lab/Maths-7B](https://huggingface.co/lab/Maths-7B), [lab/Code-7B](" in text
    assert [rows(text)[f"teacher {name}"][1] for name in TWO] == [
        f"Unigram, {len(TEACHER)} tokens",
        f"BPE, {len(STUDENT)} tokens",
    ]
    assert "each one's teacher scored the same text in its own tokens" in text


def test_teachers_that_have_no_name_on_the_hub_go_by_those_they_have_in_the_run(make):
    text = make(teachers={"maths": ("", TEACHER), "code": ("", TEACHER)}).content
    assert "distilled from maths, code with" in text
    assert rows(text)["teacher maths"][0] == rows(text)["teacher code"][0] == "an unnamed model"


@pytest.mark.parametrize("one_tokenizer", [False, True])
def test_teachers_that_read_a_row_together_are_not_said_to_have_read_a_row_each(make, one_tokenizer):
    names = {name: (model, STUDENT if one_tokenizer else tokenizer) for name, (model, tokenizer) in TWO.items()}
    config = {"teacher_weights": {"maths": 0.9, "code": 0.1}}
    each, every, some = (make(config, teachers=names, blended=blended).content for blended in (False, True, None))
    assert "itself; each one's teacher" in each and "weighted mean" not in each
    assert "itself; all of a row's teachers" in every and "and the weighted mean of their scores" in every
    assert "itself; a row's teacher, or all of its teachers, scored" in some and "of several the weighted mean" in some
    assert rows(every)["teacher_weights"] == ["maths=0.9, code=0.1"]
    assert "weighted mean" not in make(blended=None).content, "an only teacher reads all rows of a stream"


def test_rewards_a_gate_and_tools_are_told_and_named(make):
    config = {
        "reward_weight": 5.0,
        "reward_weights": [1.0, 2.0],
        "scale_rewards": "none",
        "max_tool_calling_iterations": 3,
    }
    text = make(config, reward_funcs=["right", "<lambda>"], teacher_gate="checked", tools=["add", "look_up"]).content
    table = rows(text)
    assert table["reward_funcs"] == ["right, &lt;lambda>"] and table["teacher_gate"] == ["checked"]
    assert table["tools"] == ["add, look_up"] and table["max_tool_calling_iterations"] == ["3"]
    assert table["reward_weight"] == ["5.0"] and table["reward_weights"] == ["[1.0, 2.0]"]
    assert table["scale_rewards"] == ["none"]
    assert "Rewards by `right`, `<lambda>` counted beside the teacher's scores." in text
    assert "What the gate `checked` called wrong was not learned from." in text
    assert "its calls of `add`, `look_up` were executed." in text
    without = make(config).content
    assert not rows(without).keys() & {*config, "reward_funcs", "teacher_gate", "tools"}, "no such thing ran"
    assert "Rewards by" not in without and "the gate" not in without and "its calls" not in without


def test_a_tag_in_a_setting_stays_text(make):
    assert rows(make({"mask_strings": ["</think>"]}).content)["mask_strings"] == ["['&lt;/think>']"]


ON_EVERY_CARD_OF_THEIR_METHOD = {  # tests below and above look for these
    "distillation_loss", "event", "credit", "baseline", "baseline_top_k", "advantage_clip", "distillation_loss_kwargs",
    "off_policy_loss", "off_policy_loss_kwargs",
}  # fmt: skip
TOLD_OTHERWISE = {"seq_kd", "teacher_model_name_or_path", "teacher_models"}  # in the story, and as teachers
SHAPES_NO_WEIGHT = {
    "beta", "loss_type",  # no effect
    "greater_is_better",  # follows from metric_for_best_model
    "logit_tile_tokens", "length_grouped", "generation_batch_size", "teacher_batch_size", "teacher_overlap",
    "generation_backend", "gather_for_generation", "merge_adapter_for_generation", "transformers_continuous_batching_config",
    "generation_device",
    "use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_enable_sleep_mode",
    "teacher_server_url", "teacher_server_model", "teacher_server_api_key_env", "teacher_server_concurrency",
    "teacher_server_timeout", "teacher_server_retries", "teacher_server_patience",
    "tools_in_evaluation", "rewards_in_evaluation", "log_completions", "num_completions_to_print", "report",
}  # fmt: skip


def test_every_setting_of_the_trainer_is_on_the_card_unless_it_shapes_nothing():
    shown = {*card.SETTINGS, *card.SETTINGS_IF_CHANGED, *card.OF_REWARDS, *card.OF_TOOLS}
    own = {name for name in CrossTokenizerGKDConfig.__annotations__ if not name.startswith("_")}
    assert own - shown - ON_EVERY_CARD_OF_THEIR_METHOD - TOLD_OTHERWISE - SHAPES_NO_WEIGHT == set()
    assert not shown & SHAPES_NO_WEIGHT
    assert shown <= {field.name for field in fields(CrossTokenizerGKDConfig)}


def test_what_shapes_every_training_is_on_the_card_too_and_as_it_was_written(make, tmp_path):
    config = {
        "lr_scheduler_type": "cosine",
        "optim": "adafactor",
        "warmup_steps": 7,
        "weight_decay": 0.125,
        "markup_policy": "mask",
        "thought_policy": "text",
        "rollout_reuse": 2,
        "reference_teacher": str(tmp_path / "weak"),
        "teacher_model_init_kwargs": {"dtype": "bfloat16", "cache_dir": str(tmp_path / "cache")},
    }
    table = rows(make(config).content)
    assert table["lr_scheduler_type"] == ["cosine"] and table["optim"] == ["adafactor"]
    assert table["warmup_steps"] == ["7"] and table["weight_decay"] == ["0.125"]
    assert (
        table["markup_policy"] == ["mask"] and table["thought_policy"] == ["text"] and table["rollout_reuse"] == ["2"]
    )
    assert table["reference_teacher"] == ["weak"], "no folder is told"
    assert table["teacher_model_init_kwargs"] == ["dtype='bfloat16', cache_dir='cache'"]
    assert not rows(make().content).keys() & {*config}


def test_the_card_of_a_run_tells_its_blend_its_rewards_and_its_gate(build, tmp_path):
    def rewarded(completions, **_):
        return [float(place) for place, _ in enumerate(completions)]

    names, gate = ("maths", "code"), lambda completions, **_: [True] * len(completions)
    shares = [{"maths": 0.9, "code": 0.1}, {"maths": 1.0}]
    for some in (False, True):
        trainer = build(
            teacher={name: toys.teacher_model() for name in names},
            teacher_processing_class={name: toys.teacher_tokenizer() for name in names},
            dataset=toys.prompts(4).add_column("teacher_weights", [shares[some and row % 2] for row in range(4)]),
            num_generations=2,
            reward_funcs=rewarded,
            teacher_gate=gate,
            output_dir=str(tmp_path / str(some)),
        )
        trainer.create_model_card()
        text = ModelCard.load(tmp_path / str(some) / "README.md").content
        assert ("a row's teacher, or all of its teachers," if some else "all of a row's teachers") in text
        assert rows(text)["reward_funcs"] == ["rewarded"] and rows(text)["teacher_gate"] == ["&lt;lambda>"]
        assert "teacher maths" in rows(text) and "teacher code" in rows(text)


def test_off_policy_rows_bring_their_loss_into_the_settings(make):
    table = rows(make(config={"lmbda": 0.5, "off_policy_loss_kwargs": {"temperature": 10.0}}).content)
    assert table["off_policy_loss"] == ["alm"]
    assert table["off_policy_loss_kwargs"] == ["temperature=10.0"]


def test_every_evaluation_has_its_column_and_a_figure_from_outside_its_row(make):
    log = [
        *LOG,
        {"eval_math_gap/nats_per_byte": 0.5, "eval_math_runtime": 1.0, "step": 20},
        {"eval_accuracy": 0.75, "step": 20},
    ]
    text = make(log_history=log).content
    assert "| metric | training | evaluation | evaluation on math | meaning |" in text
    assert rows(text)["gap/nats_per_byte"][:3] == ["-1.234e-05", "0.21", "0.5"]
    assert rows(text)["accuracy"][:3] == ["", "0.75", ""]


def test_licences_are_those_of_the_models_own_cards_and_the_students_is_the_cards(make):
    llama = {"license": "other", "license_name": "my-licence", "license_link": "https://example.org/licence"}
    written = make(licenses=(llama, {"license": "apache-2.0"}))
    assert {name: written.data.get(name) for name in llama} == llama
    assert rows(written.content)["student"][-1] == "[my-licence](https://example.org/licence)"
    assert rows(written.content)["teacher"][-1] == "apache-2.0"
    assert "licence" not in make().content


def test_several_licences_of_a_model_are_a_list_in_the_metadata_and_one_cell_of_the_table(make):
    written = make(licenses=({"license": ["mit", "apache-2.0"]}, {"license": "other", "license_name": "a|b"}))
    assert ModelCard(written.content).data.license == ["mit", "apache-2.0"]
    assert rows(written.content)["student"][-1] == "mit, apache-2.0"
    assert rows(written.content)["teacher"][-1] == r"a\|b"


def test_the_card_has_the_command_the_prompts_and_the_picture_where_there_are_any(make):
    text = make(command="python run.py --seed 1", prompts=1234, datasets=["lab/questions"], picture="curve.png").content
    assert "```bash\npython run.py --seed 1\n```" in text
    assert "- Prompts: [lab/questions](https://huggingface.co/datasets/lab/questions), 1,234 rows\n" in text
    assert "](curve.png)" in text
    assert "```bash" not in make().content and "![" not in make().content


def test_a_learning_curve_needs_two_points():
    gaps = [{"gap/nats_per_byte": 0.5, "step": 1}, {"gap/nats_per_byte": 0.25, "step": 2}]
    assert card.learning_curve(gaps[:1]) is None
    assert card.learning_curve(gaps).startswith(b"\x89PNG")


def test_a_run_on_given_text_alone_has_the_gap_of_that_text_on_the_card_and_in_the_curve(make):
    given = [{"given/gap/nats_per_byte": -1 / step, "given/entropy": 1.5, "step": step} for step in (1, 2)]
    evaluated = [{"eval_gap/nats_per_byte": 0.5, "eval_runtime": 1.0, "step": 2}]
    table = rows(make(config={"distillation_loss": "alm", "lmbda": 0.0}, log_history=[*given, *evaluated]).content)
    assert table["given/gap/nats_per_byte"] == [
        "-0.5",
        "",
        "as `gap/nats_per_byte`, of text that the student did not write",
    ]
    assert table["gap/nats_per_byte"][:2] == ["", "0.5"] and table["given/entropy"][:2] == ["1.5", ""]
    assert card.gap_curves([*given, *evaluated]) == {
        "training, given text": [(1, -1.0), (2, -0.5)],
        "evaluation": [(2, 0.5)],
    }
    assert card.learning_curve(given).startswith(b"\x89PNG")


def test_where_the_student_wrote_too_its_own_texts_gap_is_the_one_shown(make):
    both = [{"gap/nats_per_byte": 0.25, "given/gap/nats_per_byte": -1.0, "step": step} for step in (1, 2)]
    assert "given/gap" not in make(log_history=both).content
    assert card.gap_curves(both) == {"training": [(1, 0.25), (2, 0.25)]}


def test_a_checkpoint_draws_card_and_picture_once(build, tmp_path, monkeypatch):
    drawn = []
    draw = card.learning_curve
    monkeypatch.setattr(card, "learning_curve", lambda history: drawn.append(len(history)) or draw(history))
    build(save_strategy="steps", save_steps=2, max_steps=4, logging_steps=1).train()
    assert drawn == [2, 4]
    for step in (2, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert (folder / "README.md").exists() and (folder / card.PICTURE).exists()
    root = tmp_path / "run"
    assert (root / "README.md").read_text() == (root / "checkpoint-4" / "README.md").read_text()


@pytest.mark.parametrize(
    ("named", "metadata"),
    [
        (None, None),
        ("lab/questions", ["lab/questions"]),
        (["lab/questions", "lab/tasks"], ["lab/questions", "lab/tasks"]),
    ],
)
def test_a_card_takes_the_name_of_a_dataset_or_several(build, tmp_path, named, metadata):
    build().create_model_card(dataset_name=named)
    assert ModelCard.load(tmp_path / "run" / "README.md").data.datasets == metadata
