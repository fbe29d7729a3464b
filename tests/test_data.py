"""Portions, candidates, planning of updates, packing."""

import random
from types import SimpleNamespace

import pytest
import torch

import data
from harness.inputs import preferences

def record(prompt, number=0, name=None):
    return {"prompt_id": name or f"{prompt} {number}", "data_chosen": str(number),
            "data_rejected": "no", "prompt": [{"role": "user", "content": prompt}]}


# ----------------------------------------------------------------------------------------------
# Portions
# ----------------------------------------------------------------------------------------------


def prompts(records):
    return {r["prompt"][0]["content"] for r in records}


def test_portions_are_disjoint_of_equal_size_and_repeat_with_the_seed():
    """A prompt that is trained on in two iterations; a shuffle that differs from run to run, or
    from that of runs that are under way."""
    records = [record(str(i)) for i in range(100)]
    portions = preferences.split_portions(records, 3, seed=5)
    shuffled = random.Random(5).sample(records, 100)
    assert portions == [shuffled[:33], shuffled[33:66], shuffled[66:99]]
    assert preferences.split_portions(records, 3, seed=6) != portions
    shuffled = random.Random(0).sample(records, 100)
    assert preferences.split_portions(records, 3, limit=10) == [shuffled[i:i + 10] for i in (0, 10, 20)]
    assert preferences.split_portions(records, 1) == [shuffled]
    with pytest.raises(ValueError, match="cannot be split"):
        preferences.split_portions(records[:2], 3)
    with pytest.raises(ValueError, match="2 prompts cannot be split"):
        preferences.split_portions([record("a", i) for i in range(50)] + [record("b")], 3)


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("pairs", [[4, 4, 4], [16] * 96, [1, 2, 3] * 20, [40] + [1] * 60,
                                   [20, 1, 1, 1, 1], [1, 1, 1], [9] * 10])
def test_a_prompt_with_many_pairs_stays_in_one_portion_whatever_its_ids_say(pairs, limit):
    """One prompt under several ids in two portions; a portion that is left empty, or far larger
    than others, by a prompt with many pairs; one id for all rows that makes them one prompt."""
    records = [record(f"prompt {i}" + " " * (k % 2), k, "train") for i, n in enumerate(pairs)
               for k in range(n)]
    portions = preferences.split_portions(records, 3, limit)
    seen = [{p.strip() for p in prompts(portion)} for portion in portions]
    assert all(seen) and sum(map(len, seen)) == len(set.union(*seen))
    sizes = list(map(len, portions))
    used = {(r["prompt"][0]["content"], r["data_chosen"]) for p in portions for r in p}
    assert len(used) == sum(sizes)  # none twice
    if limit:
        assert max(sizes) <= limit
        assert min(sizes) == limit or sum(pairs) < 3 * limit or 20 in pairs
    elif len(set(pairs)) == 1:  # equal shares of prompts, all their pairs in them
        assert sizes == [len(pairs) // 3 * pairs[0]] * 3
    else:  # no portion is short of a third by more than the largest prompt
        assert sum(pairs) / 3 - min(sizes) <= max(pairs)


def test_portions_share_what_a_heavy_prompt_leaves_over():
    """The last portion gets the crumbs, because the first took its third of all records."""
    records = [record("heavy", k) for k in range(40)] + [record(str(i)) for i in range(60)]
    for seed in range(5):
        assert list(map(len, preferences.split_portions(records, 3, seed=seed))) == [40, 30, 30]


def test_prompts_with_many_pairs_do_not_crowd_into_the_first_portion():
    """Portions that are disjoint but of another kind: all prompts with many pairs come first."""
    records = [record(f"{n} {i}", k) for n, count in ((1, 300), (6, 150)) for i in range(count)
               for k in range(n)]
    many = [sum(p[0] == "6" for p in prompts(portion))
            for portion in preferences.split_portions(records, 3)]
    assert sum(many) == 150 and max(many) < 70


def test_held_out_prompts_leave_training_with_all_their_pairs():
    """Held-out prompts that are trained on under another id (20 of 20 in one trial)."""
    unique = [record(str(i)) for i in range(100)]
    shuffled = random.Random(3).sample(unique, 100)
    assert preferences.hold_out(unique, 8, 3) == (shuffled[8:], shuffled[:8])
    assert preferences.hold_out(unique, 50, 3) == (shuffled[20:], shuffled[:20])  # a fifth at most
    assert preferences.hold_out(unique, 0, 3) == (shuffled, [])
    repeated = [record(str(i % 50), i) for i in range(200)]
    training, held_out = preferences.hold_out(repeated, 8)
    assert len(held_out) == len(prompts(held_out)) == 8 and len(training) == 200 - 8 * 4
    assert not prompts(training) & prompts(held_out)
    assert len(preferences.hold_out(repeated, 30)[1]) == 10  # 10 prompts take 40 of the 200 rows along
    test_split = [record(" 7\n", name="other"), record("elsewhere")]
    assert preferences.leave_out(unique, test_split) == unique[:7] + unique[8:]


# ----------------------------------------------------------------------------------------------
# Candidates
# ----------------------------------------------------------------------------------------------


class Chat:
    """One token a letter; what it says of text is not looked into here."""
    bos_id, stop_ids = 5, {9}

    def prompts_ids(self, conversations):
        return [[5, *map(ord, messages[-1]["content"])] for messages in conversations]

    def encode(self, conversations, answers):
        return self.prompts_ids(conversations), [[[*map(ord, text), 9] for text in texts]
                                                 for texts in answers]

    def texts(self, responses):
        return ["".join(chr(i) for i in ids if i != 9) for ids in responses]


def test_prompts_are_cut_from_the_left_and_all_responses_from_the_right_by_one_rule():
    """Cutting the question off instead of the oldest context, or giving one response more room."""
    one = {"prompt": [{"role": "user", "content": "abcdefgh"}], "data_chosen": "k" * 9,
           "data_rejected": "nonsense"}
    [(record, prompt, responses)] = data.encode([one], Chat(), 4, 9)
    assert record is one and prompt == [5, *map(ord, "fgh")]
    assert responses == [[ord("k")] * 5, [*map(ord, "nonse")]]
    assert list(data.encode_prompts([one], Chat(), 4, 9)) == [(one, prompt, 5)]


@pytest.mark.parametrize("limit, left", [(9, [5, 1, 2, 3]), (4, [5, 1, 2, 3]), (3, [5, 2, 3]),
                                         (1, [5])])
def test_a_cut_prompt_keeps_its_bos(limit, left):
    """A policy that sees texts without the token with which all its texts began."""
    assert data.cut_prompt([5, 1, 2, 3], limit, bos_id=5) == left
    assert data.cut_prompt([5, 1, 2, 3], limit, bos_id=4) == [5, 1, 2, 3][-limit:]


def test_a_row_holds_distinct_responses_with_all_their_sources():
    """A third forward pass for a y that is the chosen text; a sample tokenised anew; a cut response
    that passes for a finished one."""
    made, other = data.make_rows([(record("hi"), [5, 7], [
        ("data_chosen", [65, 66, 9]), ("data_rejected", [67, 68]), ("sampled", [65, 66, 9]),
        ("sampled", [65])]), (record("you"), [6], [("data_chosen", [69, 9])])], Chat())
    assert [(c["sources"], c["ids"], c["text"], c["finished"]) for c in made["candidates"]] == [
        (["data_chosen", "sampled"], [65, 66, 9], "AB", True),
        (["data_rejected"], [67, 68], "CD", False), (["sampled"], [65], "A", False)]
    assert [c["text"] for c in other["candidates"]] == ["E"] and other["prompt_ids"] == [6]
    assert made["prompt_ids"] == [5, 7] and made["prompt_id"] == "hi 0" and not made["dropped"]


# ----------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------

TREES = [data.Tree([5, 6, 7], [[8, 9], [10]], 0, 1, [0]), data.Tree([11], [[12, 13, 14]], 0, 0, [])]


def test_packing_lays_trees_out_as_a_loop_by_hand_says():
    """A response whose first token is predicted from its own position: the missing shift."""
    batch = data.pack(TREES)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert batch.layout == [(3, [2, 1]), (1, [3])]
    assert batch.predicted_from.tolist() == [2, 3, 2, 6, 7, 8]
    assert batch.targets.tolist() == [8, 9, 10, 12, 13, 14]
    assert batch.response_index.tolist() == [0, 0, 1, 2, 2, 2] and batch.responses == 3


def test_plain_rows_pick_the_same_targets_from_states_one_position_earlier():
    """Plain rows, the oracle of the packed ones, being wrong in the same way."""
    batch = data.pad(TREES)
    flat = batch.input_ids.flatten().tolist()
    assert batch.input_ids.shape == (3, 5)
    assert batch.targets.tolist() == [flat[i + 1] for i in batch.predicted_from.tolist()]
    assert batch.attention_mask.sum(1).tolist() == [5, 4, 4]
    assert torch.equal(batch.response_index, data.pack(TREES).response_index)


def test_an_empty_response_is_refused_by_packing():
    """A response index without tokens: its log-prob would be a silent 0."""
    with pytest.raises(AssertionError, match="empty"):
        data.pack([data.Tree([1], [[]], 0, 0, [])])


@pytest.mark.parametrize("lengths, budget", [([5, 3, 8, 2, 7, 1], 10), ([30, 1], 10), ([4] * 9, 8)])
def test_micro_batches_hold_every_tree_once_within_the_budget(lengths, budget):
    """A tree lost or trained on twice; a budget that is only a wish."""
    groups = data.plan_packed([data.Size(n, 2, n) for n in lengths], budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget


@pytest.mark.parametrize("budget", [1, 12, 30, 1000])
def test_plain_rows_stay_within_the_budget_with_their_padding(budget):
    """A budget that counts real tokens while memory pays for padded ones."""
    sizes = [(3, (4, 2)), (1, (9,)), (5, (1, 1, 1)), (2, (2, 7)), (4, (3,))]
    trees = [data.Tree([1] * p, [[2] * n for n in ns], 0, 0, []) for p, ns in sizes]
    groups = data.plan_plain_rows([tree.size for tree in trees], budget)
    assert sorted(i for g in groups for i in g) == list(range(len(trees)))
    for group in groups:
        assert len(group) == 1 or data.pad([trees[i] for i in group]).input_ids.numel() <= budget


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_all_processes_together_see_every_tree_once_an_epoch_in_as_many_micro_batches(processes):
    """Trees that no process or two of them train on; a process that waits for ever, because the
    others have one micro-batch more; batches of another size with another number of processes."""
    batching = SimpleNamespace(batch_size=7, tokens_per_forward=20, plain_rows=False)
    trees = [data.Tree([1] * (1 + i * 5 % 13), [[2], [3]], 0, 1, [], prompt_id=i)
             for i in range(17)]
    plans = [data.plan_updates(trees, batching, 1, p, processes) for p in range(processes)]
    alone = data.plan_updates(trees, batching, 1)

    def that_count(batch):
        return [tree.prompt_id for part, counts in batch.passes() if counts for tree in part]
    for u, batches in enumerate(zip(*plans)):
        assert {b.examples for b in batches} == {alone[u].examples}
        assert len({len(list(b.passes())) for b in batches}) == 1
        assert all(part for b in batches for part, _ in b.passes())  # FSDP computes something
        assert sorted(i for b in batches for i in that_count(b)) == sorted(that_count(alone[u]))
    assert [b.examples for b in alone] == [7, 7, 3]
    assert sorted(i for b in alone for i in that_count(b)) == list(range(17))
    assert data.plan_updates(trees, batching, 2) != alone


def test_a_tree_of_a_row_has_only_what_the_loss_needs_and_keeps_its_roles():
    """y computed for plain DPO too; a role that points at its place in the row, not in the tree;
    reference log-probs of other candidates, or of another prompt."""
    row = {"prompt_id": "a", "prompt_ids": [1, 2], "chosen": 3, "rejected": 0, "sampled": [2, 3],
           "candidates": [{"ids": [10 + c]} for c in range(4)]}

    class Reference:
        def __init__(self, logps):
            self.logps = logps

        def of(self, prompt_id):
            return {"a": {"logps": self.logps}}[prompt_id]

    def tree_of(alpha, logps):
        tree = data.make_tree(row, alpha)
        data.add_reference([tree], Reference(logps))
        return tree, list(map(list, tree.responses))
    tree, responses = tree_of(0.3, [-1.0, None, -3.0, -4.0])
    assert (responses, tree.candidate_indices) == ([[10], [12], [13]], [0, 2, 3])
    assert (tree.chosen, tree.rejected, tree.sampled) == (2, 0, [1, 2])
    assert tree.ref_logps == [-1.0, -3.0, -4.0] and tree.size == (5, 3, 3)
    tree, responses = tree_of(0.0, [-1.0, None, None, -4.0])
    assert (responses, tree.chosen, tree.rejected, tree.sampled) == ([[10], [13]], 1, 0, [])
    assert tree.ref_logps == [-1.0, -4.0]
