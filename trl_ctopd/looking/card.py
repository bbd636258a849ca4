"""The model card: the student, its teachers, how it was trained, and the run's metrics.

- It states only what the run knows. License, language and intended use are never made up.
- Every setting that shapes what is learned is on it, where it differs from its default. Where and how fast a run computes is not.
- Models and datasets on the hub are linked and enter the metadata. A local folder is shown by its name only, and enters neither.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from importlib.resources import files
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from ..config import CrossTokenizerGKDConfig
from ..losses import LOSSES
from ..models.quantized import dequantizes, with_quantization_config
from ..redact import redacted
from ..text.chat import plain_text
from .best_effort import best_effort
from .history import BOOKKEEPING, GAP, GIVEN, figures
from .provenance import describe, hub_name, on_hub, step, versions, without_folder


class Paper(NamedTuple):
    """The source of a method: on arXiv, or at `url` with its `year`. `authors` are in BibTeX's form, "" where they are not
    known."""

    title: str
    authors: str
    arxiv: str = ""
    url: str = ""
    year: str = ""

    @property
    def link(self) -> str:
        return self.url or f"https://huggingface.co/papers/{self.arxiv}"


PAPERS = {
    "dpca": Paper(
        "Breaking the Tokenizer Barrier: On-Policy Distillation across Model Families",
        "Niu, Yifan and Xiao, Han and Liu, Dongyi and Wang, Zelong and Gong, Dihong and Wang, Yasheng and Li, Jia",
        "2606.09456",
    ),
    "reverse_kl": Paper(  # the same reverse KL, here across tokenizers
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and Geist, Matthieu and "
        "Bachem, Olivier",
        "2306.13649",
    ),
    "compass": Paper("CompassOPD", "", "2609.10154"),  # dpca with `reference_teacher`
    "alm": Paper(
        "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
        "Minixhofer, Benjamin and Vuli{\\'c}, Ivan and Ponti, Edoardo Maria",
        "2503.20083",
    ),
    "gvpo": Paper("GVPO for on-policy distillation", "", "2609.21432"),
    "strict_sampled": Paper(
        "SimpleOPD: Simple Tokenizer-Agnostic On-Policy Distillation for Long-Context Reasoning",
        "",
        "2608.14277",
    ),
    "strict_topk": Paper(
        "Rethinking Cross-Tokenizer On-Policy Distillation: From Alignment Coverage to Supervision Reliability",
        "",
        "2610.08448",
    ),
    "simct": Paper(
        "SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy Distillation",
        "Sun, Jie and Zheng, Mao and Song, Mingyang and Zhong, Qiyong and Cheng, Yilin and Feng, Bichuan and Liu, Pengfei "
        "and Fang, Junfeng and Wang, Xiang",
        "2605.07711",
    ),
    "bpm": Paper("Cross-Tokenizer On-Policy Distillation via Byte-Prefix Marginalization", "", "2607.22334"),
    "escd": Paper("ESCD", "", "2609.34738"),
    "uld": Paper(
        "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        "Boizard, Nicolas and El Haddad, Kevin and Hudelot, C{\\'e}line and Colombo, Pierre",
        "2402.12030",
    ),
    "multi_level_ot": Paper(
        "Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation on Language Models",
        "Cui, Xiao and Zhu, Mo and Qin, Yulei and Xie, Liang and Zhou, Wengang and Li, Houqiang",
        "2412.14528",
    ),
    "xtoken": Paper(
        "X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation",
        "Sreenivas, Sharath Turuvekere and Hanasoge, Adithyakrishna Venkatesh and Yang, Mingyu and Taghibakhshi, Ali and "
        "Muralidharan, Saurav and Aithal, Ashwath and Molchanov, Pavlo",
        "2605.21699",
    ),
    "cdm": Paper(
        "Enhancing Cross-Tokenizer Knowledge Distillation with Contextual Dynamical Mapping",
        "Chen, Yijie and Liu, Yijin and Meng, Fandong and Chen, Yufeng and Xu, Jinan and Zhou, Jie",
        "2502.11104",
    ),
    "sft": Paper("Sequence-Level Knowledge Distillation", "Kim, Yoon and Rush, Alexander M.", "1606.07947"),
    "gold": Paper(
        "Unlocking On-Policy Distillation for Any Model Family",
        "Patiño, Carlos Miguel and Rasul, Kashif and Gallouédec, Quentin and Burtenshaw, Ben and Paniego, Sergio and "
        "Srivastav, Vaibhav and Frere, Thibaud and Beeching, Ed and Tunstall, Lewis and von Werra, Leandro and Wolf, Thomas",
        url="https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation",
        year="2025",
    ),
}
SETTINGS = (
    "eos_policy",
    "lmbda",
    "temperature",
    "max_new_tokens",
    "num_generations",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
SETTINGS_IF_CHANGED = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "disable_dropout",
    "router_aux_loss_coef",
    "load_best_model_at_end",
    "metric_for_best_model",
    "train_sampling_strategy",
    "shuffle_dataset",
    "data_seed",
    "teacher_weights",
    "top_p",
    "top_k",
    "min_p",
    "generation_kwargs",
    "max_length",
    "overlong_prompts",
    "markup_policy",
    "thought_policy",
    "mask_strings",
    "rollout_reuse",
    "clip_ratio_low",
    "clip_ratio_high",
    "async_rollouts",
    "vllm_importance_sampling_clip_max",
    "reference_kl",
    "reference_teacher",
    "reference_teacher_alpha",
    "reference_teacher_share",
    "early_stop",
    "early_stop_kwargs",
    "early_stop_tokens",
    "chat_template_path",
    "chat_template_kwargs",
    "teacher_chat_template_kwargs",
)
OF_REWARDS = ("reward_weight", "reward_weights", "scale_rewards")
OF_TOOLS = ("max_tool_calling_iterations",)
PICTURE = "learning_curve.png"
OURS = re.compile(
    r"(given|gap|student|teacher|alignment|masked_bytes|advantage|ratio|completions|loss|closing|reverse_kl|gold|escd|xtoken|cdm|early_stop)/.+|entropy|loss"
)
METRICS = {
    "loss": "what was minimised",
    GAP: "student's minus teacher's log-probability of the text; 0: the student writes as the teacher would",
    "student/nats_per_byte": "student's negative log-probability of the text",
    "teacher/nats_per_byte": "teacher's negative log-probability of the text",
    "alignment/one_to_one_fraction": "share of scored student tokens that match a single teacher token byte for byte",
    "alignment/masked_fraction": "share of student tokens masked when the text was aligned; without what gates, early stops and cut-off ends leave out",
    "completions/truncated_fraction": "share of completions cut off at `max_new_tokens`",
    "entropy": "of the student's next-token distribution, in nats",
}


def model_card(
    *,
    model_name: str,
    hub_model_id: str | None,
    student: str,
    teachers: Mapping[str, tuple[str, PreTrainedTokenizerBase]],
    student_tokenizer: PreTrainedTokenizerBase,
    args: CrossTokenizerGKDConfig,
    adapters: Sequence[str],
    datasets: Sequence[str],
    tags: list[str],
    log_history: list[dict],
    prompts: int | None = None,
    licenses: Sequence[dict[str, str | list[str]]] = (),
    command: str | None = None,
    picture: str | None = None,
    on_text: bool = False,
    blended: bool | None = False,
    reward_funcs: Sequence[str] = (),
    teacher_gate: str | None = None,
    tools: Sequence[str] = (),
) -> ModelCard:
    """
    The card of a run.

    Args:
        adapters: the names of those that are switched on; none where the whole student was trained.
        student, teachers: hub names, folders, or "" for a model created in memory; each teacher with its tokenizer, by the name that
            it has in the run, "" for an only one.
        datasets: hub names or files of the training data.
        log_history: the trainer state's. The last logged value of each metric is shown.
        prompts: number of rows of the training set, if it has a length.
        licenses: the licenses on the model cards of the student and of each teacher. The student's becomes the new card's.
        command: the command that started the run.
        picture: file name of the learning curve, in the card's folder.
        on_text: whether the prompts were plain text.
        blended: whether every row was read by several teachers; `None`: some rows were, or it is not known.
        reward_funcs, teacher_gate, tools: names of what the trainer was given.
    """
    student = hub_name(student)
    template_kwargs = redacted(args.chat_template_kwargs or {})
    template_kwargs = {name: value for name, value in template_kwargs.items() if value is not None}
    has_template = bool(student_tokenizer.chat_template or template_kwargs.get("chat_template"))
    sets, metrics = _metrics(log_history)
    given = {"reward_funcs": reward_funcs, "teacher_gate": [teacher_gate] if teacher_gate else [], "tools": tools}
    one_tokenizer = [student_tokenizer.get_vocab() == tokenizer.get_vocab() for _, tokenizer in teachers.values()]
    return ModelCard.from_template(
        ModelCardData(
            base_model=student if on_hub(student) else None,
            datasets=[name for name in datasets if on_hub(name)] or None,
            library_name="peft" if adapters else "transformers",
            pipeline_tag="text-generation",
            model_name=model_name,
            tags=["generated_from_trainer", *dict.fromkeys(tags)],
            **(licenses[0] if licenses else {}),
        ),
        template_path=str(files(__package__).joinpath("model_card.md")),
        model_name=model_name,
        hub_model_id=hub_model_id or model_name,
        student=_link(student),
        distilled_from=[
            _link(hub_name(name)) if name or not key else _cell(key) for key, (name, _) in teachers.items()
        ],
        teachers=[
            (f"teacher {_cell(key)}" if key else "teacher", _link(hub_name(name)), describe(tokenizer))
            for key, (name, tokenizer) in teachers.items()
        ],
        base_on_hub=on_hub(student),
        student_tokenizer=describe(student_tokenizer),
        licenses=[_license(license) for license in licenses] if any(licenses) else None,
        story=" ".join([_story(args, one_tokenizer, blended), *_beside_the_teacher(**given)]),
        method=_method(args),
        citation=_citation(_paper(args)),
        prompts=_prompts(datasets, prompts),
        adapters=adapters,
        subfolders=[_subfolder(name) for name in adapters],
        base_name=student,
        quantization=_quantization(args.model_init_kwargs) if adapters else None,
        chat=not on_text and has_template,
        turns=None
        if on_text or has_template
        else json.dumps(plain_text([{"role": "user", "content": "Why is the sky blue?"}])),
        template_kwargs={name: repr(value) for name, value in template_kwargs.items()},
        max_new_tokens=args.max_new_tokens,
        steps=max((entry.get("step", 0) for entry in log_history), default=0),
        step=step(args),
        command=command,
        picture=picture,
        settings=_settings(args, given),
        sets=sets,
        metrics=metrics,
        versions=versions(),
    )


def _subfolder(adapter: str) -> str:
    """As an argument in Python: where PEFT saves an adapter."""
    return "" if adapter == "default" else f", subfolder={json.dumps(adapter)}"


def _quantization(init_kwargs: dict | None) -> str | None:
    """How the base under the adapter was loaded, as Python: on another it is another model. A base that was saved quantized is
    loaded so without a word, unless it is to be dequantized."""
    config = with_quantization_config(init_kwargs or {}).get("quantization_config")
    if dequantizes(config):
        return f"{type(config).__name__}(dequantize=True)"
    if isinstance(config, BitsAndBytesConfig):
        given = {
            name: value for name, value in config.to_diff_dict().items() if name[0] != "_" and name != "quant_method"
        }
        return f"BitsAndBytesConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    return None


def _link(name: str, kind: str = "") -> str:
    if on_hub(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(name).name}`" if Path(name).name else "an unnamed model"


def _story(args: CrossTokenizerGKDConfig, one_tokenizer: list[bool], blended: bool | None) -> str:
    """Who wrote the completions, and how the teacher's scores reached the student."""
    given = "the teacher's" if args.seq_kd else "the dataset's"
    if args.lmbda >= 1:
        written = "The student wrote completions itself"
    elif args.lmbda > 0:
        written = f"The student wrote about {args.lmbda:.0%} of the completions itself, and the others were {given}"
    else:
        written = f"The completions were {given}"
    if learned_by(args)[0] == "sft":
        return f"{written}; the student learned them by cross-entropy."
    if blended or (blended is None and len(one_tokenizer) > 1):
        return f"{written}; {_of_several(all(one_tokenizer), bool(blended))}"
    if all(one_tokenizer):
        teacher = "the teacher" if len(one_tokenizer) == 1 else "each one's teacher"
        return f"{written}; {teacher}, which has the same tokenizer, scored them token by token."
    teacher = "the teacher, which has another tokenizer," if len(one_tokenizer) == 1 else "each one's teacher"
    return (
        f"{written}; {teacher} scored the same text in its own tokens, and its scores were "
        "carried over to the student's tokens by the bytes that both stand for."
    )


def _of_several(one_tokenizer: bool, every_row: bool) -> str:
    """How the scores of teachers that read a row together reached the student. `every_row`: no row had a single one."""
    readers = "all of a row's teachers" if every_row else "a row's teacher, or all of its teachers,"
    mean = "the weighted mean of their scores" if every_row else "its scores, of several the weighted mean,"
    if one_tokenizer:
        return f"{readers} scored them token by token, in the student's own tokens, and {mean} reached the student."
    return (
        f"{readers} scored the same text, each in its own tokens, and {mean} reached the student's tokens by the bytes that "
        "they all stand for."
    )


def _beside_the_teacher(reward_funcs: Sequence[str], teacher_gate: Sequence[str], tools: Sequence[str]) -> list[str]:
    """Sentences on what else had a say."""
    said = {
        "Rewards by {} counted beside the teacher's scores.": reward_funcs,
        "What the gate {} called wrong was not learned from.": teacher_gate,
        "While it wrote, its calls of {} were executed.": tools,
    }
    return [words.format(", ".join(f"`{name}`" for name in names)) for words, names in said.items() if names]


def learned_by(args: CrossTokenizerGKDConfig) -> tuple[str | Callable, dict]:
    """The loss by which the run's text is learned, with its settings: a run on the dataset's text alone has no use for a loss on the student's
    own."""
    loss = args.distillation_loss
    if args.lmbda == 0 and _needs_the_students_text(loss):
        return args.off_policy_loss, args.off_policy_loss_kwargs or {}
    return loss, args.distillation_loss_kwargs or {}


def _needs_the_students_text(loss: str | Callable) -> bool:
    return getattr(loss if callable(loss) else LOSSES[loss], "policy", "both") == "on"


def _paper(args: CrossTokenizerGKDConfig) -> Paper:
    """The paper of the run's loss. One without a paper is used on the chunks of the default method."""
    if args.reference_teacher is not None:
        return PAPERS["compass"]
    loss, _ = learned_by(args)
    return PAPERS["dpca" if callable(loss) or loss not in PAPERS else loss]


def _method(args: CrossTokenizerGKDConfig) -> str:
    (loss, _), paper = learned_by(args), _paper(args)
    link = f"[{paper.title}]({paper.link})"
    if callable(loss):
        return f"`{getattr(loss, '__name__', type(loss).__name__)}`, a loss of the author's own, on text aligned as in {link}"
    return f"`{loss}`, {link}" if loss in PAPERS else f"`{loss}`, on text aligned as in {link}"


def _settings(args: CrossTokenizerGKDConfig, given: dict[str, Sequence[str]]) -> dict[str, str]:
    """The settings that shaped the result, by their names in the config, and the names of what the trainer was `given`. Settings of
    methods that did not run are left out."""
    loss, kwargs = learned_by(args)
    settings = {}
    own = () if callable(loss) else [field.name for field in fields(LOSSES[loss])]
    settings |= {
        name: getattr(args, name)
        for name in ("event", "credit", "baseline", "baseline_top_k", "advantage_clip")
        if name in own
    }
    if loss == "dpca":
        settings |= kwargs
    elif kwargs:
        settings["distillation_loss_kwargs" if loss is args.distillation_loss else "off_policy_loss_kwargs"] = kwargs
    if "advantage_clip" in settings and settings["advantage_clip"] is None:
        settings["advantage_clip"] = "no bound"
    if 0 < args.lmbda < 1 and _needs_the_students_text(loss):
        settings |= {"off_policy_loss": args.off_policy_loss, "off_policy_loss_kwargs": args.off_policy_loss_kwargs}
    settings |= {name: getattr(args, name) for name in SETTINGS}
    defaults = {field.name: field.default for field in fields(args)}
    names = [
        *SETTINGS_IF_CHANGED,
        *(OF_REWARDS if given["reward_funcs"] else ()),
        *(OF_TOOLS if given["tools"] else ()),
    ]
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) != defaults[name]}
    settings |= {name: ", ".join(own) for name, own in given.items() if own}
    settings |= {name: True for name in ("bf16", "fp16") if getattr(args, name)}
    settings |= {name: _loaded_with(getattr(args, name)) for name in ("model_init_kwargs", "teacher_model_init_kwargs")}
    settings |= {"num_processes": args.world_size} if args.world_size > 1 else {}
    return {name: _cell(redacted(_plain(value), name)) for name, value in settings.items() if value is not None}


def _loaded_with(kwargs: dict | None) -> dict | None:
    """Arguments of `from_pretrained`, with a quantization in as few words as there are for it."""
    if not kwargs:
        return None
    quantization = _quantization(kwargs) if "quantization_config" in kwargs else None
    shown = {**kwargs, "quantization_config": quantization} if quantization else kwargs
    return {name: _plain(value) for name, value in shown.items()}


def _plain(value):
    """A choice by its name, and a path without the folders that it is in."""
    value = value.value if isinstance(value, Enum) else value
    return without_folder(value) if isinstance(value, str) else value


def _metrics(log_history: list[dict]) -> tuple[list[str], dict[str, list[str]]]:
    """The columns (training, each evaluation), and for each metric its last value in each column and its meaning."""
    logged = figures(log_history)
    others = [name for name, sets in logged.items() if not (OURS.fullmatch(name) or BOOKKEEPING.fullmatch(name))]
    meanings = {}
    for name, meaning in METRICS.items():
        meanings[name] = meaning
        if logged.get(GIVEN + name, {}).keys() - logged.get(name, {}).keys():
            meanings[GIVEN + name] = f"as `{name}`, of text that the student did not write"
    meanings |= {name: "" for name in others if set(logged[name]) != {"training"}}
    sets = list(dict.fromkeys(where for name in meanings for where in logged.get(name, {})))
    sets.sort(key=lambda where: where != "training")
    return sets, {
        name: [*(_last(logged[name].get(where)) for where in sets), meaning]
        for name, meaning in meanings.items()
        if name in logged
    }


def _last(points: list[tuple[int, float]] | None) -> str:
    return f"{points[-1][1]:.4g}" if points else ""


def _prompts(datasets: Sequence[str], prompts: int | None) -> str:
    names = [_link(name, "datasets/") for name in datasets]
    return ", ".join([*names, *([] if prompts is None else [f"{prompts:,} rows"])])


def _license(license: dict[str, str | list[str]]) -> str:
    """By its own name, if the hub has none for it."""
    name, link = license.get("license_name") or license.get("license", ""), license.get("license_link")
    name = _cell(name if isinstance(name, str) else ", ".join(name))
    return f"[{name}]({link})" if isinstance(link, str) and link.startswith("https://") else name


def gap_curves(log_history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Of training and of each evaluation. It is that of given text where the student wrote none."""
    logged = figures(log_history)
    own, given = logged.get(GAP, {}), logged.get(GIVEN + GAP, {})
    return {**{f"{where}, given text": points for where, points in given.items() if where not in own}, **own}


def learning_curve(log_history: list[dict]) -> bytes | None:
    """The gap as a PNG picture, if it has at least two points and matplotlib is installed."""
    sets = gap_curves(log_history)
    if find_spec("matplotlib") is None or not any(len(points) > 1 for points in sets.values()):
        return None
    from matplotlib.figure import Figure  # pyplot would set up a backend in the user's session

    picture, data = Figure(figsize=(6.4, 3.2), layout="constrained"), BytesIO()
    axes = picture.subplots()
    for (where, points), style in zip(sets.items(), cycle(["-", "--", ":", "-."])):
        axes.plot(*zip(*points, strict=True), style, label=where)
    axes.set(
        xlabel="optimizer step", ylabel="gap, nats a byte", title="How far the student still is from its teacher"
    )
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(0.0, bottom), max(0.0, top))  # on given text the gap may be negative
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.savefig(data, dpi=150)
    return data.getvalue()


class Written(NamedTuple):
    """A card and its picture. They are valid for every folder as long as `key` does not change."""

    key: tuple
    card: ModelCard
    picture: bytes | None

    def write(self, folder: str | Path):
        if self.picture is not None:
            Path(folder, PICTURE).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, PICTURE).write_bytes(self.picture)
        self.card.save(Path(folder, "README.md"))


def name_models(folder: str | Path, model_name: str, student: str, teacher: str):
    """Puts the names of the models into a card that TRL and PEFT have made: they write None, or the folder that a local one was read from."""
    path = Path(folder, "README.md")
    if not path.is_file():
        return
    with best_effort(f"The models' names in {path}"):
        made, base = ModelCard.load(path, ignore_metadata_errors=True), hub_name(student)
        made.data.base_model = base if on_hub(base) else None
        if not on_hub(base):
            made.data.tags = [tag for tag in made.data.tags or () if not tag.startswith("base_model:")]
        for placeholder, name in (
            ("[None](https://huggingface.co/None)", _link(base)),
            ('model="None"', f'model="{model_name}"'),
            ("trained with CTPD", f"trained under the teacher {_link(hub_name(teacher))} with CTPD"),
        ):
            made.text = made.text.replace(placeholder, name)
        made.save(path)


def remove_unreadable(folder: str | Path):
    """Removes a card that cannot be read. A new one would replace it anyway."""
    path, readable = Path(folder, "README.md"), False
    if not path.is_file():
        return
    with best_effort(f"The old card {path}"):
        ModelCard.load(path)
        readable = True
    if not readable:
        path.unlink()


def _cell(value) -> str:
    """A cell of a Markdown table. A tag in it, as of `mask_strings`, stays text."""
    if isinstance(value, dict):
        value = ", ".join(f"{name}={item!r}" for name, item in value.items() if item is not None)
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;")


def _citation(paper: Paper) -> str:
    """As BibTeX."""
    fields = {"title": f"{{{paper.title}}}", "author": paper.authors}
    if paper.arxiv:
        head = f"@article{{arxiv{paper.arxiv.replace('.', '')},"
        fields |= {"year": f"20{paper.arxiv[:2]}", "journal": f"arXiv preprint arXiv:{paper.arxiv}"}
    else:
        head = f"@misc{{{paper.url.rpartition('/')[2]},"
        fields |= {"year": paper.year, "url": paper.url}
    return "\n".join([head, *(f"  {name:7} = {{{value}}}," for name, value in fields.items() if value), "}"])
