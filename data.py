"""Preference records, chat rendering, tokenising, iteration portions, packing into micro-batches.

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

Leaves models to model.py, sampling to sample.py, ranking to rank.py, the loss to selm.py.
Test: pytest tests/test_data.py.    Read next: model.py.

Legend: B prompts, K distinct responses of one, R responses of all, T tokens of a micro-batch,
N response tokens of a micro-batch.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from harness.rundir import read_jsonl

# ----------------------------------------------------------------------------------------------
# 1. Preference records: {"prompt_id", "prompt": messages, "data_chosen", "data_rejected"}
# ----------------------------------------------------------------------------------------------


def parse_record(row, where):
    """One row in UltraFeedback-binarized format -> record; ValueError that says `where` and what.

    `prompt` is a string or a message list, `chosen` and `rejected` message lists that end with the
    assistant's turn (or plain strings). Only that last turn is the response: everything before it
    is prompt, so conversations may have many turns.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"{where}: no field '{name}' (need prompt, chosen, rejected; "
                             f"found {', '.join(sorted(row)) or 'none'})")
    responses, prompt = {}, None
    for name in ("chosen", "rejected"):
        turns = row[name]
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        if not (isinstance(turns, list) and turns and isinstance(turns[-1], dict)
                and turns[-1].get("role") == "assistant" and all(
                    isinstance(t, dict) and isinstance(t.get("content"), str) and t.get("role")
                    for t in turns)):
            raise ValueError(f"{where}: '{name}' must be a list of messages {{role, content}} that "
                             f"ends with the assistant's")
        responses[f"data_{name}"] = turns[-1]["content"]
        prompt = prompt or [{"role": t["role"], "content": t["content"]} for t in turns[:-1]]
    if not prompt:
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict)
            and prompt[-1].get("role") == "user"):
        raise ValueError(f"{where}: no field 'prompt' that is a string or messages ending with "
                         "the user's")
    prompt_id = row.get("prompt_id") or hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
    return {"prompt_id": str(prompt_id), "prompt": prompt, **responses}


def load_records(source, split="train_prefs"):
    """All records of a JSONL file, or of `split` of a data set on the hub. Errors: ValueError.

    Repeated prompt_ids are kept once: two portions that share a prompt would not be disjoint.
    """
    if str(source).endswith((".jsonl", ".json")) or Path(source).exists():
        if not Path(source).is_file():
            raise ValueError(f"--data {source}: no such file")
        records = [parse_record(row, f"{source}, line {number}")
                   for number, row in read_jsonl(source)]
    else:
        import datasets  # slow to import, and most runs do not need it
        try:
            rows = datasets.load_dataset(str(source), split=split)
        except Exception as error:  # the hub raises a dozen kinds; all mean the same to the user
            raise ValueError(f"--data {source}: neither a file here nor a data set that could be "
                             f"loaded from the hub ({type(error).__name__}: {error})") from None
        records = [parse_record(row, f"{source}[{split}], row {i}") for i, row in enumerate(rows)]
    if not records:
        raise ValueError(f"--data {source}: no preference rows in it")
    unique = {}
    for record in records:
        unique.setdefault(record["prompt_id"], record)
    if len(unique) < len(records):
        print(f"{source}: {len(records) - len(unique)} rows repeat a prompt and were left out")
    return list(unique.values())


def split_portions(records, portions, limit=None, seed=0):
    """`portions` disjoint lists of equal length (at most `limit` each), shuffled by `seed`."""
    size = min(len(records) // portions, limit or len(records))
    if size == 0:
        raise ValueError(f"{len(records)} preference rows cannot be split into {portions} "
                         "iterations")
    shuffled = random.Random(seed).sample(records, len(records))
    return [shuffled[i * size:(i + 1) * size] for i in range(portions)]


# ----------------------------------------------------------------------------------------------
# 2. Text to ids: the chat template, exactly one BOS, exactly one end of turn
# ----------------------------------------------------------------------------------------------


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a hub id, folder or .gguf file; `chat_template`: a Jinja file that replaces
    the tokenizer's own. ValueError where there is no chat template at all."""
    path = str(path)
    gguf = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.dirname(path) or "." if gguf else path, **gguf)
    except Exception as error:
        raise ValueError(f"--model {path}: no tokenizer could be loaded "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
    if chat_template:
        if not Path(chat_template).is_file():
            raise ValueError(f"--chat-template {chat_template}: no such file")
        tokenizer.chat_template = Path(chat_template).read_text()
    if not tokenizer.chat_template:
        raise ValueError(f"--model {path}: its tokenizer has no chat template; it may be a base "
                         "model. Pass one with --chat-template FILE (Jinja)")
    return tokenizer


class ChatFormat:
    """Turns message lists and responses into token ids under one tokenizer's chat template.

    end_id: the template's own end-of-turn token (</s>, <|eot_id|>, <|end|>, <|im_end|>, ...), found
    by rendering a finished conversation and reading what follows the answer. Often NOT eos_token.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        probe, answer = [{"role": "user", "content": "x"}], "QANSWERQ"
        finished = tokenizer.apply_chat_template(
            probe + [{"role": "assistant", "content": answer}], tokenize=False)
        after_answer = finished.partition(answer)[2].strip()
        end_ids = tokenizer(after_answer, add_special_tokens=False)["input_ids"]
        self.end_id = end_ids[0] if end_ids else tokenizer.eos_token_id
        if self.end_id is None or (end_ids and self.end_id not in tokenizer.all_special_ids
                                   and self.end_id not in tokenizer.added_tokens_decoder):
            raise ValueError("the chat template does not close the assistant's turn with a special "
                             "token, and without one no response can end; fix it with "
                             "--chat-template")
        self.lead = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
        self.lead_ids = tokenizer(self.lead, add_special_tokens=False)["input_ids"]

    @property
    def stop_ids(self):
        """Tokens that end a sampled response: end of turn, and end of text."""
        return {self.end_id, self.tokenizer.eos_token_id} - {None}

    def prompt_ids(self, messages):
        """Message list -> ids, up to and including the assistant's header.

        Straight to ids: rendering to text and tokenising that would add a second BOS. The header
        belongs to the prompt: as a label it would cancel in DPO but not in the optimism term.
        """
        return list(self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False))

    def response_ids(self, text):
        """Response text -> ids with the end-of-turn token, once, at the end.

        DEVIATION: not tokenised quite by itself but behind the assistant's header, which is then
        cut off. SentencePiece would otherwise put a space before the first word that the policy
        never samples there, and the data set's responses would look unlikely for no reason.
        """
        ids = self.tokenizer(self.lead + text, add_special_tokens=False)["input_ids"]
        if ids[:len(self.lead_ids)] == self.lead_ids:
            ids = ids[len(self.lead_ids):]
        else:  # a token grew across the border (text that starts with a newline): by itself, then
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.end_id in ids:  # the policy's own text would end at a quoted end token too
            ids = ids[:ids.index(self.end_id)]
        return ids + [self.end_id]


def cut(prompt_ids, responses, max_prompt_length, max_length):
    """Prompts lose their left end, responses their right: (prompt ids, list of response ids).

    One rule for all responses of a prompt: a longer budget for one of them would be a bias.
    """
    prompt_ids = prompt_ids[-max_prompt_length:]
    return prompt_ids, [ids[:max_length - len(prompt_ids)] for ids in responses]


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

    def __len__(self):
        return len(self.prompt_ids) + sum(map(len, self.responses))


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


def plan_micro_batches(lengths, tokens_per_forward):
    """Groups of indices whose lengths sum to at most the budget: first-fit, longest first.

    A tree longer than the budget travels alone. Order within a group does not matter to the result.
    """
    groups, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for g, space in enumerate(room):
            if lengths[i] <= space:
                break
        else:
            g = len(groups)
            groups.append([])
            room.append(tokens_per_forward)
        groups[g].append(i)
        room[g] -= lengths[i]
    return groups


def plan_plain_rows(trees, tokens_per_forward):
    """The same for padded rows: rows x widest row stays within the budget; sorted by width, so that
    neighbours are of like length and little is padding."""
    width = [len(tree.prompt_ids) + max(map(len, tree.responses)) for tree in trees]
    groups, rows = [], 0
    for i in sorted(range(len(trees)), key=lambda i: -width[i]):
        rows += len(trees[i].responses)
        # The first tree of a group is its widest.
        if not groups or rows * width[groups[-1][0]] > tokens_per_forward:
            groups.append([])
            rows = len(trees[i].responses)
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
