"""Preference records, disjoint portions, chat templates to ids, packing into micro-batches.

One row a prompt. A prompt x and its K distinct responses form a tree, laid out in one line:

    tokens     x x x x  a a a  b b        position of each token in its OWN sequence:
    position   0 1 2 3  4 5 6  4 5        b starts at 4 again, as if a were not there.
    sees                x+a    x+b        (the mask; model.py enforces it)

The log-probs are exactly those of the two sequences x+a and x+b, but x is computed once. Trees of
many prompts follow each other in one line of --tokens-per-forward tokens, with no padding at all.
And y, the fresh sample, is often chosen or rejected itself: a tree holds DISTINCT responses, and
the roles (chosen, rejected, sampled) are indices into them, so no text is ever computed twice.

Which token predicts which: the logits at position i are about token i + 1. The first token of every
response is predicted by the LAST PROMPT token, the others by the token before them.

Leaves files and their faults to harness/rows.py, models to model.py, sampling to sample.py, ranking
to rank.py, the loss to selm.py.
Test: pytest tests/test_data.py tests/test_templates.py.    Read next: model.py.

Legend: B prompts, K distinct responses of one, R responses of all, T tokens of a micro-batch,
N response tokens of a micro-batch.
"""

import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

# ----------------------------------------------------------------------------------------------
# 1. Preference records {"prompt_id", "prompt": messages, "data_chosen", "data_rejected"} (strings)
# ----------------------------------------------------------------------------------------------


def split_portions(records, portions, limit=None, seed=0):
    """`portions` disjoint lists of records, shuffled by `seed`: no two share a prompt.

    A prompt takes all its pairs along. Portions hold equally many records where whole prompts allow
    it, at most `limit` (what is over is left out), and so is what no portion has room for.
    """
    shuffled, groups = random.Random(seed).sample(records, len(records)), by_prompt(records)
    if len(groups) < portions:
        raise ValueError(f"{len(records)} preference rows of {len(groups)} prompts cannot be split "
                         f"into {portions} iterations")
    # A prompt waits where its first record fell. Were it where any of its records comes up first,
    # prompts with many pairs would crowd into the early portions.
    waiting = [key for record in shuffled if record is groups[key := prompt_key(record)][0]]
    share, limit, result = len(records) // portions, limit or len(records), []
    waiting.sort(key=lambda key: len(groups[key]) <= share)  # what exceeds a share has it alone
    for left in range(portions, 0, -1):
        room = min(share, sum(len(groups[key]) for key in waiting) // left)
        most = min(limit, len(waiting) - (left - 1))  # prompts: one at least for each that follows
        taken, size = set(), 0
        for key in waiting:
            if len(taken) < most and (not taken or size + len(groups[key]) <= room):
                taken.add(key)
                size += len(groups[key])
        waiting = [key for key in waiting if key not in taken]
        result.append([record for record in shuffled if prompt_key(record) in taken][:limit])
    return result


def hold_out(records, count, seed=0):
    """(training records, held-out records): `count` prompts, one record of each, as long as they
    take no more than a fifth of the records with them (a small file is mostly for training)."""
    shuffled, held_out, gone = random.Random(seed).sample(records, len(records)), [], 0
    for group in by_prompt(shuffled).values():
        if len(held_out) < count and gone + len(group) <= len(records) // 5:
            held_out.append(group[0])
            gone += len(group)
    return leave_out(shuffled, held_out), held_out


def leave_out(records, held_out):
    """The records whose prompt is not held out, whatever their ids say."""
    known = set(map(prompt_key, held_out))
    return [record for record in records if prompt_key(record) not in known]


def by_prompt(records):
    """{prompt_key: its records}, both in order of appearance."""
    groups = {}
    for record in records:
        groups.setdefault(prompt_key(record), []).append(record)
    return groups


def prompt_key(record):
    """Who says what, without outer spaces. NOT prompt_id: real files give one prompt many ids, and
    one id to all, and portions that are disjoint by id alone train twice on one prompt."""
    return tuple((turn["role"], turn["content"].strip()) for turn in record["prompt"])


# ----------------------------------------------------------------------------------------------
# 2. Text to ids and back: the chat template, read instead of assumed
# ----------------------------------------------------------------------------------------------


class ChatFormat:
    """Messages and responses -> ids, and ids -> what a judge reads, by one tokenizer's template.

    The template is read, never assumed. A response is what its own rendering of the finished
    conversation puts behind the rendering of the prompt, up to the end-of-turn token, once:

        prompt    <s>[INST] hi [/INST]
        finished  <s>[INST] hi [/INST] hello </s>      (Llama-2: both spaces are the template's)
        response                      ^^^^^^^^^^^      lead " ", answer, tail " ", end "</s>"

    The role's header (<|im_start|>assistant) belongs to the prompt: as a label it would cancel in
    DPO but not in the optimism term. ValueError, one line, for a template that works otherwise.

    end_id    the template's own end of turn (</s>, <|eot_id|>, <|im_end|>, ...): often NOT eos
    stop_ids  what ends a sampled response: end_id, eos, and `model_stop_ids` of generation_config
    bos_id    what texts begin with, or None; `cut` keeps it
    note      None, or what was done to make the template usable; the caller prints it
    """

    def __init__(self, tokenizer, model_stop_ids=()):
        self.tokenizer, self.switch, self.note = tokenizer, {}, None
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items()
                 if token.content.strip() not in ("", "<think>", "</think>")}  # "": runs of spaces
        self.marks = set(added)  # <|im_end|>, <|channel|>, ...
        self.hidden = {i for i, token in added.items() if token.special}
        try:
            self._read_template()
        except ValueError as reason:
            self.switch = {"enable_thinking": False}  # Qwen3's name for it, SmolLM3's and GLM's
            try:
                self._read_template()
            except ValueError:
                raise reason from None
            self.note = f"{str(reason).partition(';')[0]}: enable_thinking=False is set for it"
        self.stop_ids = {self.end_id, tokenizer.eos_token_id, *model_stop_ids} - {None}

    def prompt_ids(self, messages):
        return self.prompts_ids([messages])[0]

    def response_ids(self, messages, text):
        return self.responses_ids([(messages, text)])[0]

    def prompts_ids(self, conversations):
        """Message lists -> lists of ids, up to and including the assistant's header."""
        rows = self._tokenise([self._apply(messages, add_generation_prompt=True)
                               for messages in conversations])
        return [ids if ids[:1] == self.adds_bos else self.adds_bos + ids for ids in rows]

    def responses_ids(self, pairs):
        """(messages, response text) pairs -> lists of ids that end with the end token, once.

        DEVIATION: tokenised behind the prompt, which is then cut off, not by themselves.
        SentencePiece would otherwise put a space before the first word that the policy never
        samples there, and the data's responses would look unlikely for no reason.
        """
        rendered = [self.render(messages, text) for messages, text in pairs]
        prompts = list(dict.fromkeys(prompt for prompt, _ in rendered))
        prompts = dict(zip(prompts, self._tokenise(prompts)))
        finished = self._tokenise([prompt + response for prompt, response in rendered])
        return [ids[len(prompts[prompt]):] if ids[:len(prompts[prompt])] == prompts[prompt]
                else self._apart(response) for ids, (prompt, response) in zip(finished, rendered)]

    def _apart(self, response):
        """A token has grown over the border (the header ends with a newline and the text begins
        with one). The sampler sees the prompt's ids as they are, so the response needs ids of its
        own: behind a neighbour that does not merge with it, for SentencePiece's sake."""
        for neighbour in ("x", ":", self.end, ""):
            before, ids = self._tokenise([neighbour, neighbour + response])
            if ids[:len(before)] == before:
                return ids[len(before):]

    def _tokenise(self, texts):
        """Ids of many texts, nothing added: thousands a call, which is twice as fast as one."""
        return [ids for start in range(0, len(texts), 1000) for ids in self.tokenizer(
            texts[start:start + 1000], add_special_tokens=False)["input_ids"]]

    def text(self, ids):
        """What a judge reads of a response's ids, sampled or the data's, cut or whole: the answer
        without what the template puts around it, without special tokens, without a thought."""
        ended = bool(ids) and ids[-1] in self.stop_ids
        ids, n = list(ids[:-1] if ended else ids), len(self.channel)
        starts = [i + n for i in range(len(ids) - n + 1) if ids[i:i + n] == self.channel]
        if n and (starts or ids[:1] == self.channel[:1]):  # another channel only: no answer yet
            ids = ids[starts[-1]:] if starts else []
        text = self._decode(ids).removeprefix(self.lead_text)
        return strip_thought(text.removesuffix(self.tail) if ended else text)

    def _decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i not in self.hidden],
                                     clean_up_tokenization_spaces=False)

    def render(self, messages, text):
        """(prompt, response) as the template writes them. ValueError, which is about this row,
        where the template refuses the conversation or takes it apart."""
        prompt = self._apply(messages, add_generation_prompt=True)
        response = self._behind(prompt, messages, text) + self.added_end
        # A quoted end token ends the response too: the policy could say nothing behind it.
        at = response.find(self.end, len(self.lead) if response.startswith(self.lead) else 0)
        if at < 0:
            raise ValueError(f"the chat template does not close this answer with {self.end}")
        return prompt, response[:at + len(self.end)]

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
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, **self.switch, **more)
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
        lead_ids, after_ids, bare, ids = self._tokenise([self.lead, after, "x", prompt])
        end_ids = [i for i in after_ids if i in self.marks]
        if not end_ids and (after.strip() or self.tokenizer.eos_token_id is None):
            raise ValueError("the chat template does not close the assistant's turn with a special "
                             "token, and no response can end without; fix it with --chat-template")
        self.end_id = end_ids[0] if end_ids else self.tokenizer.eos_token_id
        self.end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        self.tail, self.added_end = after.partition(self.end)[0], "" if end_ids else self.end
        opening = [k for k, i in enumerate(lead_ids, 1) if i in self.marks]
        self.channel = lead_ids[:opening[-1]] if opening else []  # <|channel|>final<|message|>
        self.lead_text = self._decode(lead_ids)
        # Zephyr's template has no BOS, but its tokenizer begins every text with one: the authors'
        # code puts it before the prompt, and `apply_chat_template` alone never would.
        own = self.tokenizer("x")["input_ids"]
        self.adds_bos = own[:1] if own[:1] != bare[:1] else []
        bos = self.adds_bos or [i for i in ids[:1] if i == self.tokenizer.bos_token_id]
        self.bos_id = bos[0] if bos else None


def strip_thought(text):
    """The answer without <think>...</think>; "" where the first thought was never closed."""
    answer = re.sub(r"(\A\s*)?<think>.*?</think>\s*", "", text, flags=re.DOTALL)
    return "" if answer.lstrip().startswith("<think>") else answer


def cut(prompt_ids, responses, max_prompt_length, max_length, bos_id=None):
    """Prompts lose their left end but never their BOS, responses their right end: (prompt ids, list
    of response ids). One rule for all responses of a prompt: more room for one would be a bias."""
    over = len(prompt_ids) - max_prompt_length
    if over > 0:
        bos = prompt_ids[:1] if prompt_ids[0] == bos_id else []
        prompt_ids = bos + prompt_ids[over + len(bos):]
    return prompt_ids, [ids[:max_length - len(prompt_ids)] for ids in responses]


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a hub id, folder or .gguf file; `chat_template`: a Jinja file that replaces
    the tokenizer's own. ValueError where there is no chat template at all."""
    path = str(path)
    gguf = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.dirname(path) or "." if gguf else path, trust_remote_code=False, **gguf)
    except Exception as error:
        raise ValueError(f"--model {path}: no tokenizer could be loaded "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {chat_template}: cannot be read "
                             f"({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    if not tokenizer.chat_template:
        raise ValueError(f"--model {path}: its tokenizer has no chat template; it may be a base "
                         "model. Pass one with --chat-template FILE (Jinja)")
    return tokenizer


# ----------------------------------------------------------------------------------------------
# 3. Trees, and packing them into micro-batches
# ----------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """A prompt, its distinct responses (ids), and who plays which role (indices into responses)."""
    prompt_ids: list
    responses: list
    chosen: int
    rejected: int
    sampled: list  # the fresh samples: several with --responses-per-prompt, none for plain DPO
    ref_logps: list = field(default_factory=list)  # one a response, nats, once they are known
    candidates: list = field(default_factory=list)  # the responses' places in pairs.jsonl's row
    prompt_id: str = ""

    @property
    def size(self):
        """What planning needs to know of a tree."""
        longest = len(self.prompt_ids) + max(map(len, self.responses))
        return Size(len(self.prompt_ids) + sum(map(len, self.responses)), len(self.responses),
                    longest)


class Size(NamedTuple):
    tokens: int  # of the tree in one line
    rows: int  # as plain rows: one a response,
    width: int  # of at most so many tokens


def make_tree(row, alpha, logps=None):
    """A row of pairs.jsonl (and the log-probs of its row in reference.jsonl) -> Tree. Only the
    candidates that the loss needs: plain DPO (alpha 0) needs y only where it won or lost."""
    sampled = row["sampled"] if alpha > 0 else []
    used = sorted({row["chosen"], row["rejected"], *sampled})
    return Tree(row["prompt_ids"], [row["candidates"][c]["ids"] for c in used],
                used.index(row["chosen"]), used.index(row["rejected"]),
                [used.index(c) for c in sampled], [logps[c] for c in used] if logps else [],
                used, row["prompt_id"])


@dataclass
class MicroBatch:
    """What one forward pass takes. `rows` is 1 for packed trees and R for plain padded rows."""
    input_ids: torch.Tensor  # (rows, T)
    position_ids: torch.Tensor  # (rows, T)
    attention_mask: torch.Tensor  # (rows, T) for plain rows; None for packed ones
    layout: list  # packed: a (prompt length, [response lengths]) a tree; plain: None
    predicted_from: torch.Tensor  # (N,) index into the rows * T hidden states
    targets: torch.Tensor  # (N,)
    response_index: torch.Tensor  # (N,) in [0, R)
    responses: int  # R

    def to(self, device):
        moved = {name: value.to(device) for name, value in vars(self).items()
                 if isinstance(value, torch.Tensor)}
        return MicroBatch(**{**vars(self), **moved})


@dataclass
class Batch:
    """The trees of one update: how many in all, and this process's micro-batches of indices."""
    examples: int
    micro_batches: list


def plan_updates(sizes, batching, seed, process=0, processes=1):
    """One epoch over trees of these Sizes, shuffled by seed -> the Batches of this process.

    batching: batch_size (trees an update, over all processes), tokens_per_forward, plain_rows. All
    processes get as many micro-batches an update (FSDP waits for everyone); missing ones are [].
    """
    order = random.Random(seed).sample(range(len(sizes)), len(sizes))
    batches = []
    for start in range(0, len(order), batching.batch_size):
        batch = order[start:start + batching.batch_size]
        shares = [batch[p::processes] for p in range(processes)]
        plans = [[[share[i] for i in group]
                  for group in plan_micro_batches([sizes[i] for i in share], batching)]
                 for share in shares]
        missing = max(map(len, plans)) - len(plans[process])
        batches.append(Batch(len(batch), plans[process] + [[]] * missing))
    return batches


def plan_micro_batches(sizes, batching):
    """Sizes of trees -> groups of indices, each within batching.tokens_per_forward; a tree that is
    larger travels alone. The order within a group does not matter to the result."""
    plan = plan_plain_rows if batching.plain_rows else plan_packed
    return plan(sizes, batching.tokens_per_forward)


def plan_packed(sizes, tokens_per_forward):
    """First-fit, longest first: the tokens of a group's trees add up to at most the budget."""
    groups, room = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i].tokens):
        for g, space in enumerate(room):
            if sizes[i].tokens <= space:
                break
        else:
            g = len(groups)
            groups.append([])
            room.append(tokens_per_forward)
        groups[g].append(i)
        room[g] -= sizes[i].tokens
    return groups


def plan_plain_rows(sizes, tokens_per_forward):
    """The same for padded rows: rows x widest row stays within the budget; sorted by width, so that
    neighbours are of like length and little is padding."""
    groups, rows = [], 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i].width):
        rows += sizes[i].rows
        # The first tree of a group is its widest.
        if not groups or rows * sizes[groups[-1][0]].width > tokens_per_forward:
            groups.append([])
            rows = sizes[i].rows
        groups[-1].append(i)
    return groups


def pack(trees):
    """Trees -> one packed MicroBatch (see the picture in the header); R counts over all trees."""
    ids, positions, layout, predicted_from, targets, response_index = [], [], [], [], [], []
    r = 0
    for tree in trees:
        prompt_start, p = len(ids), len(tree.prompt_ids)
        assert p > 0 and all(tree.responses), (
            "an empty prompt or response has nothing to predict from")
        layout.append((p, [len(response) for response in tree.responses]))
        ids += tree.prompt_ids
        positions += range(p)
        for response in tree.responses:
            start, n = len(ids), len(response)
            ids += response
            positions += range(p, p + n)
            predicted_from += [prompt_start + p - 1, *range(start, start + n - 1)]
            targets += response
            response_index += [r] * n
            r += 1
    tensors = map(torch.tensor, ([ids], [positions], predicted_from, targets, response_index))
    input_ids, position_ids, predicted_from, targets, response_index = tensors
    return MicroBatch(input_ids, position_ids, None, layout,
                      predicted_from, targets, response_index, r)


def pad(trees):
    """Trees -> plain MicroBatch: a row a response, right-padded. For --plain-rows and tests."""
    rows = [(tree.prompt_ids, response) for tree in trees for response in tree.responses]
    width = max(len(p) + len(r) for p, r in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    predicted_from, targets, response_index = [], [], []
    for i, (p, response) in enumerate(rows):
        length = len(p) + len(response)
        input_ids[i, :length] = torch.tensor(p + response)
        attention_mask[i, :length] = 1
        predicted_from += range(i * width + len(p) - 1, i * width + length - 1)
        targets += response
        response_index += [i] * len(response)
    position_ids = torch.arange(width).expand(len(rows), -1)
    return MicroBatch(input_ids, position_ids, attention_mask, None, torch.tensor(predicted_from),
                      torch.tensor(targets), torch.tensor(response_index), len(rows))
