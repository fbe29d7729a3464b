"""Preference records to ids, trees of responses, batches, packing into micro-batches.

One tree per prompt: a prompt x and its K distinct responses, laid out in one line:

    tokens     x x x x  a a a  b b        The position of each token is that in its OWN sequence:
    position   0 1 2 3  4 5 6  4 5        b starts at 4 again, as if a did not exist.
    attends to          x+a    x+b        (the mask; model.py applies it)

The log-probs are exactly those of the two sequences x+a and x+b, but x is computed once. Trees of
many prompts share one line of at most --tokens-per-forward tokens, without padding. The fresh
sample y often is the chosen or the rejected response as well. So a tree holds DISTINCT responses,
the roles (chosen, rejected, sampled) are indices into them, and nothing is computed twice.

The logits at position i predict token i + 1. So the LAST PROMPT token predicts the first token of
every response, and each other token is predicted by the one before it.

Replaces textbook.py's `tokenise` and the padding of its `logps`. Leaves files and portions to
harness/inputs/preferences.py, chat templates to harness/inputs/chat_template.py, models to
model.py, sampling to sample.py, ranking to rank.py, and the loss to selm.py.
Test: pytest tests/test_data.py tests/test_chat_template.py.    Read next: model.py.

Legend: B prompts, K distinct responses of one, R responses of all, T tokens of a micro-batch,
N response tokens of a micro-batch.
"""

import random
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# ----------------------------------------------------------------------------------------------
# 1. A record {"prompt_id", "prompt": messages, "data_chosen", "data_rejected"} (strings) to ids
# ----------------------------------------------------------------------------------------------


def encode(records, chat, max_prompt_length, max_length):
    """Yields (record, prompt ids, [ids of data_chosen, of data_rejected]), cut to the limits.

    chat: harness.inputs.chat_template.ChatFormat. It tokenises many texts in one call, which is
    much faster.
    """
    prompts, answers = chat.encode(
        [record["prompt"] for record in records],
        [[record["data_chosen"], record["data_rejected"]] for record in records])
    for record, prompt, responses in zip(records, prompts, answers):
        prompt = cut_prompt(prompt, max_prompt_length, chat.bos_id)
        room = max_length - len(prompt)  # the same for both: more room would favour one
        yield record, prompt, [response[:room] for response in responses]


def encode_prompts(records, chat, max_prompt_length, max_length):
    """Yields (record, prompt ids cut to the limit, the most tokens that its response may have)."""
    for record, ids in zip(records, chat.prompts_ids([record["prompt"] for record in records])):
        ids = cut_prompt(ids, max_prompt_length, chat.bos_id)
        yield record, ids, max_length - len(ids)


def cut_prompt(prompt_ids, max_prompt_length, bos_id=None):
    """Cuts a prompt on the left, but keeps its BOS. (Responses are cut on the right.)"""
    over = len(prompt_ids) - max_prompt_length
    if over <= 0:
        return prompt_ids
    bos = prompt_ids[:1] if prompt_ids[0] == bos_id else []
    return bos + prompt_ids[over + len(bos):]


def make_rows(answered, chat):
    """Rows of pairs.jsonl before the ranking: the DISTINCT responses of a prompt, each with all its
    sources. answered: tuples (record, prompt ids, (source, ids) of each response). Samples keep the
    ids that were sampled, since one text may have several tokenisations. The judge gets the text of
    these ids."""
    rows = []
    for record, prompt_ids, responses in answered:
        sources = {}
        for source, ids in responses:
            sources.setdefault(tuple(ids), []).append(source)
        rows.append({"prompt_id": record["prompt_id"], "prompt": record["prompt"],
                     "prompt_ids": prompt_ids, "dropped": None, "candidates": [
                         {"sources": names, "text": None, "ids": list(ids),
                          "finished": ids[-1] in chat.stop_ids} for ids, names in sources.items()]})
    candidates = [candidate for row in rows for candidate in row["candidates"]]
    for candidate, text in zip(candidates, chat.texts([c["ids"] for c in candidates]), strict=True):
        candidate["text"] = text
    return rows


# ----------------------------------------------------------------------------------------------
# 2. Trees: the candidates that the loss needs, and their roles
# ----------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """A prompt, its distinct responses (ids), and the roles (indices into the responses)."""
    prompt_ids: list
    responses: list
    chosen: int
    rejected: int
    sampled: list  # the fresh samples: several with --responses-per-prompt, none for plain DPO
    ref_logps: list = field(default_factory=list)  # one per response, in nats; [] while unknown
    candidate_indices: list = field(default_factory=list)  # of the responses, in pairs.jsonl's row
    prompt_id: str = ""

    @property
    def size(self):
        """What planning needs to know about the tree."""
        longest = len(self.prompt_ids) + max(map(len, self.responses))
        return Size(len(self.prompt_ids) + sum(map(len, self.responses)), len(self.responses),
                    longest)


class Size(NamedTuple):
    tokens: int  # of the packed tree: the prompt once, and all responses
    rows: int  # number of plain rows: one per response
    width: int  # tokens of the longest plain row


def read_trees(pairs, alpha):
    """The trees of all rows of pairs.jsonl that train, 4 bytes a token. Without optimism an equal
    pair (chosen and rejected are one response) has nothing to say. ValueError if none is left."""
    trees = [make_tree(row, alpha) for row in pairs
             if not row["dropped"] and (row["chosen"] != row["rejected"] or alpha > 0)]
    if not trees:
        raise ValueError(f"no example is left to train on; look at {pairs.path} to see why")
    return trees


def make_tree(row, alpha):
    """A row of pairs.jsonl -> Tree, with only the candidates that the loss needs: plain DPO
    (alpha 0) needs y only if y won or lost."""
    sampled = row["sampled"] if alpha > 0 else []
    used = sorted({row["chosen"], row["rejected"], *sampled})
    responses = [array("i", row["candidates"][c]["ids"]) for c in used]
    return Tree(array("i", row["prompt_ids"]), responses,
                used.index(row["chosen"]), used.index(row["rejected"]),
                [used.index(c) for c in sampled], [], used, row["prompt_id"])


def add_reference(trees, reference):
    """Gives the trees the log-probs of their rows in reference.jsonl."""
    for tree in trees:
        logps = reference.of(tree.prompt_id)["logps"]
        tree.ref_logps = [logps[c] for c in tree.candidate_indices]


# ----------------------------------------------------------------------------------------------
# 3. Batches and micro-batches
# ----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """The trees of one update: how many over all processes, and this process's micro-batches."""
    examples: int
    micro_batches: list  # lists of trees
    fillers: list  # micro-batches that do not count, see `passes`

    def passes(self):
        """Yields (trees, whether they count) for each forward pass. FSDP waits for all processes,
        so each makes equally many: one with fewer micro-batches computes a tree for nothing."""
        yield from ((trees, True) for trees in self.micro_batches)
        yield from ((trees, False) for trees in self.fillers)


def plan_updates(trees, batching, seed, process=0, processes=1):
    """One epoch over the trees, shuffled by seed -> the Batches of this process.

    batching: batch_size (trees per update, over all processes), tokens_per_forward, plain_rows.
    """
    order = random.Random(seed).sample(trees, len(trees))
    batches = []
    for start in range(0, len(order), batching.batch_size):
        batch = order[start:start + batching.batch_size]
        plans = [plan_micro_batches(batch[p::processes], batching) for p in range(processes)]
        missing = max(map(len, plans)) - len(plans[process])
        batches.append(Batch(len(batch), plans[process], [trees[:1]] * missing))
    return batches


def plan_micro_batches(trees, batching):
    """Trees -> lists of trees, each within batching.tokens_per_forward; a tree that is larger is
    alone in its list. The order within a list does not change the result."""
    plan = plan_plain_rows if batching.plain_rows else plan_packed
    groups = plan([tree.size for tree in trees], batching.tokens_per_forward)
    return [[trees[i] for i in group] for group in groups]


def plan_packed(sizes, tokens_per_forward):
    """First-fit, longest first. The tokens of a group's trees add up to at most the budget."""
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
    """The same for padded rows: rows x widest row stays within the budget. Sorting by width puts
    rows of similar length together, so there is little padding."""
    groups, rows = [], 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i].width):
        rows += sizes[i].rows
        # The first tree of a group is its widest.
        if not groups or rows * sizes[groups[-1][0]].width > tokens_per_forward:
            groups.append([])
            rows = sizes[i].rows
        groups[-1].append(i)
    return groups


# ----------------------------------------------------------------------------------------------
# 4. Packing a micro-batch
# ----------------------------------------------------------------------------------------------


@dataclass
class MicroBatch:
    """The input of one forward pass. `rows` is 1 for packed trees, and R for plain padded rows."""
    input_ids: torch.Tensor  # (rows, T)
    position_ids: torch.Tensor  # (rows, T)
    attention_mask: torch.Tensor  # (rows, T) for plain rows; None for packed ones
    layout: list  # packed: (prompt length, [response lengths]) of each tree; plain: None
    predicted_from: torch.Tensor  # (N,) index into the rows * T hidden states
    targets: torch.Tensor  # (N,)
    response_index: torch.Tensor  # (N,) in [0, R)
    responses: int  # R

    def to(self, device):
        moved = {name: value.to(device) for name, value in vars(self).items()
                 if isinstance(value, torch.Tensor)}
        return MicroBatch(**{**vars(self), **moved})


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
    """Trees -> plain MicroBatch: one row per response, right-padded. For --plain-rows and tests."""
    rows = [(tree.prompt_ids, response) for tree in trees for response in tree.responses]
    width = max(len(p) + len(r) for p, r in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    predicted_from, targets, response_index = [], [], []
    for i, (p, response) in enumerate(rows):
        length = len(p) + len(response)
        input_ids[i, :length] = torch.tensor([*p, *response])
        attention_mask[i, :length] = 1
        predicted_from += range(i * width + len(p) - 1, i * width + length - 1)
        targets += response
        response_index += [i] * len(response)
    position_ids = torch.arange(width).expand(len(rows), -1)
    return MicroBatch(input_ids, position_ids, attention_mask, None, torch.tensor(predicted_from),
                      torch.tensor(targets), torch.tensor(response_index), len(rows))
