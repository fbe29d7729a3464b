"""From scores to a pair to train on (`choose_pair`), and PairRM, the paper's judge, by hand.

`choose_pair` is the rule of pairs: the best candidate of {y, y_w, y_l} becomes chosen, the worst
becomes rejected. Change it to train on other pairs. `give_roles` writes its answer into a row of
pairs.jsonl. Scores compare the candidates of ONE prompt; between prompts they mean nothing.

PairRM (LLM-Blender, arXiv 2306.02561) is a DeBERTa-v3-large that reads a prompt and TWO candidates,

    [CLS]<|source|> prompt [SEP] [CLS]<|candidate1|> first [SEP] [CLS]<|candidate2|> second [SEP]

takes its last hidden states e at the three markers, and puts each candidate through one small head:

    s1 = head([e_source; e_candidate1])    s2 = head([e_source; e_candidate2])    M = mean(s1 - s2)

(the mean over the head's outputs; PairRM has one). M > 0 means that the first is better. M depends
on the order (the model prefers one side), so PairRM compares all K(K-1) ordered pairs. The score of
candidate i is  mean_j (M[i, j] - M[j, i]).

llm-blender 0.0.2 batches prompts as they arrive, and how it cuts a text depends on the rest of its
batch. Here the pairs of all prompts share one queue that is sorted by length, each example is cut
on its own, identical candidates are never compared, and attention moves half the memory
(`disentangled_attention`). tests/test_rank.py compares the numbers with llm-blender's own.

Replaces textbook.py's `rank`. Leaves loading of PairRM, all other judges and the command line below
to harness/judging/judges.py, and the loss to selm.py.

    python rank.py --input candidates.jsonl --ranker pairrm --output ranked.jsonl
Test: pytest tests/test_rank.py.   Next: train_loop.py.

Legend: B prompts, K candidates of one, R rows (pairs) of a forward pass, T tokens of the longest,
H hidden size, h attention heads, d = H / h, P relative-position embeddings.
"""

if __name__ == "__main__":  # the command line is harness/runs/rank_command.py
    import runpy
    runpy.run_module("harness.runs.rank_command", run_name="__main__")

import functools
import hashlib
import itertools
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------
# 1. Scores to a pair
# ----------------------------------------------------------------------------------------------


def choose_pair(scores, texts):
    """(index of the best, index of the worst) of one prompt's candidates; None if all are equal.

    scores: K finite floats, higher is better; texts: the K candidates.
    Ties are broken by the SHA-256 of the text: the smallest of the best, the largest of the worst.
    Position would favour one source (the data's answers always come first), and the alphabet or the
    length a style. The order of the candidates never changes which text wins.

        scores [0.2, 0.9, -1.1] -> (1, 2)        scores [0.5, 0.5, 0.5] -> None
    """
    if not scores or max(scores) == min(scores):
        return None
    digest = lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], digest(texts[i])))
    return order[0], order[-1]


def give_roles(row, scores):
    """Adds its roles to a row of pairs.jsonl: chosen, rejected and sampled, as indices into its
    candidates. scores: one per candidate; None: the data's own pair is the pair.

    If all candidates are equal, both roles go to y: the pair loss is then a constant without
    gradient, and only the optimism term trains, as in Algorithm 1. With --pairs reference (XPO,
    arXiv 2405.21046, Algorithm 1) the candidates are a sample of the policy and one of the first
    model. The second is the one for optimism, also where it won, and the policy's wins a tie.
    Only an empty response of the DATA drops a row: an empty sample may lose like any other.
    """
    candidates, texts = row["candidates"], [c["text"] for c in row["candidates"]]
    index = {source: i for i, c in enumerate(candidates) for source in c["sources"]}
    for candidate, score in zip(candidates, scores or []):
        candidate["score"] = score
    if "reference" in index:
        row["sampled"], equal = [index["reference"]], (index["policy"], index["reference"])
    else:
        row["sampled"] = [i for i, c in enumerate(candidates) for source in c["sources"]
                          if source == "sampled"]
        equal = row["sampled"][:1] * 2
    if scores:
        row["chosen"], row["rejected"] = choose_pair(scores, texts) or equal
    else:
        row["chosen"], row["rejected"] = index["data_chosen"], index["data_rejected"]
    of_data = [i for source, i in index.items() if source in ("data_chosen", "data_rejected")]
    if not all(texts[i].strip() for i in of_data):
        row["dropped"] = "empty response in the data"
    return row


# ----------------------------------------------------------------------------------------------
# 2. PairRM
# ----------------------------------------------------------------------------------------------


class PairRM(nn.Module):
    """PairRM's inference. Parameters have the names of llm-blender's checkpoints.

    config: DebertaV2Config; tokenizer: DeBERTa-v2 style ([CLS] text [SEP]).
    harness.judging.judge_models makes both.
    """

    # In the order in which llm-blender adds them to DeBERTa's 128,001 tokens: ids 128001 to 128004.
    MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
    SOURCE_TOKENS, TOTAL_TOKENS = 1224, 2048

    def __init__(self, config, tokenizer, n_tasks=1):
        super().__init__()
        from transformers import DebertaV2Model
        self.pretrained_model = DebertaV2Model(config)
        size = config.hidden_size
        self.head_layer = nn.Sequential(  # dropout is off, but the names need the indices 0 and 3
            nn.Dropout(), nn.Linear(2 * size, size), nn.Tanh(),
            nn.Dropout(), nn.Linear(size, n_tasks))
        if (getattr(config, "share_att_key", False) and config.relative_attention
                and set(config.pos_att_type or ()) == {"c2p", "p2c"}):  # PairRM; others stay slow
            for layer in self.pretrained_model.encoder.layer:
                attention = layer.attention.self
                attention.forward = functools.partial(disentangled_attention, attention)
        tokenizer.add_tokens(list(self.MARKERS))  # does nothing if they exist
        self.tokenizer, self.tokens_per_forward = tokenizer, 8192
        self.marker_ids = tokenizer.convert_tokens_to_ids(list(self.MARKERS))
        expected = getattr(config, "source_prefix_id", self.marker_ids[0])
        if max(self.marker_ids) >= config.vocab_size or expected != self.marker_ids[0]:
            raise ValueError(f"tokenizer and weights do not belong together: markers are "
                             f"{self.marker_ids}, <|source|> was trained as {expected}, and there "
                             f"are {config.vocab_size} embeddings")
        self.eval()

    @torch.inference_mode()
    def scores(self, prompts, candidates):
        """The judge: B message lists, B lists of K_b strings -> B lists of K_b floats.

        The mean is over ALL n candidates, as llm-blender's, also where some are identical. Two
        identical texts are not compared: their M[i, j] - M[j, i] is 0. ValueError for a prompt that
        PairRM cannot read (`pairrm_texts`).
        """
        places, segments, queue = [], [], []
        for b, (prompt, texts) in enumerate(zip(prompts, candidates, strict=True)):
            texts, place = distinct(texts)
            source, texts = pairrm_texts(prompt, texts)
            source_ids, candidate_ids = self.encode(source, texts)
            places.append(place)
            segments.append((source_ids, candidate_ids))
            queue += [(b, i, j) for i, j in itertools.permutations(range(len(texts)), 2)]
        row = lambda b, i, j: (segments[b][0], segments[b][1][i], segments[b][1][j])
        lengths = [sum(map(len, row(*pair))) for pair in queue]
        matrices = [torch.zeros(len(ids), len(ids)) for _, ids in segments]  # M, 0 on the diagonal
        for batch in length_batches(lengths, self.tokens_per_forward):
            for index, logit in zip(batch, self([row(*queue[i]) for i in batch]).tolist()):
                b, i, j = queue[index]
                matrices[b][i, j] = logit
        return [(M - M.T)[place][:, place].mean(1).tolist() for M, place in zip(matrices, places)]

    def forward(self, rows):
        """R rows (source ids, first ids, second ids), int (t,) each -> logits (R,) fp32.

        The logit is M: if M > 0, the first candidate is better."""
        device = self.head_layer[1].weight.device
        lengths = torch.tensor([[len(segment) for segment in row] for row in rows])  # (R, 3)
        # A marker follows its segment's [CLS]. Lengths 5, 4, 6 -> places 1, 6, 10.
        markers = lengths.cumsum(1) - lengths + 1  # (R, 3)
        each = torch.arange(len(rows))
        ids, mask = pad_rows([torch.cat(row) for row in rows], self.tokenizer.pad_token_id)
        ids[each, markers[:, 2]] = self.marker_ids[2]  # `encode` wrote the first one's marker
        ids, mask = ids.to(device), mask.to(device)  # (R, T)
        hidden = self.pretrained_model(ids, mask).last_hidden_state  # (R, T, H)
        source, first, second = hidden[each[:, None], markers].float().unbind(1)  # (R, H) each
        difference = (self.head_layer(torch.cat([source, first], -1))
                      - self.head_layer(torch.cat([source, second], -1)))  # (R, n_tasks)
        return difference.mean(-1)

    def encode(self, source, candidates):
        """Texts -> (source ids, K lists of candidate ids), every candidate with the FIRST marker.

        The source may take 1224 tokens, and each candidate half of the rest of 2048. Cuts are on
        the right and keep the [SEP]. llm-blender cuts the same way at batch size 1; in a larger
        batch, the longest source decides the room of every candidate.
        """
        # A [SEP] or a marker in a text would move the places that the head reads.
        # DEVIATION: llm-blender removes [SEP] only, and fails on a marker.
        unsafe = re.compile("|".join(map(re.escape, (self.tokenizer.sep_token, *self.MARKERS))))
        texts = [self.MARKERS[0] + unsafe.sub(" ", source)]
        texts += [self.MARKERS[1] + unsafe.sub(" ", text) for text in candidates]
        ids = self.tokenizer(texts, verbose=False)["input_ids"]
        assert all(row[1] in self.marker_ids for row in ids), "want a tokenizer with [CLS]<marker>"
        cut = lambda row, room: torch.tensor(  # int32: a list of ints takes ten times the memory
            row if len(row) <= room else row[:room - 1] + row[-1:], dtype=torch.int32)
        source_ids = cut(ids[0], self.SOURCE_TOKENS)
        room = (self.TOTAL_TOKENS - len(source_ids)) // 2
        return source_ids, [cut(row, room) for row in ids[1:]]


# ----------------------------------------------------------------------------------------------
# 3. PairRM's texts, its attention, and a queue without padding
# ----------------------------------------------------------------------------------------------


def pairrm_texts(prompt, candidates):
    """Message list and K candidates -> (source, K texts), in llm-blender's own formats.

    One user turn: the raw text, since PairRM was not trained on chat templates. Several turns: as
    llm-blender's `compare_conversations`. The source asks to fill in <Response i>, and each
    candidate repeats the earlier responses. (PairRM saw the spelling `coversation` in training.)
    A system turn goes before the source, as llm-blender's `instructions`. ValueError for any other
    order of roles.
    https://github.com/yuchenlin/LLM-Blender/blob/main/llm_blender/blender/blender.py
    """
    system = prompt[0]["content"] + "\n" if prompt and prompt[0]["role"] == "system" else ""
    turns = prompt[1:] if system else prompt
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("PairRM reads user, assistant, ..., user turns behind at most one system "
                         f"turn; this prompt has {[turn['role'] for turn in prompt]}")
    if len(turns) == 1:
        return system + turns[0]["content"], list(candidates)
    users, responses = ([turn["content"] for turn in turns[start::2]] for start in (0, 1))
    source = ("Finish the following coversation in each i-th turn by filling in <Response i> with "
              "your response." + "\n".join(f"USER: {text}\nAssistant: <Response {i}>"
                                           for i, text in enumerate(users, 1)))
    return system + source, ["\n".join(f"<Response {i}>: {text}" for i, text
                                       in enumerate([*responses, last], 1)) for last in candidates]


def disentangled_attention(self, hidden_states, attention_mask, output_attentions=False,
                           query_states=None, relative_pos=None, rel_embeddings=None):
    """DeBERTa's attention (arXiv 2006.03654, Eq. 4) with half of transformers' memory traffic.

        scores[i, j] = (q_i . k_j  +  q_i . K[bucket(i - j)]  +  k_j . Q[bucket(i - j)]) / sqrt(3 d)

    K and Q are the P position embeddings after the key and query projections. It saves passes over
    (R, h, T, T) arrays: 1 / sqrt(3 d) is applied to the queries; the third term is gathered from
    the rows of a (P, T) table and needs no transpose; one fused attention call does the rest, with
    the two position terms as its bias. Replaces DisentangledSelfAttention.forward, same arguments.
    """
    split = lambda x: x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
    scale = 1 / math.sqrt(3 * self.attention_head_size)
    query = split(self.query_proj(hidden_states)) * scale  # (R, h, T, d)
    key, value = split(self.key_proj(hidden_states)), split(self.value_proj(hidden_states))
    position_query = split(self.query_proj(rel_embeddings)[None]) * scale  # (1, h, P, d)
    position_key = split(self.key_proj(rel_embeddings)[None])
    span = self.pos_ebd_size
    bucket = (relative_pos.squeeze() + span).clamp(0, 2 * span - 1)  # (T, T) of i - j, in [0, P)
    bucket = bucket.expand(*query.shape[:2], *bucket.shape[-2:])  # (R, h, T, T), no memory
    bias = (query @ position_key.mT).gather(-1, bucket)  # (R, h, T, P) -> (R, h, T, T)
    bias += (position_query @ key.mT).gather(-2, bucket)  # (R, h, P, T) -> (R, h, T, T)
    # The mask is (R, 1, T, T). Its first row, that of [CLS], says which tokens are real.
    bias.masked_fill_(attention_mask[:, :, :1] == 0, torch.finfo(bias.dtype).min)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    return context.transpose(1, 2).flatten(-2), None  # (R, T, H)


def length_batches(lengths, tokens_per_forward):
    """Indices in batches of like length, longest first: rows x longest <= tokens_per_forward.

    After sorting, neighbours differ by a token or two, so there is almost no padding. The longest
    come first, so an out-of-memory error comes in the first second and not in the last hour.
    """
    batch = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_forward:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_rows(rows, pad_id):
    """R int tensors (t,) -> ids (R, T) int64, mask (R, T) int64: 1 where there is a token."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id).long()
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()


def distinct(texts):
    """["a", "b", "a"] -> (the distinct texts ["a", "b"], the place of each text [0, 1, 0])."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(place), [place[text] for text in texts]
