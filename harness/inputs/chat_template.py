"""Text to ids and back, by the model's own chat template.

data.py and train_loop.py use one object, ChatFormat: it turns messages into ids, and ids into the
text that a judge reads. It handles or refuses what can go wrong between the two: a second BOS, a
header among the labels, a space that nobody wrote, an end token that is not eos.

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

# The name of this switch in the templates of Qwen3, SmolLM3 and GLM. The line changes nothing else
# in the rendering: Jinja removes its newline (trim_blocks).
NO_THINKING = "{% set enable_thinking = false %}\n"
HALF = re.compile(r"[\ud800-\udfff]")  # half of a character: JSON can hold it, a file cannot


class ChatFormat:
    """Messages and responses -> ids, and ids -> what a judge reads, by one tokenizer's template.

    The template is read, never assumed. It renders the finished conversation. The response is what
    follows the rendered prompt there, up to and including the end-of-turn token, once:

        prompt    <s>[INST] hi [/INST]
        finished  <s>[INST] hi [/INST] hello </s>      (Llama-2: both spaces are the template's)
        response                      ^^^^^^^^^^^      lead " ", answer, tail " ", end "</s>"

    The role's header (<|im_start|>assistant) belongs to the prompt: as a label it would cancel in
    DPO but not in the optimism term. ValueError, one line, for a template that works otherwise.

    end_id    the template's own end of turn (</s>, <|eot_id|>, <|im_end|>, ...), often not eos. If
              the template leaves it out, the token with which the model ends its turns
    stop_ids  what ends a sampled response: end_id, eos, and `model_stop_ids` of generation_config
    bos_id    the first token of all texts, or None; data.cut_prompt keeps it
    note      None, or what was done to make the template usable; the caller prints it
    own_template  the template before that
    today     the date for a template that writes one (Llama-3.2's). It is the same in all of a run:
              with another date, y would not be a sample of the policy that is trained
    """

    def __init__(self, tokenizer, model_stop_ids=(), today=None):
        self.tokenizer, self.note, self.own_template = tokenizer, None, tokenizer.chat_template
        self.model_stop_ids = set(model_stop_ids) - {None}
        # Before the first use of the backend: a tokenizer.json may ask for cut or padded texts, and
        # only a call of transformers' own undoes that.
        self.own_x = tokenizer("x")["input_ids"]
        self.backend = getattr(tokenizer, "backend_tokenizer", None)  # None: written in Python
        self.today = today or datetime.date.today()
        if "strftime_now" in tokenizer.chat_template:  # transformers asks the clock at each call
            chat_template_utils.datetime = SimpleNamespace(now=lambda: self.today)
        # Tokens that structure a chat: <|im_end|>, <|channel|>, ... Runs of spaces do not, and
        # strip_thought needs <think> as text.
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items()
                 if token.content.strip() not in ("", "<think>", "</think>")}
        self.marks = set(added)
        self.hidden = {i for i, token in added.items() if token.special}
        # A tokenizer first splits a text at these. The ids after one do not depend on the text
        # before it.
        self.cuts = {i: token.content for i, token in added.items() if not token.normalized}
        try:
            self._read_template()
        except ValueError as reason:
            # The switch goes into the template itself, which is saved with each policy. So a later
            # chat with that policy gets the prompts on which it was trained.
            tokenizer.chat_template = NO_THINKING + self.own_template
            try:
                self._read_template()
            except ValueError:
                tokenizer.chat_template = self.own_template
                raise reason from None
            self.note = (f"{str(reason).partition(';')[0]}: enable_thinking=False is set for it, "
                         "and in the templates of the saved policies")
        self.stop_ids = ({self.end_id, tokenizer.eos_token_id} | self.model_stop_ids) - {None}

    # --- Messages to ids --------------------------------------------------------------------------

    def prompt_ids(self, messages):
        return self.prompts_ids([messages])[0]

    def response_ids(self, messages, text):
        return self.encode([messages], [[text]])[1][0][0]

    def prompts_ids(self, conversations):
        return self.encode(conversations, [[]] * len(conversations))[0]

    def encode(self, conversations, answers):
        """B message lists and, for each, a list of texts that answer it -> ids of the B prompts, up
        to and including the assistant's header; and for each prompt the ids of its responses, which
        end with the end token, once.

        DEVIATION: a response is tokenised together with the end of its prompt, which is then
        removed. Alone, SentencePiece would put a space before its first word. The policy never
        samples that space, so the data's responses would look unlikely for no reason.
        """
        prompts = [self._apply(messages, add_generation_prompt=True) for messages in conversations]
        headers, responses = [], []
        for prompt, messages, texts in zip(prompts, conversations, answers, strict=True):
            for text in texts:
                headers.append(self._header(prompt))
                responses.append(self._response(prompt, messages, text))

        distinct = list(dict.fromkeys(headers))  # few: they end with the role
        ids_of_header = dict(zip(distinct, self._tokenise(distinct)))
        whole = [header + response for header, response in zip(headers, responses)]
        response_ids = []
        for header, response, ids in zip(headers, responses, self._tokenise(whole)):
            before = ids_of_header[header]
            if ids[:len(before)] == before:
                response_ids.append(ids[len(before):])
            else:
                response_ids.append(self._apart(response))

        prompt_ids = []
        for ids in self._tokenise(prompts):
            has_bos = ids[:1] == self.adds_bos
            prompt_ids.append(ids if has_bos else self.adds_bos + ids)
        remaining = map(self._until_stop, response_ids)
        return prompt_ids, [[next(remaining) for _ in texts] for texts in answers]

    def _until_stop(self, ids):
        """A response ends with the first stop token, as in sampling: the policy could say nothing
        after it. What the template puts before the answer may hold one (an empty analysis)."""
        before = len(self.channel) if ids[:len(self.channel)] == self.channel else 0
        ends = [place for place, i in enumerate(ids, 1) if place > before and i in self.stop_ids]
        return ids[:ends[0]] if ends else ids

    def _header(self, prompt):
        """The end of a prompt on which the ids of a response depend. It begins at the last token at
        which a tokenizer splits (<|im_start|> of ChatML, <|end_header_id|> of Llama-3, </s> of
        Zephyr)."""
        return prompt[max(0, prompt.rfind(self.cut)) if self.cut else 0:]

    def _apart(self, response):
        """Ids of a response whose first token would cover the end of the header too (for example
        where both have a newline). The sampler sees the prompt's ids unchanged, so the response
        needs separate ids. It is tokenised after a text with which it does not merge; SentencePiece
        needs one."""
        for neighbour in ("x", ":", self.end, ""):
            before, ids = self._tokenise([neighbour, neighbour + response])
            if ids[:len(before)] == before:
                return ids[len(before):]

    def _tokenise(self, texts):
        """Ids of many texts, without added tokens. Thousands a call are twice as fast as one a
        call, and without the offsets that transformers asks for it is a fifth faster."""
        parts = [texts[start:start + 1000] for start in range(0, len(texts), 1000)]
        if self.backend:
            return [row.ids for part in parts for row in self.backend.encode_batch_fast(
                part, add_special_tokens=False)]
        return [ids for part in parts
                for ids in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    # --- Ids to text ------------------------------------------------------------------------------

    def text(self, ids):
        return self.texts([ids])[0]

    def texts(self, responses):
        """The texts that a judge reads, of ids of responses: sampled or the data's, cut or whole.
        Without what the template puts around an answer, without special tokens or a thought."""
        responses = list(responses)
        ended = [bool(ids) and ids[-1] in self.stop_ids for ids in responses]
        answers = [self._answer(list(ids[:-1] if e else ids)) for ids, e in zip(responses, ended)]
        texts = [text.removeprefix(self.lead_text) for text in self._decode(answers)]
        return [strip_thought(text.removesuffix(self.tail) if e else text)
                for text, e in zip(texts, ended)]

    def _answer(self, ids):
        """What follows the last header of the answer's channel, if the template has channels."""
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
        # This is what transformers' decode calls. It also looks at the type of every id, which
        # takes longer than decoding.
        if self.backend:
            return self.backend.decode_batch(rows, skip_special_tokens=False)
        return [self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in rows]

    # --- What the template renders ----------------------------------------------------------------

    def render(self, messages, text):
        """(prompt, response) as the template writes them. ValueError, about this row, if the
        template refuses the conversation or changes it."""
        prompt = self._apply(messages, add_generation_prompt=True)
        return prompt, self._response(prompt, messages, text)

    def _response(self, prompt, messages, text):
        response = self._after(prompt, messages, text) + self.added_end
        # A quoted end token ends the response too: the policy could say nothing after it.
        lead = self.lead if response.startswith(self.lead) else ""
        end = response.find(self.end, len(lead))
        if end < 0:
            raise ValueError(f"the chat template does not close this answer with {self.end}")
        # A template is a program. It may treat long answers, or some words, in another way.
        rendered = strip_thought(response[len(lead):end].removesuffix(self.tail)).strip()
        answer = strip_thought(text.partition(self.end)[0]).strip()
        if rendered != answer:
            same = len(os.path.commonprefix([rendered, answer]))
            raise ValueError(
                "the chat template changes this answer; it has "
                f"{rendered[same:same + 20]!r} where the answer has {answer[same:same + 20]!r}. "
                "Fix it with --chat-template")
        return response[:end + len(self.end)]

    def _after(self, prompt, messages, text):
        """What follows the rendered prompt in the template's finished conversation."""
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
        except Exception as error:  # a template is a program: it may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the chat template refuses the conversation: {reason}") from None

    # --- Reading the template ---------------------------------------------------------------------

    def _read_template(self):
        """Renders one finished conversation, and learns from it what surrounds an answer."""
        question, answer = [{"role": "user", "content": "Question"}], "An answer, 42."
        prompt = self._apply(question, add_generation_prompt=True)
        if prompt.rfind("<think>") > prompt.rfind("</think>"):
            raise ValueError("the chat template's generation prompt opens a thought (<think>), "
                             "which the data's responses do not have; fix it with --chat-template")
        self.lead, found, after = self._after(prompt, question, answer).partition(answer)
        if not found:
            raise ValueError("the chat template does not show the assistant's answer; fix it with "
                             "--chat-template")
        self._read_lead()
        self._read_end(question, answer, after)
        self._read_prompt(prompt)

    def _read_lead(self):
        """channel: ids of the header of the answer's channel (<|channel|>final<|message|>), or [].
        lead_text: what a decoded response has before the answer."""
        [ids] = self._tokenise([self.lead])
        marks = [place for place, i in enumerate(ids) if i in self.marks]
        self.channel = ids[:marks[-1] + 1] if marks else []
        [self.lead_text] = self._decode([ids])

    def _read_end(self, question, answer, after):
        """end, end_id: the end of turn. tail: what the template writes between answer and end.
        added_end: what the template leaves out, up to and including the end, or ""."""
        self.added_end, self.end_id = "", self._first_mark(after)
        if self.end_id is None:
            self.added_end, self.end_id = self._end_left_out(question, answer, after)
        self.end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        self.tail = (after + self.added_end).partition(self.end)[0]

    def _read_prompt(self, prompt):
        """cut: the last token of a prompt at which a tokenizer splits, as text, or None. adds_bos:
        [the BOS that the prompt lacks], or []."""
        ids, bare_x = self._tokenise([prompt, "x"])
        cuts = [self.cuts[i] for i in ids if i in self.cuts and self.cuts[i] in prompt]
        self.cut = cuts[-1] if cuts else None
        # Zephyr's template has no BOS, but its tokenizer begins every text with one. The authors'
        # code puts it before the prompt; `apply_chat_template` alone would not.
        tokenizer_adds_it = self.own_x[:1] != bare_x[:1]
        self.adds_bos = self.own_x[:1] if tokenizer_adds_it else []
        if self.adds_bos:
            self.bos_id = self.adds_bos[0]
        elif ids[:1] == [self.tokenizer.bos_token_id]:
            self.bos_id = ids[0]
        else:
            self.bos_id = None

    def _first_mark(self, text):
        return next((i for i in self._tokenise([text])[0] if i in self.marks), None)

    def _end_left_out(self, question, answer, after):
        """(text up to and with it, id) of the end token that the template leaves out: the model's
        own. With another token the data's answers would end differently from sampled ones, and DPO
        would train the end token.

        A turn of GLM-4 ends where the next role begins: at <|user|>, a stop of generation_config.
        """
        eos, token = self.tokenizer.eos_token_id, self.tokenizer.convert_ids_to_tokens
        stops = {i for i in self.model_stop_ids if 0 <= i < len(self.tokenizer)}
        with suppress(ValueError):  # a template for one question only
            longer = self._apply([*question, {"role": "assistant", "content": answer}, *question])
            rest = longer.partition(answer)[2]
            end_id = self._first_mark(rest)
            if end_id in stops and rest.startswith(after):
                return rest[len(after):rest.index(token(end_id))] + token(end_id), end_id
        if after.strip() or eos is None:
            raise ValueError("the chat template does not close the assistant's turn with a special "
                             "token, so no response could end; fix it with --chat-template")
        if stops and eos not in stops:
            raise ValueError("the chat template does not close the assistant's turn, and the model "
                             f"ends its own with {' or '.join(map(token, sorted(stops)))}; write "
                             "that into the template, and pass it with --chat-template")
        return token(eos), eos


def strip_thought(text):
    """Without <think>...</think>; "" for a text that begins with a thought that is never closed."""
    if "<think>" not in text:
        return text
    # After the last </think> nothing can close. To search there for each <think> would take n^2.
    before, end, after = text.rpartition("</think>")
    answer = after.lstrip() if end else after
    spaces = after[:len(after) - len(answer)]
    answer = re.sub(r"(\A\s*)?<think>.*?</think>\s*", "", before + end + spaces,
                    flags=re.DOTALL) + answer
    return "" if answer.lstrip().startswith("<think>") else answer


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a hub id, folder or .gguf file. chat_template: a Jinja file in place of the
    tokenizer's own. ValueError if there is no chat template at all."""
    path = str(path)
    gguf = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.dirname(path) or "." if gguf else path, trust_remote_code=False, **gguf)
        tokenizer("x")  # at the first use some faults of tokenizer_config.json show
    except Exception as error:
        raise ValueError(f"--model {path}: no tokenizer could be loaded "
                         f"({type(error).__name__}: {one_line(error)})") from None
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    if isinstance(tokenizer.chat_template, dict):  # for tools, for retrieval, ...
        named = tokenizer.chat_template
        if named and "default" not in named:
            raise ValueError(f"--model {path}: its tokenizer has the chat templates "
                             f"{', '.join(named)}, and none is the default; save the right "
                             "one as a file and pass it with --chat-template FILE (Jinja)")
        tokenizer.chat_template = named.get("default")
    if not tokenizer.chat_template:
        raise ValueError(f"--model {path}: its tokenizer has no chat template; it may be a base "
                         "model. Pass one with --chat-template FILE (Jinja)")
    if not isinstance(tokenizer.chat_template, str) or HALF.search(tokenizer.chat_template):
        raise ValueError(f"--model {path}: the chat template of its tokenizer is not text; pass "
                         "the right one with --chat-template FILE (Jinja)")
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
