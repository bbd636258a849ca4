"""Which losses a run has, what they need, and what they return."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace

import torch
from accelerate.logging import get_logger
from torch import nn

from ..config import CrossTokenizerGKDConfig
from ..losses import AUTO, LOSSES, Metrics, build_loss, loss_name
from ..losses.compass import Compass
from ..models.forwards import base_model
from ..models.heads import check_head
from ..teachers.panel import Panel
from ..teachers.servers import is_url
from ..text.vocabulary import VocabularyPair


logger = get_logger(__name__)
_RATIOS = ("clip_ratio_low", "clip_ratio_high")
_OF_SAMPLING = ("top_k", "temperature")  # settings of single losses have these names, too
_KNOBS = ("event", "credit", "baseline", "baseline_top_k", "advantage_clip", *_RATIOS)  # of single losses


def with_loss(args: CrossTokenizerGKDConfig, teacher_model) -> CrossTokenizerGKDConfig:
    """`args` with a loss in the place of "auto": `reverse_kl` where the teacher tells whole distributions, else `dpca`, which has the same
    expected gradient, and more noise."""
    if getattr(args, "distillation_loss", None) != AUTO:
        return args
    others = {field.name for field in fields(LOSSES["reverse_kl"])}
    own = _changed(args, [knob for knob in _KNOBS if knob not in others] + ["reference_teacher", "rollout_reuse"])
    if args.distillation_loss_kwargs and not {*args.distillation_loss_kwargs} <= others:
        own["distillation_loss_kwargs"] = args.distillation_loss_kwargs
    if isinstance(teacher_model, Mapping):
        name, why = "dpca", "teachers are given by name"
    elif is_url(teacher_model) or isinstance(teacher_model, list | tuple):
        name, why = "dpca", "a server tells log-probs of the text alone"
    elif own:
        name, why = "dpca", f"{' and '.join(f'{name}={value!r}' for name, value in own.items())} is set"
    else:
        name, why = "reverse_kl", "the teacher is in this process"
    logger.info(f"distillation_loss={AUTO!r} is {name}: {why}.")
    chosen = copy.copy(args)
    chosen.distillation_loss = name
    return chosen


def losses_by_text(args: CrossTokenizerGKDConfig) -> tuple[Callable, Callable]:
    """`chosen_losses`, checked for what they need of the completions of a prompt."""
    own, given = chosen_losses(args)
    if args.lmbda > 0:
        check_compares_completions(own, args, given=False)
    if args.lmbda < 1:
        check_compares_completions(given, args, given=True)
    return own, given


def chosen_losses(args: CrossTokenizerGKDConfig) -> tuple[Callable, Callable]:
    """
    The loss on the student's own text, and the loss on given text. A cross-entropy beside a loss is for given text only: on the
    student's own it would teach the student whatever it wrote. Raises `ValueError` as `distillation_loss` does.
    """
    loss = distillation_loss(args)
    if args.reference_teacher is not None:
        loss = compass(args)
    if getattr(loss, "policy", "both") == "on":
        return loss, build_loss(args.off_policy_loss, **(args.off_policy_loss_kwargs or {}))
    weight = getattr(loss, "cross_entropy_weight", 0)
    if not weight or args.lmbda == 0 or not is_dataclass(loss):
        return loss, loss
    if args.lmbda == 1:
        raise ValueError(
            f"cross_entropy_weight={weight} has no effect with lmbda={args.lmbda}: it is for given text alone, since on text of "
            "the student's own it would teach whatever it wrote. Set lmbda below 1, or leave the weight out."
        )
    return replace(loss, cross_entropy_weight=0.0), loss


def distillation_loss(args: CrossTokenizerGKDConfig) -> Callable:
    """
    The loss that `args` name. Warns of settings of sampling that a setting of the loss has the name of. Raises `ValueError` where it cannot
    learn from the text that `args.lmbda` gives it, or where a setting would have no effect on it.
    """
    name, kwargs = args.distillation_loss, dict(args.distillation_loss_kwargs or {})
    knobs = set() if callable(name) else {field.name for field in fields(LOSSES[name])}
    changed = _changed(args, _KNOBS)
    for knob in _KNOBS:
        value = getattr(args, knob)
        if knob in changed and knob not in knobs:
            able = [other for other, known in LOSSES.items() if knob in {field.name for field in fields(known)}]
            raise ValueError(
                f"{knob}={value!r} has no effect on distillation_loss={loss_name(name)!r}: it is a setting of "
                f"{' and '.join(able)}."
            )
        if knob in changed and kwargs.get(knob, value) != value:
            raise ValueError(
                f"{knob} is {value!r} in the config and {kwargs[knob]!r} in distillation_loss_kwargs: say one."
            )
        if knob in knobs:
            kwargs.setdefault(knob, value)
    for knob, value in _changed(args, _OF_SAMPLING).items():
        if knob in knobs and knob not in kwargs:
            default = next(field.default for field in fields(LOSSES[name]) if field.name == knob)
            logger.warning(
                f"{knob}={value!r} says how the student samples, and changes the policy. The {knob} of distillation_loss={name!r} is another setting, "
                f"{default!r} unless distillation_loss_kwargs={{{knob!r}: ...}} gives it."
            )
    loss = build_loss(name, **kwargs)
    for attribute, known in (("signal", ("none", "logprobs", "logits")), ("policy", ("on", "off", "both"))):
        if getattr(loss, attribute, known[0]) not in known:
            raise ValueError(
                f"{loss_name(name)} has {attribute}={getattr(loss, attribute)!r}: choose one of {', '.join(known)}."
            )
    policy = getattr(loss, "policy", "both")
    for knob, off, ability in (
        ("rollout_reuse", 1, "weighs_by_ratio"),
        ("async_rollouts", 0, "weighs_by_importance"),
    ):
        if getattr(args, knob) > off and policy == "on" and not getattr(loss, ability, False):
            able = [other for other, known in LOSSES.items() if getattr(known, ability) or known.policy != "on"]
            raise ValueError(
                f"{knob}={getattr(args, knob)} trains on completions of a student that has been updated since, which "
                f"distillation_loss={loss_name(name)!r} does not account for: set it to {off}, or choose one of {', '.join(able)}."
            )
    for knob in _RATIOS:
        default = type(args).__dataclass_fields__[knob].default
        if (args.rollout_reuse == 1 or args.lmbda == 0) and getattr(loss, knob, default) != default:
            raise ValueError(
                f"{knob}={getattr(loss, knob)} has no effect with rollout_reuse={args.rollout_reuse} and lmbda={args.lmbda}: "
                "it bounds how far a later step goes with completions of the student's own."
            )
    if policy != "on" and args.off_policy_loss_kwargs:
        raise ValueError(
            f"off_policy_loss_kwargs has no effect: distillation_loss={loss_name(name)!r} is right on any text, or on "
            "given text alone, and takes the place of off_policy_loss."
        )
    if policy == "off" and args.lmbda > 0:
        raise ValueError(
            f"{args.distillation_loss!r} learns from text the student did not write, but lmbda={args.lmbda} lets the "
            "student write: set lmbda=0.0."
        )
    return loss


def compass(args: CrossTokenizerGKDConfig) -> Compass:
    """
    The loss on the difference of two teachers, which takes the place of dpca. Raises `ValueError` for another loss, and for settings
    of dpca's that have no effect on it.
    """
    if args.distillation_loss != "dpca" or args.distillation_loss_kwargs:
        raise ValueError(
            f"reference_teacher={args.reference_teacher!r} has no effect on distillation_loss={loss_name(args.distillation_loss)!r} with "
            f"distillation_loss_kwargs={args.distillation_loss_kwargs}: it takes the place of dpca's advantages, so leave both at their "
            "defaults."
        )
    for name in ("event", "credit", "baseline", "baseline_top_k"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} has no effect with reference_teacher: the difference of two teachers has one chunk "
                "event, and its shares are reference_teacher_share. Leave it out."
            )
    ratio = {name: getattr(args, name) for name in ("advantage_clip", "clip_ratio_low", "clip_ratio_high")}
    return Compass(alpha=args.reference_teacher_alpha, share=args.reference_teacher_share, **ratio)


def _changed(args: CrossTokenizerGKDConfig, names: Iterable[str]) -> dict:
    """Those of the settings that are not at their defaults."""
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value != type(args).__dataclass_fields__[name].default}


def check_compares_completions(loss: Callable, args: CrossTokenizerGKDConfig, given: bool):
    """Raises `ValueError` where `loss` compares the completions of a prompt, and there are none to compare. `given`: on text that the
    student did not write."""
    if not getattr(loss, "compares_completions", False):
        return
    name = loss_name(loss)
    if args.num_generations < 2:
        raise ValueError(
            f"{name} compares the completions of a prompt, and num_generations={args.num_generations} makes one: set it to 2 or more "
            "(4 in the paper)."
        )
    if given and not args.seq_kd:
        raise ValueError(
            f"{name} compares the completions of a prompt, and with lmbda={args.lmbda} the dataset gives one: set seq_kd=True, so that "
            "the teacher writes them."
        )
    if args.length_grouped and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"{name} compares the completions of a prompt within a micro-batch, and length_grouped=True with "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} deals them out by length: set length_grouped=False."
        )


def check_losses(losses: Sequence[Callable], model: nn.Module, panel: Panel, vocabulary: Callable[[], VocabularyPair]):
    """
    Builds the tables of the two vocabularies that `losses` read, before any training time is spent. Raises `ValueError` where a
    teacher does not give what a loss needs, or an LM head cannot be read apart from its model.
    """
    for loss in losses:
        check_signal(loss, panel.signals, len(panel.seats))
        for structure in getattr(loss, "structures", ()):
            getattr(vocabulary(), structure)
    panel.ask_likeliest([loss.likeliest for loss in losses if getattr(loss, "likeliest", None) is not None])
    if any(getattr(loss, "event", "open") == "closed" for loss in losses):
        panel.ask_closings()
    check_head("student", base_model(model))
    panel.check_heads()


def signal_of(loss: Callable) -> str:
    """What `loss` needs of the teacher: "none", "logprobs" (the default) or "logits"."""
    return getattr(loss, "signal", "logprobs")


def check_signal(loss: Callable, signals: Sequence[str], teachers: int = 1):
    """Raises `ValueError` where `loss` asks for more than a teacher that gives `signals` can."""
    wanted = signal_of(loss)
    if wanted == "logits" and getattr(loss, "likeliest", None) is not None and "likeliest" in signals:
        return
    if wanted != "none" and wanted not in signals:
        able = [name for name, known in LOSSES.items() if known.signal in ("none", *signals)]
        if "likeliest" in signals:
            able += ["reverse_kl with a `top_k`", "dpca with a `baseline_top_k`"]
        name = next((name for name, known in LOSSES.items() if type(loss) is known), loss_name(loss))
        who = f"one of {teachers} teachers" if teachers > 1 else "a teacher behind a server"
        raise ValueError(
            f"{name}{getattr(loss, 'reads_because', '')} needs the teacher's {wanted}, and {who} gives "
            f"{', '.join(signal for signal in signals if signal != 'likeliest')} only. Choose one of {', '.join(able)}, or a single teacher in this process."
        )


def check_takes_rewards(loss: Callable):
    """Raises `ValueError` where `loss` would leave rewards out."""
    if not getattr(loss, "takes_rewards", False):
        able = [name for name, known in LOSSES.items() if known.takes_rewards]
        raise ValueError(
            f"reward_funcs are added to the advantages of sampled tokens, and {loss_name(loss)} has none: choose one of "
            f"{', '.join(able)}, or leave reward_funcs out."
        )


def checked(result) -> tuple[torch.Tensor, Metrics]:
    """`result` of a loss. Raises `TypeError` unless it is (value, metrics)."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise TypeError(
            "A loss returns (value, metrics), with metrics a dict of name: (sum, weight); this one returned a "
            f"{type(result).__name__}."
        )
    return result


def check_learns(loss: torch.Tensor):
    """Raises `ValueError` where no weight that is to be trained has part in `loss`."""
    if not loss.requires_grad:
        raise ValueError(
            "The loss depends on no weight that is to be trained: what requires a gradient is in no active part of the student. With "
            "several adapters, `model.set_adapter(name)` chooses the one that is trained."
        )
