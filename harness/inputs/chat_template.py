"""Text to ids and back by a model's own chat template, which is read, never assumed.

data.py and train_loop.py see one object, ChatFormat: messages in, ids out; ids in, what a judge
reads out. What can be wrong between the two (a second BOS, a header among the labels, a space that
nobody says, an end token that is not eos) is settled or refused here.

Test: pytest tests/test_chat_template.py.
"""

import datetime
import os
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from harness.inputs.files import check_file
from harness.runs.exits import one_line

# Qwen3's name for it, SmolLM3's and GLM's. On a line of its own, whose newline Jinja takes off
# (trim_blocks), it leaves the rendering of what follows as it is.
NO_THINKING = "{% set enable_thinking = false %}\n"
HALF = re.compile(r"[\ud800-\udfff]")  # half of a character, which JSON can hold and a file cannot


class ChatFormat:
    """Messages and responses -> ids, and ids -> what a judge reads, by one tokenizer's template.

    The template is read, never assumed. A response is what its own rendering of the finished
    conversation puts behind the rendering of the prompt, up to the end-of-turn token, once:

        prompt    <s>[INST] hi [/INST]
        finished  <s>[INST] hi [/INST] hello </s>      (Llama-2: both spaces are the template's)
        response                      ^^^^^^^^^^^      lead " ", answer, tail " ", end "</s>"

    The role's header (<|im_start|>assistant) belongs to the prompt: as a label it would cancel in
    DPO but not in the optimism term. ValueError, one line, for a template that works otherwise.

    end_id    the template's own end of turn (</s>, <|eot_id|>, <|im_end|>, ...): often NOT eos. A
              template may leave it out; then it is what the model ends its own turns with
    stop_ids  what ends a sampled response: end_id, eos, and `model_stop_ids` of generation_config
    bos_id    what texts begin with, or None; data.cut_prompt keeps it
    note      None, or what was done to make the template usable; the caller prints it
    own_template  the template before that
    today     the date that a template writes which asks for one (Llama-3.2's). One for all of a
              run: behind another date y would be no sample of the policy that is trained
    """

    def __init__(self, tokenizer, model_stop_ids=(), today=None):
        self.tokenizer, self.note, self.own_template = tokenizer, None, tokenizer.chat_template
        self.model_stop_ids = set(model_stop_ids) - {None}
        # Before the first use of the backend: a tokenizer.json may say that texts are cut or
        # padded, and transformers' own call is what takes that back.
        self.own_x = tokenizer("x")["input_ids"]
        self.backend = getattr(tokenizer, "backend_tokenizer", None)  # None: written in Python
        self.today = today or datetime.date.today()
        if "strftime_now" in tokenizer.chat_template:  # transformers asks the clock at each call
            chat_template_utils.datetime = SimpleNamespace(now=lambda: self.today)
        # Tokens that shape a chat; not runs of spaces, nor <think>: strip_thought needs its text.
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items()
                 if token.content.strip() not in ("", "<think>", "</think>")}
        self.marks = set(added)  # <|im_end|>, <|channel|>, ...
        self.hidden = {i for i, token in added.items() if token.special}
        # A tokenizer takes a text apart at these before all else: what stands before one has no say
        # in the ids behind it.
        self.cuts = {i: token.content for i, token in added.items() if not token.normalized}
        try:
            self._read_template()
        except ValueError as reason:
            # In the template itself, which is saved with each policy: whoever chats with one later
            # gets the prompts that it was trained on.
            tokenizer.chat_template = NO_THINKING + self.own_template
            try:
                self._read_template()
            except ValueError:
                tokenizer.chat_template = self.own_template
                raise reason from None
            self.note = (f"{str(reason).partition(';')[0]}: enable_thinking=False is set for it, "
                         "and in the templates of the saved policies")
        self.stop_ids = ({self.end_id, tokenizer.eos_token_id} | self.model_stop_ids) - {None}

    def prompt_ids(self, messages):
        return self.prompts_ids([messages])[0]

    def response_ids(self, messages, text):
        return self.encode([messages], [[text]])[1][0][0]

    def prompts_ids(self, conversations):
        return self.encode(conversations, [[]] * len(conversations))[0]

    def encode(self, conversations, answers):
        """Message lists, and a list of texts that answer each -> lists of ids of the prompts, up to
        and including the assistant's header, and for each prompt lists of ids of its responses,
        which end with the end token, once.

        DEVIATION: responses are tokenised behind the prompt's end, which is then cut off, not by
        themselves.
        SentencePiece would otherwise put a space before the first word that the policy never
        samples there, and the data's responses would look unlikely for no reason.
        """
        prompts = [self._apply(messages, add_generation_prompt=True) for messages in conversations]
        rows = [(self._header(prompt), self._response(prompt, messages, text))
                for prompt, messages, texts in zip(prompts, conversations, answers, strict=True)
                for text in texts]
        headers = list(dict.fromkeys(header for header, _ in rows))
        headers = dict(zip(headers, self._tokenise(headers)))
        finished = self._tokenise([header + response for header, response in rows])
        responses = iter([
            ids[len(headers[header]):] if ids[:len(headers[header])] == headers[header]
            else self._apart(response) for ids, (header, response) in zip(finished, rows)])
        return ([ids if ids[:1] == self.adds_bos else self.adds_bos + ids
                 for ids in self._tokenise(prompts)],
                [[next(responses) for _ in texts] for texts in answers])

    def _header(self, prompt):
        """The end of a prompt, all that a response's ids depend on: from the last token on at which
        a tokenizer cuts (ChatML's <|im_start|>, Llama-3's <|end_header_id|>, Zephyr's </s>)."""
        return prompt[max(0, prompt.rfind(self.cut)) if self.cut else 0:]

    def _apart(self, response):
        """A token has grown over the border (the header ends with a newline and the text begins
        with one). The sampler sees the prompt's ids as they are, so the response needs ids of its
        own: behind a neighbour that does not merge with it, for SentencePiece's sake."""
        for neighbour in ("x", ":", self.end, ""):
            before, ids = self._tokenise([neighbour, neighbour + response])
            if ids[:len(before)] == before:
                return ids[len(before):]

    def _tokenise(self, texts):
        """Ids of many texts, nothing added: thousands a call, which is twice as fast as one; and
        what transformers calls, without the offsets that nobody asks for, a fifth faster."""
        parts = [texts[start:start + 1000] for start in range(0, len(texts), 1000)]
        if self.backend:
            return [row.ids for part in parts for row in self.backend.encode_batch_fast(
                part, add_special_tokens=False)]
        return [ids for part in parts
                for ids in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def text(self, ids):
        return self.texts([ids])[0]

    def texts(self, responses):
        """What a judge reads of responses' ids, sampled or the data's, cut or whole: the answer
        without what the template puts around it, without special tokens, without a thought."""
        responses = list(responses)
        ended = [bool(ids) and ids[-1] in self.stop_ids for ids in responses]
        answers = [self._answer(list(ids[:-1] if e else ids)) for ids, e in zip(responses, ended)]
        texts = [text.removeprefix(self.lead_text) for text in self._decode(answers)]
        return [strip_thought(text.removesuffix(self.tail) if e else text)
                for text, e in zip(texts, ended)]

    def _answer(self, ids):
        """What stands behind the last header of the answer's channel, if the template has one."""
        n = len(self.channel)
        if not n or self.channel[0] not in ids:
            return ids
        starts = [i + n for i in range(len(ids) - n + 1) if ids[i:i + n] == self.channel]
        if starts:
            return ids[starts[-1]:]
        return [] if ids[0] == self.channel[0] else ids  # another channel only: no answer yet

    def _decode(self, rows):
        rows = [ids if self.hidden.isdisjoint(ids) else [i for i in ids if i not in self.hidden]
                for ids in rows]
        # What transformers' decode calls, without its look at the type of every id, which takes
        # longer than to decode it.
        if self.backend:
            return self.backend.decode_batch(rows, skip_special_tokens=False)
        return [self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in rows]

    def render(self, messages, text):
        """(prompt, response) as the template writes them. ValueError, which is about this row,
        where the template refuses the conversation or takes it apart."""
        prompt = self._apply(messages, add_generation_prompt=True)
        return prompt, self._response(prompt, messages, text)

    def _response(self, prompt, messages, text):
        response = self._behind(prompt, messages, text) + self.added_end
        # A quoted end token ends the response too: the policy could say nothing behind it.
        lead = self.lead if response.startswith(self.lead) else ""
        at = response.find(self.end, len(lead))
        if at < 0:
            raise ValueError(f"the chat template does not close this answer with {self.end}")
        # A template is a program, and may treat long answers, or some words, in another way.
        said = strip_thought(response[len(lead):at].removesuffix(self.tail)).strip()
        told = strip_thought(text.partition(self.end)[0]).strip()
        if said != told:
            same = len(os.path.commonprefix([said, told]))
            raise ValueError(
                f"the chat template changes this answer; it has {said[same:same + 20]!r} where the "
                f"answer has {told[same:same + 20]!r}. Fix it with --chat-template")
        return response[:at + len(self.end)]

    def _behind(self, prompt, messages, text):
        """What the template's finished conversation has behind the rendered prompt."""
        finished = self._apply([*messages, {"role": "assistant", "content": text}])
        if not finished.startswith(prompt):
            same = len(os.path.commonprefix([finished, prompt]))
            raise ValueError(
                "the chat template's finished conversation does not begin with its own prompt: it "
                f"has {finished[same:same + 20]!r} where the prompt has "
                f"{prompt[same:same + 20]!r}; fix it with --chat-template")
        return finished[len(prompt):]

    def _apply(self, messages, **more):
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception as error:  # a template is a program: anything may go wrong in it
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the chat template refuses the conversation: {reason}") from None

    def _read_template(self):
        """Renders one finished conversation, and reads off it what stands around the answer."""
        question, answer = [{"role": "user", "content": "Question"}], "An answer, 42."
        prompt = self._apply(question, add_generation_prompt=True)
        if prompt.rfind("<think>") > prompt.rfind("</think>"):
            raise ValueError("the chat template's generation prompt opens a thought (<think>), "
                             "which the data's responses do not have; fix it with --chat-template")
        self.lead, found, after = self._behind(prompt, question, answer).partition(answer)
        if not found:
            raise ValueError("the chat template does not show the assistant's answer; fix it with "
                             "--chat-template")
        lead_ids, bare, ids = self._tokenise([self.lead, "x", prompt])
        self.added_end, self.end_id = "", self._first_mark(after)
        if self.end_id is None:
            self.added_end, self.end_id = self._end_left_out(question, answer, after)
        self.end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        self.tail = (after + self.added_end).partition(self.end)[0]
        opening = [k for k, i in enumerate(lead_ids, 1) if i in self.marks]
        self.channel = lead_ids[:opening[-1]] if opening else []  # <|channel|>final<|message|>
        [self.lead_text] = self._decode([lead_ids])
        cuts = [self.cuts[i] for i in ids if i in self.cuts and self.cuts[i] in prompt]
        self.cut = cuts[-1] if cuts else None
        # Zephyr's template has no BOS, but its tokenizer begins every text with one: the authors'
        # code puts it before the prompt, and `apply_chat_template` alone never would.
        self.adds_bos = self.own_x[:1] if self.own_x[:1] != bare[:1] else []
        bos = self.adds_bos or [i for i in ids[:1] if i == self.tokenizer.bos_token_id]
        self.bos_id = bos[0] if bos else None

    def _first_mark(self, text):
        return next((i for i in self._tokenise([text])[0] if i in self.marks), None)

    def _end_left_out(self, question, answer, after):
        """(text up to and with it, id) of the end token that the template leaves out: the model's
        own. With another one the data's answers would differ from sampled ones in it, and DPO would
        train the end token.

        GLM-4's turns end where the next role begins: <|user|>, which generation_config stops at.
        """
        eos, token = self.tokenizer.eos_token_id, self.tokenizer.convert_ids_to_tokens
        stops = {i for i in self.model_stop_ids if 0 <= i < len(self.tokenizer)}
        with suppress(ValueError):  # a template for one question only
            longer = self._apply([*question, {"role": "assistant", "content": answer}, *question])
            behind = longer.partition(answer)[2]
            end_id = self._first_mark(behind)
            if end_id in stops and behind.startswith(after):
                return behind[len(after):behind.index(token(end_id))] + token(end_id), end_id
        if after.strip() or eos is None:
            raise ValueError("the chat template does not close the assistant's turn with a special "
                             "token, and no response can end without; fix it with --chat-template")
        if stops and eos not in stops:
            raise ValueError("the chat template does not close the assistant's turn, and the model "
                             f"ends its own with {' or '.join(map(token, sorted(stops)))}; write "
                             "that into the template, and pass it with --chat-template")
        return token(eos), eos


def strip_thought(text):
    """Without <think>...</think>; "" for a text that begins with a thought that is never closed."""
    if "<think>" not in text:
        return text
    # Behind the last end nothing can close: to search there for each <think> would take n^2.
    before, end, behind = text.rpartition("</think>")
    answer = behind.lstrip() if end else behind
    spaces = behind[:len(behind) - len(answer)]
    answer = re.sub(r"(\A\s*)?<think>.*?</think>\s*", "", before + end + spaces,
                    flags=re.DOTALL) + answer
    return "" if answer.lstrip().startswith("<think>") else answer


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a hub id, folder or .gguf file; `chat_template`: a Jinja file that replaces
    the tokenizer's own. ValueError where there is no chat template at all."""
    path = str(path)
    gguf = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.dirname(path) or "." if gguf else path, trust_remote_code=False, **gguf)
        tokenizer("x")  # some faults of tokenizer_config.json show at the first use
    except Exception as error:
        raise ValueError(f"--model {path}: no tokenizer could be loaded "
                         f"({type(error).__name__}: {one_line(error)})") from None
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    if named := isinstance(tokenizer.chat_template, dict) and tokenizer.chat_template:
        # for tools, for retrieval, ...
        if "default" not in named:
            raise ValueError(f"--model {path}: its tokenizer has the chat templates "
                             f"{', '.join(named)}, and none is the default; save the one that is "
                             "meant as a file and pass it with --chat-template FILE (Jinja)")
        tokenizer.chat_template = named["default"]
    if not tokenizer.chat_template:
        raise ValueError(f"--model {path}: its tokenizer has no chat template; it may be a base "
                         "model. Pass one with --chat-template FILE (Jinja)")
    if not isinstance(tokenizer.chat_template, str) or HALF.search(tokenizer.chat_template):
        raise ValueError(f"--model {path}: the chat template of its tokenizer is no text; pass the "
                         "right one with --chat-template FILE (Jinja)")
    return tokenizer


def read_template(path):
    try:
        check_file("--chat-template", path)
        if Path(path).is_dir():
            raise ValueError(f"--chat-template {path}: no regular file; name a file (Jinja)")
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {path}: cannot be read "
                         f"({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
