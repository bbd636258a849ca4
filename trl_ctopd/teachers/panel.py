"""The teachers of a run: a single one, or several by name, of which each row of the dataset chooses one, or some to be blended.

Each teacher has a seat: the model or server, its tokenizer and templates, and its alignment with the student. Requests to
servers are sent first, and teachers with threads of their own begin next, so that they work while another teacher in this process does.

Left out: losses on whole distributions with several teachers, which would need a comparison of all vocabularies.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..config import CrossTokenizerGKDConfig
from ..losses import LOSSES
from ..models.heads import check_head, context_of, head_rows
from ..models.loading import check_goes_on, check_vocabulary, load_tokenizer
from ..rollouts.blending import blended, prompts_of
from ..rollouts.closing import Tables, look_up, teacher_going_on, views
from ..rollouts.pairing import Prompt, Rollout, pair
from ..text.aligner import TextAligner
from ..text.chat import Speaker, beside_markup, masked_beginnings
from ..text.continuations import Continuations
from ..text.one_tokenizer import OneTokenizer, is_one_tokenizer
from ..text.sections import SectionAligner, aligner_of
from ..text.token_bytes import token_bytes
from ..text.vocabulary import CACHE_DIR, VocabularyPair
from .local import LocalTeacher, load_teacher
from .readings import Readings
from .remote import Foreseen, RemoteTeacher
from .servers import Servers, is_url


logger = get_logger(__name__)
ONLY = ""  # the name of a single teacher
# of a server's likeliest tokens, which tell how likely the teacher is to leave a student's token closed
CLOSING_TOKENS = 8
Model = str | PreTrainedModel | Sequence[str]


class Seat:
    """
    One teacher of a run.

    Args:
        model: a module, a hub name or folder, or the address (or addresses) of a server. A server is contacted here. A model
            is loaded later, by `sit`; only its tokenizer is needed before.
        tokenizer: the teacher's. If None, it is loaded from the model, or from the name that the server loaded it from.

    Attributes:
        teacher: scores text.
        name: hub name or folder of the model, or "".
        context: number of tokens that the teacher can read, None for no limit.
        stop_ids: the ids that end its turn.
        turn_ends: for each student id that ends a turn, the teacher's ids for a turn end.
        text_ends: for each student id that ends a turn, the teacher's ids of which any one ends a text without a template.
    """

    teacher: LocalTeacher | RemoteTeacher
    context: int | None
    stop_ids: list[int]
    turn_ends: dict[int, list[int]]
    text_ends: dict[int, list[int]]

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase | None, args: CrossTokenizerGKDConfig):
        self._model, self._args = model, args
        self.remote = is_url(model) or not isinstance(model, str | nn.Module)
        if self.remote:
            named = args.teacher_model_name_or_path if args.teacher_server_url else None
            self.teacher = _connect([model] if is_url(model) else model, named, args)
            self.name, self.context = self.teacher.root, self.teacher.context
            self.tokenizer = self._tokenizer_of_server(tokenizer, named or self.name)
            self.teacher.check(self.tokenizer)
        else:
            self.name = model if isinstance(model, str) else get_config_model_id(model.config)
            given = args.teacher_model_init_kwargs or {}
            revision, gguf_file = given.get("revision"), given.get("gguf_file")
            check_goes_on("teacher", model, revision)
            self.tokenizer = load_tokenizer(
                tokenizer, self.name, revision, args.trust_remote_code, gguf_file, "teacher"
            )
        own = args.teacher_chat_template_kwargs
        kwargs = args.chat_template_kwargs if own is None else own
        self.side = Speaker(self.tokenizer, kwargs, own_kwargs_win=own is not None)

    def _tokenizer_of_server(self, tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
        try:
            return load_tokenizer(tokenizer, name, None, self._args.trust_remote_code)
        except OSError as error:
            raise ValueError(
                f"The tokenizer of the teacher's server is not known: {name!r} is not a folder here, and not a model on the hub "
                "that can be reached. Pass `teacher_processing_class`; or set `teacher_server_url` to the address, and "
                "`teacher_model_name_or_path` to the name or folder of the model."
            ) from error

    def sit(self, accelerator, student: Speaker, student_stop_ids: list[int]):
        """Does all that needs the student and the run's processes."""
        model, args, generation_config = self._model, self._args, None
        if not self.remote:
            if isinstance(model, str):
                model = load_teacher(model, args.teacher_model_init_kwargs, args.trust_remote_code, accelerator)
            check_vocabulary("teacher", model, self.tokenizer)
            self.teacher = _local_teacher(model, accelerator, args)
            self.context = context_of(self.teacher.config)
            generation_config = self.teacher.generation_config
        del self._model
        self.student = student
        if args.temperature != 1 and not isinstance(self.aligner, OneTokenizer):
            logger.warning(
                f"temperature={args.temperature} with two tokenizers: tempered token by token, student and teacher are not of one law of texts even "
                "where they agree at temperature 1, so that a perfect student moves (docs/fixed-point.md). Leave temperature at 1.0, if you can."
            )
        self.stop_ids = self.side.stop_ids(generation_config)
        turn_end = self.side.turn_end
        # a teacher with the same tokenizer reads the student's own stop token, if that ends the teacher's turn too
        shared = self.stop_ids if isinstance(self.aligner, OneTokenizer) else []
        self.turn_ends = {stop: [stop] if stop in shared else turn_end for stop in student_stop_ids}
        text_ends = self.side.text_ends(self.stop_ids)
        self.text_ends = {stop: [stop] if stop in shared else text_ends for stop in student_stop_ids}

    @cached_property
    def aligner(self) -> TextAligner | OneTokenizer:
        student = self.student.tokenizer
        if is_one_tokenizer(student, self.tokenizer):
            return OneTokenizer(student, self._args.mask_strings or ())
        return aligner_of(self.student, self.side, self._args.mask_strings or ())

    def vocabulary(self, student_size: int, device: torch.device, with_calls: bool = False) -> VocabularyPair:
        """What the student's vocabulary (`student_size` rows of its LM head) and this teacher's have in common. `with_calls`: rows have tools."""
        markup, places = (), None
        if not isinstance(self.aligner, OneTokenizer):  # which reads the student's own markup
            places = beside_markup(self.student, self.side)
            markup = self.student.turn_markup | masked_beginnings(
                self.student, self.side, self._masks, self._args.thought_policy == "text", with_calls
            )
        turn_end_is_one_token = all(len(ids) == 1 for ids in self.turn_ends.values())
        teacher_size = len(token_bytes(self.tokenizer)) if self.remote else head_rows(self.teacher.base_model)
        return VocabularyPair(
            self.student.tokenizer,
            self.tokenizer,
            student_size=student_size,
            teacher_size=teacher_size,
            student_stops=list(self.turn_ends),
            teacher_stops=self.stop_ids if turn_end_is_one_token else (),
            student_markup=markup,
            beside=places,
            device=device,
            cache_dir=CACHE_DIR,
        )

    @property
    def _markup_is_comparable(self) -> bool:
        """Most losses on whole distributions compare the next bytes, and the two templates' markup has different bytes."""
        chosen = [self._args.distillation_loss, *([self._args.off_policy_loss] if self._args.lmbda < 1 else [])]
        losses = [LOSSES.get(loss, loss) if isinstance(loss, str) else loss for loss in chosen]
        return all(
            getattr(loss, "signal", "logprobs") != "logits" or getattr(loss, "bridges_markup", False) for loss in losses
        )

    def _masks(self, literal: str) -> bool:
        """Whether the settings mask this markup of the student's."""
        return self._args.markup_policy == "mask" or any(own in literal for own in self._args.mask_strings or ())

    @cached_property
    def sections(self) -> SectionAligner | None:
        """None where both models have the same tokenizer, since the teacher then reads the student's own ids."""
        if isinstance(self.aligner, OneTokenizer):
            return None
        args = self._args
        if not self._markup_is_comparable:
            self._warn_of_markup()
        return SectionAligner(
            self.aligner,
            self.student,
            self.side,
            markup_policy=args.markup_policy if self._markup_is_comparable else "mask",
            thought_policy=args.thought_policy,
            eos_policy=args.eos_policy,
            masked_strings=args.mask_strings or (),
        )

    def _warn_of_markup(self):
        """What is drawn and not scored costs nothing, and yet such a loss compares its probability with the teacher's, which is 0."""
        stops, known = {*self.turn_ends}, self.tokenizer.get_vocab()
        names = self.student.tokenizer.convert_ids_to_tokens(sorted(self.student.turn_markup - stops))
        if lost := [name for name in names if name not in known]:
            logger.warning(
                f"The student's template writes {', '.join(map(repr, lost))} between the sections of a turn, for which the teacher's vocabulary has "
                "no token. A loss that compares distributions, other than reverse_kl, teaches the student to write these less and less: take "
                "reverse_kl or dpca for completions with thoughts or calls."
            )

    def continuations(self, student_size: int) -> Continuations | None:
        """What continues this teacher's tokens. None where it has the student's tokenizer and reads the student's ids."""
        if isinstance(self.aligner, OneTokenizer):
            return None
        return self.vocabulary(student_size, torch.device("cpu")).continuations


class ReferenceSeat:
    """
    The reference teacher: a second model that reads what the only teacher reads, in the same tokens.

    Args:
        model: hub name, folder or address of a server. A server is contacted here; a model is loaded by `sit`.
        seat: the only teacher's.

    Raises:
        ValueError: its tokenizer is not the teacher's.
    """

    teacher: LocalTeacher | RemoteTeacher
    context: int | None

    def __init__(self, model: str, seat: Seat, args: CrossTokenizerGKDConfig):
        self._model, self._args, self.remote = model, args, is_url(model)
        if self.remote:
            self.teacher = RemoteTeacher(_servers([model], args))
            self.teacher.check(seat.tokenizer)
            self.context = self.teacher.context
            return
        tokenizer = load_tokenizer(None, model, None, args.trust_remote_code)
        if not is_one_tokenizer(tokenizer, seat.tokenizer):
            raise ValueError(
                f"reference_teacher={model!r} has a tokenizer of {len(tokenizer)} tokens ({type(tokenizer).__name__}), which is not the "
                f"teacher's, of {len(seat.tokenizer)} ({type(seat.tokenizer).__name__}): choose a model of the teacher's own family."
            )

    def sit(self, accelerator):
        if not self.remote:
            args = self._args
            model = load_teacher(self._model, args.teacher_model_init_kwargs, args.trust_remote_code, accelerator)
            self.teacher = _local_teacher(model, accelerator, args)
            self.context = context_of(self.teacher.config)


class Panel:
    """
    The teachers of a run, each in its seat.

    Args:
        models: the single teacher, or teachers by name.
        tokenizers: the single teacher's tokenizer, or tokenizers by name; None to load them.
    """

    def __init__(
        self,
        models: Model | Mapping[str, Model],
        tokenizers: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
        args: CrossTokenizerGKDConfig,
    ):
        several = isinstance(models, Mapping)
        tokenizers = (tokenizers or {}) if several else {ONLY: tokenizers}
        if not isinstance(tokenizers, Mapping) or not set(tokenizers) <= (set(models) if several else {ONLY}):
            names = ", ".join(map(repr, tokenizers)) if isinstance(tokenizers, Mapping) else type(tokenizers).__name__
            raise ValueError(
                f"`teacher_processing_class` is {names}, and the teachers are {', '.join(map(repr, models))}: pass a dict "
                "with their names."
            )
        self.seats = {
            name: Seat(model, tokenizers.get(name), args)
            for name, model in (models.items() if several else [(ONLY, models)])
        }
        self._args, self._eos_policy = args, args.eos_policy
        self.reference = None
        if args.reference_teacher is not None:
            if self.only is None:
                raise ValueError(
                    f"reference_teacher={args.reference_teacher!r} with several teachers, {', '.join(self.seats)}: it reads the tokens of "
                    "one. Train with a single teacher, or without it."
                )
            self.reference = ReferenceSeat(args.reference_teacher, self.only, args)

    @property
    def only(self) -> Seat | None:
        return self.seats.get(ONLY)

    @property
    def context(self) -> int | None:
        """The number of tokens that every teacher can read, None for no limit."""
        return min((seat.context for seat in self.seats.values() if seat.context is not None), default=None)

    @property
    def contexts_of_servers(self) -> dict[str, int]:
        """Contexts of the teachers behind servers, by name, where known."""
        remote = {name: seat.context for name, seat in self.seats.items() if seat.remote}
        return {name: context for name, context in remote.items() if context is not None}

    @property
    def sides(self) -> dict[str, Speaker]:
        return {name: seat.side for name, seat in self.seats.items()}

    @property
    def signals(self) -> tuple[str, ...]:
        """The inputs for losses that every teacher can give."""
        return self.only.teacher.signals if self.only else ("logprobs",)

    def sit(self, accelerator, student: Speaker, student_stop_ids: list[int]):
        """
        Does all that needs the student and the run's processes. Raises `ValueError` for several teachers under DeepSpeed or
        FSDP, where the processes would not all run the same forward passes.
        """
        self._device = accelerator.device
        sharded = accelerator.state.deepspeed_plugin is not None or getattr(accelerator.state, "fsdp_plugin", None)
        if sharded and len(self.seats) > 1 and not all(seat.remote for seat in self.seats.values()):
            raise ValueError(
                "Several teachers under DeepSpeed or FSDP: rows choose their teacher, so processes would run different numbers of "
                "forward passes, and hang. Put the teachers behind servers."
            )
        for seat in self.seats.values():
            seat.sit(accelerator, student, student_stop_ids)
        if self.reference is not None:
            self.reference.sit(accelerator)
            contexts = [own for own in (self.only.context, self.reference.context) if own is not None]
            self.only.context = min(contexts, default=None)

    def fit(self, prompts: int):
        """Teachers in this process read as many completions at once as a student's micro-batch of `prompts` has, unless
        `teacher_batch_size` says otherwise."""
        for seat in filter(None, (*self.seats.values(), self.reference)):
            if not seat.remote:
                seat.teacher.batch_size = _rows(self._args, prompts)

    def ask_likeliest(self, counts: Sequence[int]):
        """`counts`: how many of the most likely tokens at each place each loss reads. Servers are asked for the largest number.
        Raises `ValueError` where one does not return that many."""
        if counts and self.only is not None and self.only.remote:
            self.only.teacher.ask_likeliest(max(counts))

    def ask_closings(self):
        """Asks servers for what tells how the student's tokens close."""
        for seat in self.seats.values():
            if seat.remote and not isinstance(seat.aligner, OneTokenizer):
                seat.teacher.ask_closings(CLOSING_TOKENS)

    def check_heads(self):
        """Raises `ValueError` where the LM head of a teacher in this process cannot be used apart from its backbone."""
        for seat in self.seats.values():
            if not seat.remote:
                check_head("teacher", seat.teacher.base_model)

    def pair(
        self, prompts: Sequence[Prompt], completions: Sequence[list[int]], within_context: bool = True
    ) -> list[Rollout]:
        """Pairs each completion with its own teacher's tokens of the same text, or with those of a mixture of teachers.
        `within_context`: those beyond a teacher's context are left unread."""
        shares = [prompts_of(prompt) for prompt in prompts]
        parts: dict[tuple[int, str], Rollout] = {}
        for name, seat in self.seats.items():
            own = {
                row: shares[row][name][1] if shares[row] else prompt
                for row, prompt in enumerate(prompts)
                if (name in shares[row] if shares[row] else prompt.teacher == name)
            }
            rows = list(own)
            found = pair(
                [own[row] for row in rows],
                [completions[row] for row in rows],
                seat.aligner,
                turn_ends=seat.turn_ends,
                text_ends=seat.text_ends,
                eos_policy=self._eos_policy,
                teacher_context=seat.context if within_context else None,
                sections=seat.sections,
            )
            parts |= zip([(row, name) for row in rows], found, strict=True)
        return [
            blended(prompt, [weight for weight, _ in together.values()], [parts[row, name] for name in together])
            if together
            else parts[row, prompt.teacher]
            for row, (prompt, together) in enumerate(zip(prompts, shares, strict=True))
        ]

    def alike_stops(self, rollout: Rollout) -> dict[int, list[int]]:
        """For each stop token of the student's the others for which all teachers of `rollout` read the same end; empty where each has one of its
        own."""
        names, is_text = [view.prompt.teacher for _, view in views(rollout)], rollout.prompt.framed.is_text
        seats = [self.seats[name] for name in names]
        ends = [seat.text_ends if is_text else seat.turn_ends for seat in seats]
        stops = ends[0] if ends else ()
        found = {
            stop: [other for other in stops if other != stop and all(own[other] == own[stop] for own in ends)]
            for stop in stops
        }
        return {stop: others for stop, others in found.items() if others}

    def align_completions(
        self,
        completions: Sequence[list[int]],
        teachers: Sequence[int] | None = None,
        frames: Sequence[str] | None = None,
    ) -> list[Rollout]:
        """
        Pairs completions that have no prompts. `teachers`: index of each one's seat; `frames`: the frames of their prompts, or what
        each of several teachers reads, as `collate` returns them.
        Nothing else depends on prompts, but for the teacher's context.
        """
        names, count = list(self.seats), len(completions)
        prompts = [
            Prompt([], [], teacher=names[place], **{"blend" if frame.startswith("[") else "frame": frame})
            for place, frame in zip(teachers or [0] * count, frames or [""] * count, strict=True)
        ]
        return self.pair(prompts, completions)

    def foresee(self) -> "Foreseeing | None":
        """What asks servers for texts of a step as they become known; None where no teacher is at a server."""
        remote = {name: seat.teacher.foresee() for name, seat in self.seats.items() if seat.remote}
        reference = self.reference.teacher.foresee() if self.reference is not None and self.reference.remote else None
        return Foreseeing(self, remote, reference) if remote or reference else None

    def read(
        self,
        rollouts: Sequence[Rollout],
        with_hidden: bool,
        tables: Sequence[Tables] | None = None,
        foreseeing: "Foreseeing | None" = None,
        wanted: Sequence[int] | None = None,
    ) -> Readings:
        """
        Each teacher scores its rows. Scores of servers, and of teachers with a thread of their own, may still be on their way.

        Args:
            with_hidden: whether teachers in this process give hidden states.
            tables: for each rollout, with what each teacher's tokens go on, where its loss reads how chunks close; else empty. Teachers
                in this process then tell how the student's tokens close.
            foreseeing: what servers were already asked for.
            wanted: all rows, in the order in which their scores are read. None: as they are given.
        """
        foreseen, of_reference = ({}, None) if foreseeing is None else (foreseeing.texts, foreseeing.of_reference)
        readings = _readings(self._device, *self.seats.values())
        wanted = range(len(rollouts)) if wanted is None else wanted
        place_of = {row: place for place, row in enumerate(wanted)}
        readings.padding_rows = {row for row, rollout in enumerate(rollouts) if rollout.prompt.is_padding}
        texts, own_tables = list(rollouts), list(tables or [{}] * len(rollouts))
        for row, rollout in enumerate(rollouts):  # each teacher's of a mixture come after them
            if rollout.parts:
                own = [view for _, view in views(rollout)]
                if not own and rollout.teacher_ids:  # nothing that they read is compared
                    own = [part.rollout for part in rollout.parts]
                readings.mixtures[row] = rollout, range(len(texts), len(texts) + len(own))
                place_of |= dict.fromkeys(readings.mixtures[row][1], place_of[row])
                texts += own
                own_tables += [own_tables[row]] * len(own)
        for name, seat in sorted(self.seats.items(), key=lambda named: _at_once(named[1])):
            rows = [row for row, own in enumerate(texts) if own.prompt.teacher == name and not own.parts]
            rows.sort(key=place_of.get)
            own = [texts[row] for row in rows]
            asked = [r.teacher_prompt_ids for r in own], [r.teacher_ids for r in own], [r.other_ends for r in own]
            if not rows:
                continue
            readings.closing |= {row: (texts[row], own_tables[row].get(name)) for row in rows if own_tables[row]}
            if seat.remote:
                scores = seat.teacher.start(*asked, foreseen.get(name))
            else:
                going_on = None
                if any(own_tables[row] for row in rows):
                    views_of = [(texts[row], own_tables[row].get(name)) for row in rows]
                    if seat.teacher.overlaps:  # tables and tokenizers are for one thread
                        look_up(views_of)
                    going_on = [partial(teacher_going_on, *own) for own in views_of]
                scores = seat.teacher.start(*asked, going_on, with_hidden)
            readings.scores |= {row: (scores, place) for place, row in enumerate(rows)}
        if self.reference is not None:
            readings.reference = self._read_by_reference(rows, asked, readings.padding_rows, of_reference)
        return readings

    def _read_by_reference(
        self, rows: list[int], texts: tuple[list, list, list], padding_rows: set[int], foreseen: Foreseen | None
    ) -> Readings:
        """The scores of the reference teacher, of the `texts` of all rows."""
        own, asked = _readings(self._device, self.reference), [foreseen] if self.reference.remote else []
        own.padding_rows = padding_rows
        scores = self.reference.teacher.start(*texts, *asked)
        own.scores = {row: (scores, place) for place, row in enumerate(rows)}
        return own


class Foreseeing:
    """
    Texts of a step that servers score before all of them are known.

    Attributes: `texts`, of the teachers at servers, by name; `of_reference`, of the reference teacher if it is at one.
    """

    def __init__(self, panel: Panel, texts: dict[str, Foreseen], of_reference: Foreseen | None):
        self._panel, self.texts, self.of_reference = panel, texts, of_reference

    def add(self, prompt: Prompt, completion: list[int]):
        """Asks for a completion. A mixture's are asked for later, once it is known what of them is compared."""
        [own] = self._panel.pair([prompt], [completion])
        for foreseen in (None if own.parts else self.texts.get(prompt.teacher), self.of_reference):
            if foreseen is not None:
                foreseen.add(own.teacher_prompt_ids, own.teacher_ids, own.other_ends)

    def close(self):
        """Nothing of it is wanted any more."""
        for foreseen in (*self.texts.values(), self.of_reference):
            if foreseen is not None:
                foreseen.close()


def _rows(args: CrossTokenizerGKDConfig, prompts: int) -> int:
    """Completions in a teacher's forward pass."""
    return args.teacher_batch_size or prompts * args.num_generations


def _local_teacher(model: PreTrainedModel, accelerator, args: CrossTokenizerGKDConfig) -> LocalTeacher:
    rows = _rows(args, args.per_device_train_batch_size)
    overlap = False if args.torch_compile else args.teacher_overlap  # see the config's check
    return LocalTeacher(model, accelerator, args.temperature, rows, overlap)


def _at_once(seat: Seat | ReferenceSeat) -> bool:
    """Whether the scores are there when the teacher has been asked."""
    return not seat.remote and not seat.teacher.overlaps


def _readings(device: torch.device, *seats: Seat | ReferenceSeat) -> Readings:
    return Readings(device, any(seat.remote for seat in seats), not all(map(_at_once, seats)))


def _connect(urls: Sequence[str], model: str | None, args: CrossTokenizerGKDConfig) -> RemoteTeacher:
    servers = _servers(urls, args)
    return RemoteTeacher(servers, args.teacher_server_model or model, unlisted=args.teacher_server_model is not None)


def _servers(urls: Sequence[str], args: CrossTokenizerGKDConfig) -> Servers:
    return Servers(
        urls,
        args.teacher_server_api_key_env,
        args.teacher_server_timeout,
        args.teacher_server_retries,
        args.teacher_server_concurrency,
        args.teacher_server_patience,
    )
