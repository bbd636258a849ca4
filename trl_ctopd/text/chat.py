"""One model's side of every conversation: its prompts, its references, and where its turns end.

- Each side renders a conversation with its own template, tools and kwargs (`template`).
- Only the prompt goes through a template, with probes in a completion's place (`turns`), so no reference answer can reach a
  prompt. A student writes on from its generation prompt. A teacher's turn is opened as its template opens a finished one.
- Without a template: `User:\\n...` turns joined by blank lines, open at `Assistant:\\n`.
- Markup that only one side knows is named by `unshared_markup`, for the caller to mask. It is never translated.

Left out: context lengths, truncation.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import GenerationConfig

from .aligner import continuations
from .calls import CallReader, find_reader
from .conversation import REASONING, SPEAKERS, Conversation, read_example
from .planning import lost_of
from .template import THINKING, Template
from .token_bytes import token_table
from .turns import (
    ANSWER,
    ANSWER_PROBE,
    CALL,
    CALLS,
    KINDS,
    RESULT_PROBE,
    REWRITES,
    THOUGHT,
    THOUGHT_PROBE,
    TOOLS,
    USER,
    Form,
    MarkupBeside,
    Turn,
    Unrenderable,
    find_turn,
    one_of,
    probe_message,
    shared_space,
)


__all__ = ["Conversation", "Opened", "Speaker", "plain_text", "read_example", "unshared_markup"]

# the usual names of the token between two texts of pretraining, which a chat model's generation config may leave out
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")

_MEANT = {**SPEAKERS, "developer": "system", "model": "assistant", "function": "tool"}  # by other names of roles

_THOUGHT_APART = "where the content begins with a thought, give that as `reasoning_content`"


@dataclass(frozen=True)
class Opened:
    """A prompt as ids, cut at three places.

    Attributes:
        ids: up to the end of the generation prompt, where a student begins to write.
        turn: how the template writes a turn in this conversation.
        stem: up to the turn's stem (see `turns`).
        plain: up to where the answer of a finished turn begins.
        is_simple: whether the template knows only turns of an answer and one token that ends it.
        is_text: whether the row is plain text, which no template writes.
        continues: whether what the model writes goes on from text: from a plain text, an answer that is begun, or a conversation as a model
            without a chat template reads it.
    """

    ids: list[int]
    turn: Turn
    stem: list[int]
    plain: list[int]
    is_simple: bool = True
    is_text: bool = False
    continues: bool = False


class Speaker(Template):
    """One model's side of every conversation."""

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids of the prompt, up to the end of the generation prompt.

        Raises `ValueError`, with the template's own message, where the template cannot render the conversation or leaves out a
        part of it.
        """
        if isinstance(conversation.prompt, str):
            ids = self._encode_plain(conversation.prompt)
        elif self.template:
            self._refuse_what_is_left_out(conversation)
            text = self._render(conversation.prompt, conversation, open_ended=True)
            self._refuse_lost_instructions(conversation.prompt, text)
            self._refuse_lost_messages(conversation)
            self._refuse_second_thought(conversation.begun, text)
            ids = self.encode(text)
        else:
            _ = self._writes_plain_turns
            ids = self._encode_plain(plain_text(conversation.prompt, conversation.tools))
        if not ids:
            raise ValueError(
                f"the prompt is empty and {self._name} writes no BOS, so there is nothing to go on from: leave such rows out "
                "(`dataset.filter`)"
            )
        return ids

    def blanks(self, conversation: Conversation) -> str:
        """The whitespace at the end of a prompt that ends in an answer which the assistant has begun; "" for other prompts."""
        if isinstance(conversation.prompt, str) or not (conversation.begun or "").strip():
            return ""
        if self.template:
            text = self._render(conversation.prompt, conversation, open_ended=True)
        else:
            text = plain_text(conversation.prompt, conversation.tools)
        return text[len(text.rstrip()) :]

    def opened(self, conversation: Conversation) -> Opened:
        """`prompt_ids`, and where the template opens a finished turn after the same messages."""
        ids = self.prompt_ids(conversation)
        if isinstance(conversation.prompt, str) or not self.template:
            return Opened(ids, Turn(), ids, ids, is_text=isinstance(conversation.prompt, str), continues=True)
        turn = self.turn(conversation)
        is_simple = turn.is_simple and not (turn.plain and len(self.end_ids(turn.plain)) > 1)
        if not turn.tail and not (turn.plain and turn.plain.opening):
            return Opened(ids, turn, ids, ids, is_simple, continues=bool(conversation.begun))
        prompt = self._render(conversation.prompt, conversation, open_ended=True)
        stem = prompt[: len(prompt) - len(turn.tail)]
        plain = stem + (turn.plain.opening if turn.plain else turn.tail)
        if turn.plain and self._space_is_the_answers(turn.plain):
            plain = plain.removesuffix(" ")
        return Opened(ids, turn, self.encode(stem), self._before_text(plain), is_simple)

    def turn(self, conversation: Conversation) -> Turn:
        """How the template writes a turn after the conversation's prompt. What was found after one short user turn is taken, if
        the template writes an answer after this prompt alike; else the probes are rendered after this prompt."""
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
        return _with_rewritten(self._find_turn(conversation, conversation.prompt), generic, prompt)

    def reference_ids(self, conversation: Conversation) -> list[int]:
        """The ids that this model would write for the reference, its turn's end included; see `reference`."""
        return self.reference(conversation)[1]

    def reference(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """The ids before the reference, and the ids of the reference as this model would write it, with the end of its turn.

        The ids before it are those of the prompt. Where a finished turn lacks what the generation prompt writes, they end at
        the turn's stem. Control strings in the reference are encoded as plain text. A plain-text row ends with the EOS token.

        Raises `ValueError` where the template leaves out a part of the reference, or where its writing of the reference does
        not go on from the prompt.
        """
        reference = conversation.reference
        if isinstance(reference, Mapping) and self.template:
            return self._rendered_reference(conversation)
        text = _content(reference) if isinstance(reference, Mapping) else reference
        text = text.removesuffix(self.tokenizer.eos_token or "")
        end = self.text_end if isinstance(conversation.prompt, str) else self.turn_end
        return self.prompt_ids(conversation), self.continuation_ids(text) + end

    def answer(self, turn: Turn, text: str, ended: bool) -> tuple[bool, list[int]]:
        """Whether a plain answer goes on from the generation prompt of `turn`, or else from its stem; and the ids that this model would
        write for one of this `text`, whose control strings are text, with the end of the turn if it has `ended`."""
        form = turn.plain
        opening, on_tail = form.opening, not turn.takes_back(form)
        if on_tail:
            opening = opening.removeprefix(turn.tail)
        if self._space_is_the_answers(form):
            opening = opening.removesuffix(" ")
        end = self.end_ids(form) if form.end else self.turn_end
        return on_tail, [*self.encode(opening), *self._answer_ids(form, text), *(end if ended else [])]

    def stop_ids(self, generation_config: GenerationConfig | None = None) -> list[int]:
        """All ids that end this model's turn: `eos_token_id` of tokenizer and generation config, and the last token of every
        end of a turn that the template writes. Empty where nothing ends a turn.
        """
        ids = getattr(generation_config, "eos_token_id", None)
        ids = list(ids) if isinstance(ids, list | tuple) else [ids]
        ids += [self.tokenizer.eos_token_id, *self._stops]
        return [token for token in dict.fromkeys(ids) if token is not None]

    @cached_property
    def turn_end(self) -> list[int]:
        """The ids that end an answer: what the template writes after it, up to its last control token.

        The EOS token where the template writes no control token there. Raises `ValueError` where there is no EOS token either.
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

    @cached_property
    def text_end(self) -> list[int]:
        """The id that ends a plain text: the EOS token, or the last id of a turn's end where there is none."""
        eos = self.tokenizer.eos_token_id
        return self.turn_end[-1:] if eos is None else [eos]

    def text_ends(self, stop_ids: Sequence[int]) -> list[int]:
        """All ids with which this model may end a plain text: `stop_ids`, and the control tokens that end a text of its
        pretraining."""
        special, vocabulary = token_table(self.tokenizer).special, self.tokenizer.get_vocab()
        named = [vocabulary[name] for name in _TEXT_ENDS if vocabulary.get(name) in special]
        return list(dict.fromkeys([*stop_ids, *named]))

    def end_ids(self, form: Form) -> list[int]:
        """The ids of a form's end."""
        return self._encode_after(ANSWER_PROBE, form.end)

    def takes(self) -> dict[str, bool]:
        """What a row may have, by name, and whether the template writes it."""
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
        self._refuse_several_calls(messages, "the prompt")
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
        if any(message.get(name) for message in messages for name in REASONING):
            _ = self._keeps_thoughts

    def _refuse_several_calls(self, messages: Sequence[Mapping], whose: str) -> None:
        if any(len(message.get("tool_calls") or ()) > 1 for message in messages) and self._loses_calls:
            raise Unrenderable(
                f"the chat template of {self._name} does not write all calls of a message, and {whose} has a message with several: give each "
                "call a message of its own, followed by its result, or leave such rows out"
            )

    def _refuse_lost_instructions(self, messages: Sequence[Mapping], text: str) -> None:
        """One system message before everything else, and no begun answer, is what `_takes_system` has tried."""
        said = [message["content"].strip() for message in messages if message["role"] == "system"]
        if len(said) == 1 and messages[0]["role"] == "system" and messages[-1]["role"] != "assistant":
            return
        if lost := [own for own in said if own not in text]:
            raise ValueError(
                f"the chat template of {self._name} leaves out the system message {lost[0][:60]!r} (roles "
                f"{[message['role'] for message in messages]}): it would read another conversation than the other model. Make one system "
                "message of all, at the beginning, or put the text into a user message"
            )

    def _refuse_lost_messages(self, conversation: Conversation) -> None:
        """A template may leave out a message whose role it does not know, or which it takes for an earlier thought (gpt-oss: what stands beside
        a call, once an answer has followed)."""
        for message in (conversation.prompt[place] for place in self._lost_places(conversation)):
            role, content = message["role"], message["content"]
            way = "leave such rows out"
            if role not in SPEAKERS.values():
                way = f"rename it to {_MEANT.get(role.lower(), 'user')!r}"
            elif role == "assistant":
                way = "give it as `reasoning_content`, if it is a thought, or leave such rows out"
            raise ValueError(
                f"the chat template of {self._name} leaves out the message of role {role!r}, {content[:60]!r} (roles "
                f"{[own['role'] for own in conversation.prompt]}): it would read another conversation than the other model. For this "
                f"message, {way}"
            )

    def _lost_places(self, conversation: Conversation) -> list[int]:
        """Which of the prompt's messages, but those of the system, are in no rendering. Found with probes as their content, once for all
        conversations with the same roles, since a template may change what it is given."""
        messages, tools, kwargs = conversation.prompt, bool(conversation.tools), conversation.chat_template_kwargs
        shapes = [
            [one["role"], len(one.get("tool_calls") or ()), sorted(key for key in one if one[key])] for one in messages
        ]
        key = json.dumps([shapes, tools, kwargs], sort_keys=True, default=repr)
        if key not in self._lost:
            probes = [f"qzmessage{place}zq" for place in range(len(messages))]
            probed = [
                {**one, "content": probe} if one.get("content") else one
                for one, probe in zip(messages, probes, strict=True)
            ]
            try:
                text = self._render(probed, conversation, open_ended=True)
            except Unrenderable:  # of a template that reads the content
                text = " ".join(probes)
            self._lost[key] = [
                place
                for place, (one, probe) in enumerate(zip(messages, probes, strict=True))
                if one.get("content") and one["role"] != "system" and probe not in text
            ]
        return self._lost[key]

    @cached_property
    def _lost(self) -> dict[str, list[int]]:
        """What `_lost_places` has found so far."""
        return {}

    def _refuse_second_thought(self, begun: str | None, text: str) -> None:
        """A template that writes an empty thought before every answer writes one before a thought that has been begun in the content, too
        (findings/begun_thoughts_follow_a_closed_one.sh)."""
        opening = re.match(r"\s*([<\[])([^<>\[\]/]+)[>\]]", begun or "")
        if opening is None:
            return
        before = text[: max(text.rfind(begun.strip()), 0)].rstrip()
        if re.search(rf"[<\[]/{re.escape(opening[2])}[>\]]$", before):
            raise ValueError(
                f"its prompt ends in an assistant message that begins with {opening[0].strip()!r}, and the chat template of {self._name} writes "
                "an empty one before it, so that the model would continue a second one: end the prompt with the user's message, or give it as text "
                "that is rendered already"
            )

    @cached_property
    def _writes_plain_turns(self) -> bool:
        warnings.warn(
            f"{self._name} has no chat template: it reads conversations as text, {plain_text([USER])!r}, and a student learns to answer "
            "that. To train another format, set `tokenizer.chat_template`, or `chat_template_path` for the student",
            stacklevel=2,
        )
        return True

    # Turns

    @cached_property
    def _turns(self) -> dict[tuple[str, bool], Turn]:
        """What `_turn_after` has found so far."""
        return {}

    def write_calls(self, kinds: tuple[str, ...], calls: Sequence[Mapping]) -> str:
        """The template's text for `calls`, the last section of a turn of `kinds`: from the end of the section before them, or
        from the turn's stem, up to the end of the turn.

        Raises `Unrenderable` where the template writes no such turn.
        """
        asked = Conversation([USER], None, TOOLS)
        turn = self._turn_after(asked)
        if kinds not in turn.forms:
            if kinds[0] == THOUGHT and kinds[1:] in turn.forms:  # a row's own settings open the thought
                return self.write_calls(kinds[1:], calls)
            raise Unrenderable(turn.missing.get(kinds, "leaves out calls of tools"))
        form = turn.forms[kinds]
        if form.inferred:  # as without the thought, which no rendering shows
            return self.write_calls(kinds[1:], calls)
        text = self._render([USER, {**probe_message(kinds, CALL), "tool_calls": list(calls)}], asked)
        before = {THOUGHT: THOUGHT_PROBE, ANSWER: ANSWER_PROBE}.get(kinds[-2]) if len(kinds) > 1 else None
        if before is None:
            prompt = self._render([USER], asked, open_ended=True)
            start = len(prompt) - len(turn.tail)
        else:
            start = text.rindex(before) + len(before)
        end = form.unwritten if form.end else self.tokenizer.eos_token or ""
        return text[start : len(text) - len(form.rest or "")] + end

    def calls_text(self, calls: Sequence[Mapping]) -> str:
        """`write_calls` from the first call's name on.

        Raises `Unrenderable` where the template writes no calls, or does not open these as others.
        """
        turn = self._turn_after(Conversation([USER], None, TOOLS))
        kinds = next((kind for kind in sorted(turn.forms, key=len) if kind[-1] == CALLS), (CALLS,))
        text, opening = self.write_calls(kinds, calls), turn.forms[kinds].literals[-2]
        if not text.startswith(opening):
            raise Unrenderable(
                f"the chat template of {self._name} opens a call of {calls[0]} otherwise than of other tools"
            )
        return text.removeprefix(opening)

    def after_calls(self, conversation: Conversation) -> list[int]:
        """The ids from the end of the last calls to the end of the prompt, of a conversation that ends with results of tools.

        Raises `Unrenderable` where they cannot be told apart.
        """
        messages = conversation.prompt
        last = max(n for n, message in enumerate(messages) if message.get("tool_calls"))
        self._refuse_several_calls([messages[last]], "the text")
        calls = self.calls_text(messages[last]["tool_calls"])
        probed = [*messages[: last + 1], *({**one, "content": RESULT_PROBE} for one in messages[last + 1 :])]
        text, other = (self._render(turns, conversation, open_ended=True) for turns in (messages, probed))
        at = other.rfind(calls) + len(calls)
        if at < len(calls) or text[:at] != other[:at]:
            raise Unrenderable(f"the chat template of {self._name} writes calls otherwise where results follow")
        return self._encode_after(text[:at], text[at:])

    @cached_property
    def call_reader(self) -> CallReader | None:
        """Reads calls out of this model's text. None where its template writes no calls, or where its way of writing them is
        not understood."""
        if self._call_style is None:
            return None
        return find_reader(lambda calls: self.write_calls((CALLS,), calls))

    @cached_property
    def _known_turn(self) -> Turn:
        """How the template writes a turn without tools, or with some where it refuses to render without."""
        return self._turn_after(Conversation([USER]))

    @cached_property
    def _stops(self) -> list[int]:
        """The last token of each end. One that also closes a thought is left out, if another token ends a turn."""
        if not self.template:
            return []
        turns = self.known_turns
        if turns[0].plain is None:
            _ = self.turn_end  # says why
        forms = [form for turn in turns for form in turn.forms.values() if form.end]
        closing = [form.literals[1] for form in forms if form.sections[0] == THOUGHT]
        within = {token for literal in closing for token in self.encode(literal)}
        stops = list(dict.fromkeys(self.end_ids(form)[-1] for form in forms))
        alone = [token for token in stops if token not in within]
        eos = self.tokenizer.eos_token_id
        return alone if alone or (eos is not None and eos not in within) else stops

    @cached_property
    def turn_markup(self) -> set[int]:
        """The control tokens and other added tokens with which the template writes what stands before, between and after the sections
        of a turn, its stop tokens included."""
        literals = {literal for turn in self.known_turns for form in turn.forms.values() for literal in form.literals}
        tags = {token for token, name in self._plain_added.items() if name in THINKING and name in self.template}
        return {token for literal in literals for token in self.encode(literal)} & self._added | tags

    @cached_property
    def known_turns(self) -> tuple[Turn, Turn]:
        """How the template writes a turn without tools, and with some; without forms where there is no template."""
        if not self.template:
            return Turn(), Turn()
        return self._known_turn, self._turn_with_tools(Conversation([USER])) or self._known_turn

    @cached_property
    def _added(self) -> set[int]:
        return {*token_table(self.tokenizer).special, *self._plain_added}

    def before_markup(self, literal: str) -> tuple[str, int | None]:
        """What stands before the first control or other added token of a literal, and this token; None for none. "" is the end of a turn."""
        text = self._added_names.split(literal, maxsplit=1)[0] if self._added_names else literal
        ids = self.encode(literal.removeprefix(text)) if literal else self.turn_end
        return text, ids[0] if ids and ids[0] in self._added else None

    def cut(self, literal: str) -> list[str]:
        """A literal cut at its control and other added tokens."""
        names = self._added_names
        return [part for part in re.split(f"({names.pattern})", literal) if part] if names else [literal]

    @cached_property
    def _added_names(self) -> re.Pattern | None:
        return one_of(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self._added))))

    def _turn_after(self, conversation: Conversation) -> Turn:
        """How the template writes a turn after one short user turn, with the conversation's kwargs, and with tools if it has
        some."""
        tools = bool(conversation.tools) or self.needs_tools
        key = json.dumps(conversation.chat_template_kwargs, sort_keys=True, default=repr), tools
        if key not in self._turns:
            asked = Conversation([USER], None, TOOLS if tools else None, conversation.chat_template_kwargs)
            self._turns[key] = self._find_turn(asked, [USER])
        return self._turns[key]

    def _turn_with_tools(self, conversation: Conversation) -> Turn | None:
        """`_turn_after` as if the conversation had tools; None where the template writes no calls, or fails at tools."""
        if self._call_style is None:
            return None
        try:
            return self._turn_after(replace(conversation, tools=TOOLS))
        except Unrenderable:
            return None

    def _find_turn(self, conversation: Conversation, messages: list[dict]) -> Turn:
        kinds = [kind for kind in KINDS if CALLS not in kind or (conversation.tools and self._call_style is not None)]
        turn = find_turn(
            lambda turns, open_ended=False: self._render(turns, conversation, open_ended),
            messages,
            self.controls,
            kinds=kinds,
        )
        prompt = self._render(messages, conversation, open_ended=True)
        turn = self._with_prefilled_thought(turn, prompt)
        if turn.plain is None or any(kind[0] == THOUGHT and CALLS not in kind for kind in turn.forms):
            return turn
        with_calls = turn if conversation.tools else self._turn_with_tools(conversation)
        return turn if with_calls is None else _with_thought_before_answer(turn, with_calls)

    def _with_prefilled_thought(self, turn: Turn, prompt: str) -> Turn:
        """Adds forms for thoughts where the generation prompt opens one with a tag (`<think>`) and the template leaves thoughts
        out of finished turns. The thought ends at the closing tag, which the template or the vocabulary has to have; then an
        answer or a call follows as without a thought. Where the opening tag has a line of its own the closing one has too, and an empty
        line follows, as in the templates that write both. Finished turns that begin with the closing tag, right after the opening one, are
        the same turns with an empty thought."""
        tag = re.search(r"([<\[])(\w+)([>\]])(\s*)$", prompt)
        if turn.plain is None or tag is None or any(THOUGHT in kind for kind in turn.forms):
            return turn
        close = f"{tag[1]}/{tag[2]}{tag[3]}"
        if close not in self.template and close not in self._plain_added.values() and close not in self.controls:
            return turn
        if tag[0] in turn.tail:
            closing = f"\n{close}\n\n" if "\n" in tag[4] else close
            between = {(ANSWER,): (turn.tail, closing, turn.plain.end)}
            calls = turn.forms.get((CALLS,))
            if calls and turn.takes_back(calls):
                between[(CALLS,)] = turn.tail, closing + calls.opening, calls.end
        else:
            closed = {kind: form for kind, form in turn.forms.items() if form.opening.startswith(close)}
            between = {kind: ("", *form.literals) for kind, form in closed.items()}
        forms = {
            (THOUGHT, *kind): replace(
                turn.forms[kind], sections=(THOUGHT, *kind), literals=literals, loose=True, inferred=True
            )
            for kind, literals in between.items()
        }
        return _with_forms(turn, forms)

    def _rendered_reference(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        reference = conversation.reference
        self._refuse_several_calls([reference], "the reference")
        opened = self.opened(conversation)
        sections = [THOUGHT] if any(reference.get(name) for name in REASONING) else []
        sections += [ANSWER] if reference.get("content") or not reference.get("tool_calls") else []
        sections += [CALLS] if reference.get("tool_calls") else []
        given = _content(reference).removesuffix(self.tokenizer.eos_token or "")
        if conversation.begun:
            if sections != [ANSWER]:
                raise ValueError(
                    "the prompt ends in an answer that is to be continued, and the reference has a thought or a call: give what is left of the "
                    "answer as `content` alone"
                )
            return opened.ids, self.answer(opened.turn, given, True)[1]
        if sections != [ANSWER]:
            self._refuse_control_strings(reference)
        form = self._form(conversation, opened.turn, tuple(sections), sorted(reference))
        prompt = self._render(conversation.prompt, conversation, open_ended=True)
        stem = prompt[: len(prompt) - len(opened.turn.tail)]
        text = self._render([*conversation.prompt, reference], conversation)
        rest = form.rest or ""
        if form.inferred:
            raise ValueError(
                f"the chat template of {self._name} leaves the thought out of a finished turn, and the reference has one: give "
                "the reference as `content` alone, or take a template that writes all of it"
            )
        if sections == [ANSWER] and not text.startswith(stem) and given.strip() in text:
            # it writes what comes before otherwise, once there is an answer (Mistral Nemo's system message)
            on_tail, ids = self.answer(opened.turn, given, True)
            return opened.ids if on_tail else opened.stem, ids
        if not text.startswith(stem + form.opening) or not text.endswith(rest):
            raise ValueError(
                f"the chat template of {self._name} writes a reference with {sorted(reference)} so that it does not go on from its "
                f"prompt: {_THOUGHT_APART if sections == [ANSWER] else 'give the reference as `content` alone'}"
            )
        text = text[len(stem) : len(text) - len(rest)]
        end, ids = [], []
        if sections == [ANSWER]:  # whose text may hold control strings
            answer = text.removeprefix(form.opening).removesuffix(form.end if form.rest is not None else "")
            answer = answer.removesuffix(self.tokenizer.eos_token or "")
            if given.strip() not in answer:
                raise ValueError(
                    f"the chat template of {self._name} leaves out a part of the reference's `content` ({given[:60]!r}): {_THOUGHT_APART}"
                )
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

    def _refuse_control_strings(self, reference: Mapping):
        """What a template writes of a thought or a call is encoded with its markup, where such a string would become a token."""
        calls = [call["function"] for call in reference.get("tool_calls") or ()]
        texts = [reference.get(name) or "" for name in ("content", *REASONING)]
        text = "".join([*texts, json.dumps(calls, ensure_ascii=False)])
        if found := sorted(name for name in self.controls if name in text):
            raise ValueError(
                f"the reference has a thought or a call, and its text holds {found[0]!r}, which the tokenizer of {self._name} would read as a "
                "control token: leave such rows out, or give the reference as `content` alone"
            )

    def _space_is_the_answers(self, form: Form) -> bool:
        """Whether a form's opening ends with a space, and the tokenizer puts that space before the answer itself."""
        return form.opening.endswith(" ") and token_table(self.tokenizer).prefix_space != "never"

    def _answer_ids(self, form: Form, answer: str) -> list[int]:
        return self._encode_text(answer) if self._space_is_the_answers(form) else self.continuation_ids(answer)

    def continuation_ids(self, text: str) -> list[int]:
        """The ids of a text that goes on from other text. Control strings in it are encoded as plain text."""
        [ids] = continuations(self.tokenizer, [text])
        return self._encode_text(text) if ids is None else ids

    @cached_property
    def continues(self) -> bool:
        """Whether an answer is encoded as the rest of the text that the template's opening begins; False where the tokenizer puts
        a space before the answer itself."""
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


def _with_thought_before_answer(turn: Turn, with_calls: Turn) -> Turn:
    """Adds the form of a thought and an answer where the template writes a thought before a call only (Gemma 4, which leaves it
    out of earlier turns): the thought as before a call, the answer as without a thought. `with_calls`: the same turn, with
    tools."""
    plain, thought, calls = turn.plain, with_calls.forms.get((THOUGHT, CALLS)), with_calls.forms.get((CALLS,))
    if not (thought and calls and plain) or thought.inferred or plain.opening or not calls.opening:
        return turn
    opening, between, _ = thought.literals
    close = between.removesuffix(calls.opening)
    if not opening or not close or close == between:
        return turn
    sections = (THOUGHT, ANSWER)
    form = replace(plain, sections=sections, literals=(opening, close, plain.end), inferred=True)
    return _with_forms(turn, {sections: form})


def _with_forms(turn: Turn, forms: Mapping[tuple[str, ...], Form]) -> Turn:
    missing = {kind: reason for kind, reason in turn.missing.items() if kind not in forms}
    return replace(turn, forms={**turn.forms, **forms}, missing=missing)


def beside_markup(student: Speaker, teacher: Speaker) -> tuple[MarkupBeside, MarkupBeside]:
    """For each side, the added tokens at which sections and turns end, and what the two sides write before them: a `<|end|>` stands in the
    place of the newline of `\n</think>`, which the other tokenizer may join with the text before, and `</think>` tells that this newline was
    no text. Where several forms differ, the shortest decides."""
    found = tuple(({}, {}) for _ in range(2))
    for ours, theirs in zip(student.known_turns, teacher.known_turns, strict=True):
        for kinds in sorted(ours.forms.keys() & theirs.forms.keys(), key=lambda kinds: (len(kinds), kinds)):
            for literal, their_literal in zip(
                ours.forms[kinds].literals[1:], theirs.forms[kinds].literals[1:], strict=True
            ):
                (own, token), (other, their_token) = (
                    student.before_markup(literal),
                    teacher.before_markup(their_literal),
                )
                shared = shared_space(own, other)
                own, other = own.removeprefix(shared), other.removeprefix(shared)
                for (joins, after), end, text, beside in (
                    (found[0], token, own, other),
                    (found[1], their_token, other, own),
                ):
                    if end is not None:
                        joins.setdefault(end, "" if text else beside)
                        after.setdefault(end, text)
    return tuple(MarkupBeside(*({i: text for i, text in kind.items() if text} for kind in side)) for side in found)


def masked_beginnings(
    student: Speaker,
    teacher: Speaker,
    masks: Callable[[str], bool],
    thoughts_are_text: bool = False,
    with_calls: bool = False,
) -> set[int]:
    """The student's tokens that may begin markup with text (the newline of `\n<tool_call>`) where it is masked: by `masks`, or before a
    section that the teacher's template has no place for; with `thoughts_are_text`, also after a thought of that kind. Whether such a token
    is scored depends on what follows it. `with_calls`: in rows with tools too."""
    texts: set[str] = set()
    for ours, theirs in zip(student.known_turns, teacher.known_turns, strict=True):
        for kinds, form in ours.forms.items():
            if CALLS in kinds and not with_calls:
                continue
            lost = lost_of(kinds, theirs)
            literals = [form.literals[0].removeprefix(ours.tail), *form.literals[1:-1]]
            for literal, before, kind in zip(literals, (None, *kinds[:-1]), kinds, strict=True):
                after_text = before in lost and thoughts_are_text
                if literal and (masks(literal) or after_text or (kind in lost and before not in lost)):
                    texts.add(student.before_markup(literal)[0])
    beginnings = tuple({text[:size].encode() for text in texts for size in range(1, len(text) + 1)})
    return {token for token, row in enumerate(token_table(student.tokenizer).rows) if row.endswith(beginnings)}


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


def _with_rewritten(turn: Turn, generic: Turn, prompt: str) -> Turn:
    """`turn`, with the forms of `generic` that no rendering after this prompt shows, since the finished turn changes what stands before it
    (gpt-oss leaves out an earlier thought once there is an answer)."""
    alike = turn.tail == generic.tail if turn.forms else prompt.endswith(generic.tail)
    lost = {kind: form for kind, form in generic.forms.items() if turn.missing.get(kind) == REWRITES}
    return _with_forms(replace(turn, tail=generic.tail), lost) if lost and alike else turn


def plain_text(messages: list[dict], tools: list[dict] | None = None) -> str:
    """A conversation as a model without a chat template reads it."""
    turns = [f"Tools:\n{json.dumps(tools, ensure_ascii=False)}"] if tools else []
    turns += [f"{message['role'].capitalize()}:\n{_content(message)}" for message in messages]
    return "\n\n".join(turns if messages[-1]["role"] == "assistant" else [*turns, "Assistant:\n"])


def _content(message: dict) -> str:
    text = [message["content"]] if "content" in message else []
    calls = [json.dumps(message["tool_calls"], ensure_ascii=False)] if message.get("tool_calls") else []
    return "\n".join(text + calls)
