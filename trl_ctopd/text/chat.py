"""The same conversation rendered for two models, and where each one's turn ends.

- Only the prompt goes through a template, with probes in a completion's place (`turns`), so no reference answer can reach a
  prompt. A student writes on from its generation prompt; a teacher's turn is opened as its template opens a finished one.
- Each side uses its own template, tools and kwargs included, and is then encoded without special tokens: the template
  writes the BOS, if there is one. Plain text gets the tokenizer's own opening (BOS, [CLS]) once, and never its closing.
- A template that refuses `system`, or drops it in silence, gets the system text at the head of the first user turn.
- No template: `User:\\n...` turns joined by blank lines, open at `Assistant:\\n`.
- Markup that only one side knows is named by `unshared_markup`, for the caller to mask. It is never translated.

Left out: context lengths, truncation, images, several reference messages in one row.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .aligner import continuations
from .calls import CallReader, find_reader
from .token_bytes import token_table
from .turns import (
    ANSWER,
    ANSWER_PROBE,
    CALL,
    CALLS,
    KEY_PROBE,
    KINDS,
    NAME_PROBE,
    RESULT,
    RESULT_PROBE,
    THOUGHT,
    THOUGHT_PROBE,
    TOOLS,
    USER,
    VALUE_PROBE,
    Form,
    Turn,
    Unrenderable,
    find_turn,
    probe_message,
)


THINKING = ("<think>", "</think>")
_MESSAGES = ("prompt", "completion", "messages", "conversations", "teacher_prompt")  # columns that may hold messages
_SPEAKERS = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_OF_THE_LAST_CALL = ("truncation", "padding")  # what a tokenizer keeps of how it was called
_REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that transformers gives one another's value


def _with_thought(message: dict) -> dict:
    """Under the two names that templates read it by, as transformers does from 5.21 on."""
    thought = next(
        (message[name] for name in ("reasoning_content", "thinking", "reasoning") if message.get(name)), None
    )
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


@dataclass(frozen=True)
class Conversation:
    """One dataset row: what is asked and, off-policy, what to answer.

    `prompt` is text (standard) or messages (conversational). `reference` is text for the former, one assistant message
    for the latter, None for a prompt-only row. `teacher_prompt`, of the same kind as `prompt`, is what the teacher reads in its
    place, None where it reads the same.
    """

    prompt: str | list[dict]
    reference: str | dict | None = None
    tools: list[dict] | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    teacher_prompt: str | list[dict] | None = None

    @property
    def for_teacher(self) -> "Conversation":
        """As the teacher reads it."""
        if self.teacher_prompt is None:
            return self
        return replace(self, prompt=self.teacher_prompt, teacher_prompt=None)

    @property
    def for_student(self) -> "Conversation":
        """As the student reads it: nothing that is the teacher's alone."""
        return replace(self, teacher_prompt=None)


def read_example(example: Mapping) -> Conversation:
    """Reads a row of any TRL shape: `prompt`, `prompt` + `completion`, or `messages`; `tools`, `chat_template_kwargs`; and
    `teacher_prompt`, which the teacher reads in place of the prompt.

    The last message of `messages` is the reference if the assistant wrote it; a `prompt` that ends in an assistant
    message is continued. ShareGPT's `conversations`, and `from` and `value` in any column of messages, are read as TRL's
    `maybe_convert_to_chatml` converts them, with human for user and gpt for assistant. None is the same as absent, inside messages and tools too, where Arrow puts it.

    Raises `ValueError` for a row without exactly one of `prompt` and `messages`, for a malformed one, and for a `teacher_prompt`
    of another kind than the prompt.
    """
    row = {column: value for column, value in example.items() if value is not None}
    row = _as_messages(row)
    for column in ("prompt", "completion", "messages", "tools", "teacher_prompt"):
        _refuse_lone_surrogates(row.get(column), column)
    conversation = _read(row)
    if (teacher_prompt := row.get("teacher_prompt")) is None:
        return conversation
    return replace(conversation, teacher_prompt=_teacher_prompt(teacher_prompt, conversation.prompt))


def _read(row: dict) -> Conversation:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(
            f"a row needs either `prompt` or `messages`, and this one has the columns {sorted(row)}: rename or remove "
            "columns of the dataset (`dataset.rename_column`, `dataset.remove_columns`) so that one of the two is left"
        )
    rest = {
        "tools": _tools(row.get("tools")),
        "chat_template_kwargs": _without_none(row.get("chat_template_kwargs", {})),
    }
    if "messages" in row:
        *prompt, last = _messages(row["messages"], "messages")
        if last["role"] != "assistant":
            return Conversation([*prompt, last], **rest)
        if not prompt:
            raise ValueError("`messages` holds an assistant turn only: put the turn that it answers before it")
        return Conversation(prompt, last, **rest)
    if isinstance(row["prompt"], str):
        completion = row.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise ValueError(
                f"`prompt` is text and `completion` is {type(completion).__name__}: make both the same kind"
            )
        return Conversation(row["prompt"], completion, **rest)
    prompt = _messages(row["prompt"], "prompt")
    if "completion" not in row:
        return Conversation(prompt, **rest)
    completion = _messages(row["completion"], "completion")
    if [message["role"] for message in completion] != ["assistant"]:
        raise ValueError(
            "a conversational `completion` is one assistant message, and this one has the roles "
            f"{[message['role'] for message in completion]}: move the earlier turns to `prompt`"
        )
    return Conversation(prompt, completion[0], **rest)


@dataclass(frozen=True)
class Opened:
    """A prompt as ids, and the same turn opened otherwise than at the generation prompt.

    Attributes:
        ids: up to the generation prompt, after which a student writes.
        turn: what was found of the template for this conversation.
        stem: the ids up to the turn's stem.
        plain: the ids up to a finished turn's answer.
        is_simple: whether a turn is an answer and one token that ends it, and nothing else is known.
    """

    ids: list[int]
    turn: Turn
    stem: list[int]
    plain: list[int]
    is_simple: bool = True


class Speaker:
    """One model's side of every conversation: its tokenizer, its template, and the template's kwargs.

    `chat_template_kwargs` hold for all rows; a row's own override them, unless `own_kwargs_win`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict | None = None,
        own_kwargs_win: bool = False,
    ):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.own_kwargs_win = own_kwargs_win
        self._turns: dict[tuple[str, bool], Turn] = {}

    def __getstate__(self):
        # what a dataset's cache is keyed by, so without the properties worked out so far
        return {
            "tokenizer": self.tokenizer,
            "chat_template_kwargs": self.chat_template_kwargs,
            "own_kwargs_win": self.own_kwargs_win,
        }

    def __setstate__(self, state):
        self.__init__(**state)

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers and templates that render every conversation alike."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            made_of = [type(self.tokenizer).__name__, self.tokenizer.get_vocab()]
        else:
            made_of = {
                key: value for key, value in json.loads(backend.to_str()).items() if key not in _OF_THE_LAST_CALL
            }
        special = {name: token for name, token in self.tokenizer.special_tokens_map.items() if name != "pad_token"}
        template = [self.tokenizer.chat_template, self.chat_template_kwargs, self.own_kwargs_win]
        text = json.dumps([made_of, special, *template], sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids after which the completion starts.

        Raises `ValueError`, with the template's own message, where it cannot render the conversation or leaves out a part.
        """
        if isinstance(conversation.prompt, str):
            ids = self._encode_plain(conversation.prompt)
        elif self.template:
            self._refuse_what_is_left_out(conversation)
            ids = self._encode(self._render(conversation.prompt, conversation, open_ended=True))
        else:
            ids = self._encode_plain(_plain_text(conversation.prompt, conversation.tools))
        if not ids:
            raise ValueError(f"the prompt is empty and {self._name} writes no BOS, so there is nothing to go on from")
        return ids

    def opened(self, conversation: Conversation) -> Opened:
        """`prompt_ids`, and how the template opens a finished turn after the same messages."""
        ids = self.prompt_ids(conversation)
        if isinstance(conversation.prompt, str) or not self.template:
            return Opened(ids, Turn(), ids, ids)
        turn = self.turn(conversation)
        is_simple = turn.is_simple and not (turn.plain and len(self.end_ids(turn.plain)) > 1)
        if not turn.tail and not (turn.plain and turn.plain.opening):
            return Opened(ids, turn, ids, ids, is_simple)
        prompt = self._render(conversation.prompt, conversation, open_ended=True)
        stem = prompt[: len(prompt) - len(turn.tail)]
        plain = stem + (turn.plain.opening if turn.plain else turn.tail)
        if turn.plain and self._space_is_the_answers(turn.plain):
            plain = plain.removesuffix(" ")
        return Opened(ids, turn, self._encode(stem), self._before_text(plain), is_simple)

    def turn(self, conversation: Conversation) -> Turn:
        """How the template writes a turn after the conversation's prompt."""
        generic = self._turn_after(conversation)
        prompt = self._render(conversation.prompt, conversation, open_ended=True)
        if conversation.prompt[-1]["role"] == "assistant":  # its sections are open already
            plain = {(ANSWER,): Form((ANSWER,), ("", generic.plain.end))} if generic.plain else {}
            return Turn(forms=plain)
        answered = [*conversation.prompt, probe_message((ANSWER,), {})]
        try:
            text = self._render(answered, conversation)
        except Unrenderable:
            return generic
        start = len(prompt) - len(generic.tail)
        found = text.rfind(ANSWER_PROBE)
        alike = prompt.endswith(generic.tail) and text.startswith(prompt[:start])
        if generic.plain and alike and text[start:found] == generic.plain.opening:
            return generic
        return self._find_turn(conversation, conversation.prompt)

    def reference_ids(self, conversation: Conversation) -> list[int]:
        """The ids that this model would write for the reference, its turn's end included; see `reference`."""
        return self.reference(conversation)[1]

    def reference(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """The ids after which this model would have written the reference, and those that it would have written, its turn's
        end included. The former are those of the prompt, unless a finished turn takes back what the generation prompt
        wrote.

        Text is encoded with control strings as plain text. Raises `ValueError` where the template leaves out a part of the
        reference, or writes it so that it does not go on from the prompt.
        """
        reference = conversation.reference
        if isinstance(reference, Mapping) and self.template:
            return self._rendered_reference(conversation)
        text = _content(reference) if isinstance(reference, Mapping) else reference
        text = text.removesuffix(self.tokenizer.eos_token or "")
        return self.prompt_ids(conversation), self._encode_text(text) + self.turn_end

    def stop_ids(self, generation_config: GenerationConfig | None = None) -> list[int]:
        """All ids that end this model's turn: `eos_token_id` of both configurations, and the last of every kind of turn's
        end that the template writes. Empty where nothing does.
        """
        ids = getattr(generation_config, "eos_token_id", None)
        ids = list(ids) if isinstance(ids, list | tuple) else [ids]
        ids += [self.tokenizer.eos_token_id, *self._stops]
        return [token for token in dict.fromkeys(ids) if token is not None]

    @cached_property
    def turn_end(self) -> list[int]:
        """What the template writes after an answer, up to where its writer stops.

        The EOS token where no template writes a control token there. Raises `ValueError` without either.
        """
        if self.template:
            turn = self._known_turn
            if turn.plain is None:
                raise ValueError(
                    f"the chat template of {self._name} does not write the assistant's content: it "
                    f"{turn.missing[(ANSWER,)]}"
                )
            if turn.plain.end:
                return self.end_ids(turn.plain)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"{self._name} has no EOS token and no chat template that ends an assistant turn with a control "
                "token: set `tokenizer.eos_token`"
            )
        return [self.tokenizer.eos_token_id]

    def end_ids(self, form: Form) -> list[int]:
        """The ids of a form's end."""
        return self._encode_after(ANSWER_PROBE, form.end)

    @cached_property
    def control_ids(self) -> set[int]:
        """Special ids, and the other added tokens that the template writes around plain turns (`<｜User｜>`).

        Thinking tags are content and not among them.
        """
        ids = set(token_table(self.tokenizer).special)
        if self.template:
            for turns in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
                messages = self._styled([{"role": role, "content": ANSWER_PROBE} for role in turns])
                tools = TOOLS if self.needs_tools else None
                if text := self._tried(messages, tools=tools, add_generation_prompt=True):
                    ids |= set(self._encode(text)) & self._plain_added.keys()
                    break
        return ids - {token for token, content in self._plain_added.items() if content in THINKING}

    @cached_property
    def controls(self) -> set[str]:
        """The strings of `control_ids`."""
        return set(self.tokenizer.convert_ids_to_tokens(sorted(self.control_ids)))

    @cached_property
    def markup(self) -> set[str]:
        """Added tokens that are not special and that the template's source names, such as `<tool_call>`."""
        return {content for content in self._plain_added.values() if content in self.template}

    @cached_property
    def prefills_thinking(self) -> bool:
        """Whether the generation prompt ends inside an open `<think>`."""
        return bool(self.template) and re.search(r"<think>\s*$", self._render([USER], open_ended=True)) is not None

    @cached_property
    def template(self) -> str:
        """The source of the chat template, of all of them where there are several, "" where there is none."""
        template = self.chat_template_kwargs.get("chat_template") or self.tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, Mapping) else template

    @cached_property
    def _name(self) -> str:
        return f"{type(self.tokenizer).__name__} {self.tokenizer.name_or_path!r}"

    @cached_property
    def _plain_added(self) -> dict[int, str]:
        added, special = self.tokenizer.added_tokens_decoder, token_table(self.tokenizer).special
        return {
            token: str(content)
            for token, content in added.items()
            if token not in special and not str(content).isspace()
        }

    # What the template takes, found by trying

    @cached_property
    def _takes_system(self) -> bool:
        messages = self._styled([{"role": "system", "content": ANSWER_PROBE}, USER])
        tools = TOOLS if self.needs_tools else None
        try:
            if ANSWER_PROBE in self._apply(messages, tools=tools, add_generation_prompt=True):
                return True
            reason = "leaves it out"
        except (jinja2.TemplateError, TypeError) as refusal:
            reason = f"refuses it: {refusal}"
        warnings.warn(
            f"system text goes into the first user turn, because the chat template of {self._name} {reason}",
            stacklevel=2,
        )
        return False

    @cached_property
    def _takes_parts_alone(self) -> bool:
        """Whether content must be a list of parts (`[{"type": "text", ...}]`): as a plain string it gets lost."""
        parts = [{"role": "user", "content": [{"type": "text", "text": ANSWER_PROBE}]}]
        plain, listed = (self._tried(turn) for turn in ([{"role": "user", "content": ANSWER_PROBE}], parts))
        return ANSWER_PROBE not in plain and ANSWER_PROBE in listed

    @cached_property
    def needs_tools(self) -> bool:
        return not self._tried([USER]) and bool(self._tried([USER], tools=TOOLS))

    @cached_property
    def _call_style(self) -> tuple[bool, dict] | None:
        """How calls must be given: arguments as text or not, and what beside them. None where they get lost."""
        for beside in ({"content": ""}, {}):
            for as_text in (False, True):
                message = {"role": "assistant", **beside, "tool_calls": [_call_as(CALL, as_text)]}
                text = self._tried([USER, message], tools=TOOLS) or self._tried([USER, message])
                text = text[text.rfind(USER["content"]) :]
                quoted = f'\\"{KEY_PROBE}'
                if all(probe in text for probe in (NAME_PROBE, KEY_PROBE, VALUE_PROBE)) and quoted not in text:
                    return as_text, beside
        return None

    @cached_property
    def _takes_results(self) -> bool:
        for message in (probe_message((CALLS,), CALL), {"role": "assistant", "content": ANSWER_PROBE}):
            for tools in (TOOLS, None):
                if RESULT_PROBE in self._tried(self._styled([USER, message, RESULT]), tools=tools):
                    return True
        return False

    @cached_property
    def _takes_tools(self) -> bool:
        if NAME_PROBE in self._tried([USER], tools=TOOLS):
            return True
        warnings.warn(
            f"the chat template of {self._name} leaves out `tools`: this model is not shown them, and the other one may be",
            stacklevel=2,
        )
        return False

    @cached_property
    def _keeps_thoughts(self) -> bool:
        """Whether an earlier turn's reasoning is written."""
        turns = [USER, probe_message((THOUGHT, ANSWER), {}), USER]
        if THOUGHT_PROBE in self._tried(turns):
            return True
        warnings.warn(
            f"the chat template of {self._name} leaves out the reasoning of earlier turns: this model is not shown it, and the "
            "other one may be",
            stacklevel=2,
        )
        return False

    def takes(self) -> dict[str, bool]:
        """What the template writes of what a row may have, by name."""
        turn = self._turn_after(Conversation([USER], tools=TOOLS))
        return {
            "system text": self._takes_system,
            "tools": self._takes_tools,
            "calls of tools": self._call_style is not None,
            "an answer and calls in one turn": (ANSWER, CALLS) in turn.forms,
            "results of tools": self._takes_results,
            "reasoning of earlier turns": self._keeps_thoughts,
            "calls, read again from what it writes": self.call_reader is not None,
        }

    def _refuse_what_is_left_out(self, conversation: Conversation) -> None:
        messages = conversation.prompt
        called = [message for message in messages if message.get("tool_calls")]
        if called and self._call_style is None:
            raise ValueError(
                f"the chat template of {self._name} cannot render or leaves out calls of tools, and the prompt has some "
                f"(roles {[message['role'] for message in messages]}): it would read another conversation than the other "
                "model. Take a template that writes them (`chat_template` among its chat_template_kwargs), or leave such "
                "rows out"
            )
        if any(message["role"] == "tool" for message in messages) and not self._takes_results:
            raise ValueError(
                f"the chat template of {self._name} cannot render or leaves out the results of tools, and the prompt has some: "
                "it would read another conversation than the other model. Take a template that writes them, or leave such "
                "rows out"
            )
        if any(message.get("content") for message in called):
            turn = self._turn_after(replace(conversation, tools=conversation.tools or TOOLS))
            if reason := turn.missing.get((ANSWER, CALLS)):
                raise ValueError(
                    f"the chat template of {self._name} cannot write an answer and a call in one turn ({reason}), and the prompt "
                    "has such a turn: give them as two messages, or leave such rows out"
                )
        if conversation.tools:
            _ = self._takes_tools
        if any(message.get(name) for message in messages for name in _REASONING):
            _ = self._keeps_thoughts

    # Turns

    def write_calls(self, kinds: tuple[str, ...], calls: Sequence[Mapping]) -> str:
        """What the template writes for `calls` in a turn of these sections, the last of which they are: from where the section
        before them ends, or the turn's stem, up to the turn's end.

        Raises `Unrenderable` where it writes none.
        """
        asked = Conversation([USER], None, TOOLS)
        turn = self._turn_after(asked)
        if kinds not in turn.forms:
            raise Unrenderable(turn.missing.get(kinds, "leaves out calls of tools"))
        form = turn.forms[kinds]
        text = self._render([USER, {**probe_message(kinds, CALL), "tool_calls": list(calls)}], asked)
        before = {THOUGHT: THOUGHT_PROBE, ANSWER: ANSWER_PROBE}.get(kinds[-2]) if len(kinds) > 1 else None
        if before is None:
            prompt = self._render([USER], asked, open_ended=True)
            start = len(prompt) - len(turn.tail)
        else:
            start = text.rindex(before) + len(before)
        end = form.unwritten if form.end else self.tokenizer.eos_token or ""
        return text[start : len(text) - len(form.rest or "")] + end

    @cached_property
    def call_reader(self) -> CallReader | None:
        """Reads calls out of what this model writes, where they are the turn's only section; None where it writes none, or
        none that are understood."""
        if self._call_style is None:
            return None
        return find_reader(lambda calls: self.write_calls((CALLS,), calls))

    @cached_property
    def _known_turn(self) -> Turn:
        """Without tools, or with some where the template has to have them."""
        return self._turn_after(Conversation([USER]))

    @cached_property
    def _stops(self) -> list[int]:
        """The last of each end. A token that also closes a thought is none, where another one ends a turn."""
        if not self.template:
            return []
        turns = [self._known_turn]
        if self._call_style is not None:
            turns.append(self._turn_after(Conversation([USER], tools=TOOLS)))
        if turns[0].plain is None:
            _ = self.turn_end  # says why
        forms = [form for turn in turns for form in turn.forms.values() if form.end]
        closing = [form.literals[1] for form in forms if form.sections[0] == THOUGHT]
        within = {token for literal in closing for token in self._encode(literal)}
        stops = list(dict.fromkeys(self.end_ids(form)[-1] for form in forms))
        alone = [token for token in stops if token not in within]
        eos = self.tokenizer.eos_token_id
        return alone if alone or (eos is not None and eos not in within) else stops

    def _turn_after(self, conversation: Conversation) -> Turn:
        """What the template writes after a user's turn, with the conversation's kwargs and, if it has any, with tools."""
        tools = bool(conversation.tools) or self.needs_tools
        key = json.dumps(conversation.chat_template_kwargs, sort_keys=True, default=repr), tools
        if key not in self._turns:
            asked = Conversation([USER], None, TOOLS if tools else None, conversation.chat_template_kwargs)
            self._turns[key] = self._find_turn(asked, [USER])
        return self._turns[key]

    def _find_turn(self, conversation: Conversation, messages: list[dict]) -> Turn:
        kinds = [kind for kind in KINDS if CALLS not in kind or (conversation.tools and self._call_style is not None)]
        turn = find_turn(
            lambda turns, open_ended=False: self._render(turns, conversation, open_ended),
            messages,
            self.controls,
            kinds=kinds,
        )
        return self._with_prefilled_thought(turn)

    def _with_prefilled_thought(self, turn: Turn) -> Turn:
        """`turn` with a form for the thought that its generation prompt opens by a tag, where the template writes none: up to
        the closing tag, if the template or the vocabulary has it."""
        sections = (THOUGHT, ANSWER)
        tag = re.search(r"([<\[])(\w+)([>\]])\s*$", turn.tail)
        if turn.plain is None or tag is None or any(THOUGHT in kind for kind in turn.forms):
            return turn
        close = f"{tag[1]}/{tag[2]}{tag[3]}"
        if close not in self.template and close not in self._plain_added.values() and close not in self.controls:
            return turn
        form = Form(sections, (turn.tail, close, turn.plain.end), turn.plain.rest, turn.plain.unwritten, loose=True)
        missing = {kind: reason for kind, reason in turn.missing.items() if kind != sections}
        return Turn(turn.tail, {**turn.forms, sections: form}, missing)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _before_text(self, head: str) -> list[int]:
        """The ids of `head` where a word follows it, which may cut the whitespace at its end otherwise."""
        [word] = continuations(self.tokenizer, [ANSWER_PROBE])
        word = word or self._encode(ANSWER_PROBE)
        ids = self._encode(head + ANSWER_PROBE)
        return ids[: -len(word)] if ids[-len(word) :] == word else self._encode(head)

    def _encode_after(self, head: str, text: str) -> list[int]:
        """The ids of `text` where it follows `head`."""
        before, ids = self._encode(head), self._encode(head + text)
        return ids[len(before) :] if ids[: len(before)] == before else self._encode(text)

    def _encode_plain(self, text: str) -> list[int]:
        ids, opened = self._encode(text), self.tokenizer.encode(text)
        if not ids:
            return [token for token in opened[:1] if token == self.tokenizer.bos_token_id]
        return opened[: opened.index(ids[0])] + ids  # adds nothing where the text itself starts with the BOS

    def _render(self, messages: list[dict], conversation: Conversation | None = None, open_ended: bool = False) -> str:
        """`open_ended`: up to where the assistant goes on, in a new turn or in its own last one."""
        if any(message["role"] == "system" for message in messages) and not self._takes_system:
            messages = _fold_system(messages)
        goes_on = messages[-1]["role"] == "assistant"
        kwargs = {"add_generation_prompt": open_ended and not goes_on, "continue_final_message": open_ended and goes_on}
        if conversation:
            own = self.chat_template_kwargs if self.own_kwargs_win else {}
            kwargs |= {"tools": conversation.tools, **conversation.chat_template_kwargs, **own}
        elif self.needs_tools:
            kwargs["tools"] = TOOLS
        try:
            return self._apply(self._styled(messages), **kwargs)
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise Unrenderable(f"the chat template of {self._name} cannot render the roles {roles}: {error}") from error

    def _styled(self, messages: list[dict]) -> list[dict]:
        """Messages as the template takes them."""
        if any(message.get("tool_calls") for message in messages):
            as_text, beside = self._call_style or (False, {"content": ""})
            messages = [
                {
                    **{key: value for key, value in message.items() if key != "content" or value},
                    **({} if message.get("content") else beside),
                    "tool_calls": [_call_as(call, as_text) for call in message["tool_calls"]],
                }
                if message.get("tool_calls")
                else message
                for message in messages
            ]
        if self._takes_parts_alone:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        return messages

    def _tried(self, messages: list[dict], **kwargs) -> str:
        """What the template makes of messages as they are, "" where it refuses them."""
        try:
            return self._apply(messages, **kwargs)
        except (jinja2.TemplateError, TypeError):
            return ""

    def _apply(self, messages: list[dict], **kwargs) -> str:
        messages = [_with_thought(message) for message in messages]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **{**self.chat_template_kwargs, **kwargs})

    def _rendered_reference(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        reference = conversation.reference
        opened = self.opened(conversation)
        sections = [THOUGHT] if any(reference.get(name) for name in _REASONING) else []
        sections += [ANSWER] if reference.get("content") or not reference.get("tool_calls") else []
        sections += [CALLS] if reference.get("tool_calls") else []
        form = self._form(conversation, opened.turn, tuple(sections), sorted(reference))
        prompt = self._render(conversation.prompt, conversation, open_ended=True)
        stem = prompt[: len(prompt) - len(opened.turn.tail)]
        text = self._render([*conversation.prompt, reference], conversation)
        rest = form.rest or ""
        if not text.startswith(stem + form.opening) or not text.endswith(rest):
            raise ValueError(
                f"the chat template of {self._name} writes a reference with {sorted(reference)} so that "
                "it does not go on from its prompt: give the reference as `content` alone"
            )
        text = text[len(stem) : len(text) - len(rest)]
        end, ids = [], []
        if sections == [ANSWER]:  # whose text may hold control strings
            answer = text.removeprefix(form.opening).removesuffix(form.end if form.rest is not None else "")
            answer = answer.removesuffix(self.tokenizer.eos_token or "")
            text, ids = form.opening, self._answer_ids(form, answer)
            if self._space_is_the_answers(form):
                text = text.removesuffix(" ")
            end = self.end_ids(form) if form.end else self.turn_end
        elif not form.end:
            end = self.turn_end
        else:
            end = self._encode_after(ANSWER_PROBE, form.unwritten)
        tail, before = opened.turn.tail, opened.ids
        if sections == [ANSWER] and form.opening.startswith(tail):
            whole = self._encode_after(prompt, form.opening.removeprefix(tail) + answer)
            written = self._encode_after(prompt, form.opening.removeprefix(tail))
            if sum(i in self.control_ids for i in whole) == sum(i in self.control_ids for i in written):
                return before, whole + end
        if text.startswith(tail):
            text = text.removeprefix(tail)
        else:
            prompt, before = stem, opened.stem
        return before, self._encode_after(prompt, text) + ids + end

    def _space_is_the_answers(self, form: Form) -> bool:
        """Whether the last space of a form's opening is the one that the tokenizer puts before a text."""
        return form.opening.endswith(" ") and token_table(self.tokenizer).prefix_space != "never"

    def _answer_ids(self, form: Form, answer: str) -> list[int]:
        if self._space_is_the_answers(form):
            return self._encode_text(answer)
        [ids] = continuations(self.tokenizer, [answer])
        return self._encode_text(answer) if ids is None else ids

    @cached_property
    def continues(self) -> bool:
        """Whether an answer is encoded as the rest of a longer text: after this template's opening, and not after a space
        that the tokenizer brings."""
        return bool(self.template) and not (
            self._known_turn.plain and self._space_is_the_answers(self._known_turn.plain)
        )

    def _form(self, conversation: Conversation, turn: Turn, sections: tuple[str, ...], columns: list[str]) -> Form:
        if CALLS in sections and not conversation.tools:
            turn = self._find_turn(replace(conversation, tools=TOOLS), conversation.prompt)
        if sections in turn.forms:
            return turn.forms[sections]
        reason = turn.missing.get(sections) or "leaves out calls of tools"
        raise ValueError(
            f"the chat template of {self._name} cannot write a reference with {columns}: it {reason}; give the reference as "
            "`content` alone, or take a template that writes all of it"
        )


def unshared_markup(student: Speaker, teacher: Speaker) -> list[str]:
    """The strings to mask wherever a completion has them, sorted: markup that one side has no equivalent of.

    - Added tokens (not special) that one side's template names and that the other knows neither as an added token nor
      from its template.
    - Both thinking tags, where exactly one side's generation prompt opens `<think>`.
    """
    texts = set()
    for one, other in ((student, teacher), (teacher, student)):
        known = {str(content) for content in other.tokenizer.added_tokens_decoder.values()}
        texts |= {text for text in one.markup - known if text not in other.template}
    if student.prefills_thinking != teacher.prefills_thinking:
        texts.update(THINKING)
    return sorted(texts)


def _as_messages(row: dict) -> dict:
    """The row with ShareGPT's names of things replaced by OpenAI's."""
    lists = {column: value for column, value in row.items() if column in _MESSAGES and isinstance(value, list)}
    names = {name for value in lists.values() for message in value if isinstance(message, Mapping) for name in message}
    if "conversations" not in row and not names & {"from", "value"}:
        return row
    if others := sorted(row.keys() & {"conversations", "messages", "prompt"} if "conversations" in row else {})[1:]:
        raise ValueError(
            f"a row needs one of `conversations`, `messages` and `prompt`, and this one has {', '.join(others)} beside "
            "`conversations`: remove columns of the dataset (`dataset.remove_columns`)"
        )
    from trl.data_utils import maybe_convert_to_chatml  # a conversation in OpenAI's form needs no TRL

    # it changes messages in place, and knows TRL's columns alone
    copies = {column: [_with_known_speaker(message, column) for message in value] for column, value in lists.items()}
    converted = maybe_convert_to_chatml({**row, **copies})
    if "teacher_prompt" in copies:
        converted["teacher_prompt"] = maybe_convert_to_chatml({"prompt": copies["teacher_prompt"]})["prompt"]
    return converted


def _with_known_speaker(message, column: str):
    """A copy. TRL leaves the names of speakers to the template, which writes any, and then no answer is known as one."""
    if not isinstance(message, Mapping) or message.get("from") is None:
        return _without_none(message)
    speaker = message["from"]
    if speaker not in _SPEAKERS:
        raise ValueError(f"`{column}` holds a message `from` {speaker!r}: make it one of {', '.join(_SPEAKERS)}")
    return {**_without_none(message), "from": _SPEAKERS[speaker]}


def _teacher_prompt(value, prompt: str | list[dict]) -> str | list[dict]:
    if isinstance(value, str) != isinstance(prompt, str):
        kinds = ["text" if isinstance(one, str) else "messages" for one in (prompt, value)]
        raise ValueError(
            f"the prompt is {kinds[0]} and `teacher_prompt` is {kinds[1]}: make both the same kind. `teacher_prompt` is the whole "
            "of what the teacher reads before the answer, the question included"
        )
    if isinstance(value, str):
        return value
    messages = _messages(value, "teacher_prompt")
    begun = [own[-1].get("content", "") if own[-1]["role"] == "assistant" else None for own in (prompt, messages)]
    if begun[0] != begun[1]:
        said = ["no begun answer" if answer is None else f"the begun answer {answer!r}" for answer in begun]
        raise ValueError(
            f"the prompt ends with {said[0]} and `teacher_prompt` with {said[1]}: what the student writes has to go on from the "
            "same on both sides"
        )
    return messages


def _messages(value, column: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{column}` must be a list of at least one message, got {value!r}")
    return [_message(message, column) for message in value]


def _message(value, column: str) -> dict:
    if not isinstance(value, Mapping) or value.get("role") is None:
        raise ValueError(f"`{column}` must hold dicts with `role` and `content`, got {value!r}")
    message = _without_none(value)
    if isinstance(message.get("content"), list):
        parts = message["content"]
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        if strange := [part for part in parts if not isinstance(part, Mapping)]:
            raise ValueError(
                f"`{column}` holds content that is a list with {strange[0]!r} in it: make it one text, or a list of texts or of "
                "parts {'type': 'text', 'text': ...}"
            )
        if any(part.get("type") != "text" for part in parts):
            raise ValueError(
                f"`{column}` holds {[part.get('type') for part in parts]} content: only text can be distilled"
            )
        if strange := [part for part in parts if not isinstance(part.get("text"), str)]:
            raise ValueError(f"`{column}` holds a text part without `text`: {strange[0]!r}")
        message["content"] = "".join(part["text"] for part in parts)
    if not isinstance(message.get("content", ""), str):
        raise ValueError(
            f"`{column}` holds content of the type {type(message['content']).__name__}, {message['content']!r}: make it text"
        )
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], column)
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"`{column}` holds a {message['role']} message with neither `content` nor `tool_calls`")
    return message


def _calls(value, column: str) -> list[dict]:
    """Calls as OpenAI's API has them, but for the arguments, which are a dict however the row has them."""
    calls = _parsed(value, f"`tool_calls` in `{column}`")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"`tool_calls` in `{column}` must be a list of dicts, or the JSON text of one, got {value!r}")
    found = []
    for call in calls:
        function = dict(call["function"] if isinstance(call.get("function"), Mapping) else call)
        if not isinstance(function.get("name"), str):
            raise ValueError(f"`tool_calls` in `{column}` holds a call without a `name`: {call!r}")
        function["arguments"] = _parsed(
            function.get("arguments") or {}, f"`arguments` of {function['name']!r} in `{column}`"
        )
        if not isinstance(function["arguments"], Mapping):
            raise ValueError(
                f"`arguments` of {function['name']!r} in `{column}` must be a dict, or the JSON text of one, got "
                f"{function['arguments']!r}"
            )
        wrapped = isinstance(call.get("function"), Mapping)
        beside = dict(call) if wrapped else {key: call[key] for key in ("id", "type") if key in call}
        function = {key: value for key, value in function.items() if wrapped or key in ("name", "arguments")}
        found.append({"type": "function", **beside, "function": function})
    return found


def _parsed(value, what: str):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is text that is not JSON ({error}): {value!r}") from error


def _tools(value) -> list | None:
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"`tools` is text that is not JSON ({error}): {value!r}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` must be a list or the JSON text of one, got {value!r}")
    return _without_none(tools) or None  # Llama's template takes [] for tools


def _refuse_lone_surrogates(value, column: str):
    if isinstance(value, Mapping):
        for item in value.values():
            _refuse_lone_surrogates(item, column)
    elif isinstance(value, list):
        for item in value:
            _refuse_lone_surrogates(item, column)
    elif isinstance(value, str) and (found := _SURROGATE.search(value)):
        raise ValueError(
            f"`{column}` holds a lone surrogate (U+{ord(found[0]):04X} at character {found.start()}), which is half a character "
            "and has no bytes: decode the text with errors='replace'"
        )


def _without_none(value):
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _fold_system(messages: list[dict]) -> list[dict]:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    for n, message in enumerate(turns):
        if message["role"] == "user":
            return [*turns[:n], {**message, "content": f"{system}\n\n{message['content']}"}, *turns[n + 1 :]]
    return [{"role": "user", "content": system}, *turns]


def _plain_text(messages: list[dict], tools: list[dict] | None) -> str:
    turns = [f"Tools:\n{json.dumps(tools, ensure_ascii=False)}"] if tools else []
    turns += [f"{message['role'].capitalize()}:\n{_content(message)}" for message in messages]
    return "\n\n".join(turns if messages[-1]["role"] == "assistant" else [*turns, "Assistant:\n"])


def _content(message: dict) -> str:
    text = [message["content"]] if "content" in message else []
    calls = [json.dumps(message["tool_calls"], ensure_ascii=False)] if message.get("tool_calls") else []
    return "\n".join(text + calls)


def _call_as(call: Mapping, as_text: bool) -> dict:
    """The call with its arguments as JSON text, or as they are."""
    if not as_text:
        return dict(call)
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
