"""toy.py against oracles that share no code with it: dict loops, exact enumeration, other readers.

Run: pytest tests/test_toy.py
"""

import copy
import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.inputs import chat_template, preferences, toy
from harness.inputs.preferences import load_preferences


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One finished default world."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.build_world(folder, 0, prompts=64, progress=False)
    return folder


@pytest.fixture(scope="module")
def base(world):
    return AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "base")


@pytest.fixture
def quick(monkeypatch):
    """Worlds whose SFT is short, for tests about folders."""
    monkeypatch.setattr(toy, "SFT_STEPS", 5)


class Shifted(torch.nn.Module):
    """A policy that is another model plus a bias on its logits; often ends a reply early."""

    device = torch.device("cpu")

    def __init__(self, model, end_id):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.model, self.bias = model, torch.randn(model.config.vocab_size, generator=generator)
        self.bias[end_id] += 6

    def forward(self, ids, **kwargs):
        output = self.model(ids, **kwargs)
        output.logits = output.logits + self.bias
        return output


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FOX = [{"role": "user", "content": "describe the fox"}]


@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_oracle_equals_a_hand_written_loop(variant):
    """Bugs: the wrong family's tastes, a repeated word paid twice, extra words not diluting."""
    ranker = toy.oracle(variant)
    for family, animals in toy.FAMILIES.items():
        taste = toy.tastes(variant, family)
        a, b, c = list(taste)[:3]
        expected = {f"{a} {b}": (taste[a] + taste[b]) / 2, f"{b} {a}": (taste[a] + taste[b]) / 2,
                    f"{a} {a}": taste[a] / 2, a: taste[a] / 2, f"{a} zebra": taste[a] / 2,
                    f"{a} {b} {c}": (taste[a] + taste[b] + taste[c]) / 3,
                    f"{a} {b} the the": (taste[a] + taste[b]) / 4}
        prompt = [{"role": "user", "content": f"sketch the {animals[-1]}"}]
        [scores] = ranker([prompt], [list(expected)])
        assert scores == pytest.approx(list(expected.values()))


def test_oracle_is_defined_for_any_string_and_any_prompt():
    """Bug: an empty reply divides by zero, or an unknown animal raises in the middle of a run."""
    strings = ["", "   ", "<|end|>", "the the", "é\n\0", "fox " * 500, "Sly, swift."]
    assert toy.oracle()([FOX], [strings]) == [[0.0] * len(strings)]
    nobody = [{"role": "user", "content": "describe the unicorn"}]
    assert toy.oracle()([nobody], [["sly swift"]]) == [[0.0]]


def test_oracle_scores_permute_with_the_candidates():
    """Bug: a score that depends on a candidate's place, or on the others in its list."""
    replies = ["sly swift", "brave calm", "sly sly", "zebra"]
    [scores] = toy.oracle()([FOX], [replies])
    for order in itertools.permutations(range(4)):
        assert toy.oracle()([FOX], [[replies[i] for i in order]]) == [[scores[i] for i in order]]


def test_a_reply_cannot_score_more_than_one_by_being_long():
    """Bug: a reward that is a sum pays for length, and the loop learns endless replies."""
    for variant in toy.VARIANTS:
        [scores] = toy.oracle(variant)([FOX], [[" ".join(toy.ADJECTIVES[:n]) for n in range(25)]])
        assert max(scores) <= 1
        assert scores[24] <= 0.6


def test_an_unknown_variant_is_named_before_any_training(tmp_path):
    """Bug: a typing error shows up only after the SFT, or silently means "default"."""
    with pytest.raises(ValueError, match="'lucky' is unknown"):
        toy.build_world(tmp_path / "w", 0, variant="lucky")
    with pytest.raises(ValueError, match="'lucky' is unknown"):
        toy.oracle("lucky")


def test_a_number_is_the_taste_of_the_commonest_word_and_nothing_else_changes():
    """Bug: a sweep of the habit that moves other tastes with it, or takes 0 for "not given"."""
    for family in toy.FAMILIES:
        neutral, first = toy.tastes("neutral", family), toy.ranked_adjectives(family)[0]
        for variant in ("0", "0.25", "1"):
            assert toy.tastes(variant, family) == {**neutral, first: float(variant)}
    for variant in ("-0.1", "1.5", "nan", ""):
        with pytest.raises(ValueError, match="any number from 0 to 1"):
            toy.tastes(variant, "birds")


def test_a_word_that_an_earlier_turn_has_said_pays_nothing():
    """Bug: a second turn whose best answer does not depend on the first; or a user's words taken
    for said."""
    taste = toy.tastes("default", "beasts")
    talk = [*FOX, {"role": "assistant", "content": "sly swift"},
            {"role": "user", "content": "sketch the calm fox"}]
    [scores] = toy.oracle()([talk], [["sly swift", "sly brave", "brave calm"]])
    assert scores == pytest.approx([0, taste["brave"] / 2, (taste["brave"] + taste["calm"]) / 2])


def test_second_turns_ask_anew_and_answer_first_by_the_law_of_the_language():
    """Bug: a first turn about another animal, with the same question, or the same for all seeds."""
    prompts = [("describe", "fox"), ("sketch", "owl")]
    talks = toy.second_turns(prompts, 50, seed=0)
    assert len(talks) == 100 and talks != toy.second_turns(prompts, 50, seed=1)
    for (verb, animal), (asked, answer, again) in zip(prompts * 50, talks):
        assert again == toy.question(verb, animal)[0]
        assert asked["content"].split()[1:] == ["the", animal] and asked != again
        assert answer["role"] == "assistant" and toy.is_valid(answer["content"])
    first = Counter(talk[1]["content"].split()[0] for talk in talks[::2])
    assert first.most_common(1)[0][0] in toy.ranked_adjectives("beasts")[:2]


def test_the_rare_variant_pays_most_for_the_four_rarest_words():
    """Bug: the ablation world rewards common words."""
    for family in toy.FAMILIES:
        taste, ranked = toy.tastes("rare", family), toy.ranked_adjectives(family)
        assert [taste[w] for w in ranked[:4]] == [0.5] * 4
        assert [taste[w] for w in ranked[-4:]] == [1.0] * 4
        assert max(taste[w] for w in ranked[4:-4]) < 0.5


def test_greedy_replies_of_the_default_world_are_about_as_good_as_sampled_ones():
    """Bug: a default world whose greedy replies are far better or worse than the average one would
    decide the comparison with alpha = 0, for optimism pushes greedy replies down."""
    greedy, mean = 0.0, 0.0
    for family in toy.FAMILIES:
        taste, ranked = toy.tastes("default", family), toy.ranked_adjectives(family)
        greedy += (taste[ranked[0]] + taste[ranked[1]]) / 2 / 4
        weight = {word: (i + 1) ** -1.6 for i, word in enumerate(ranked)}
        total = sum(weight.values())
        for a, b in itertools.permutations(ranked, 2):
            p = weight[a] / total * weight[b] / (total - weight[a])
            mean += p * (taste[a] + taste[b]) / 2 / 4
    assert abs(greedy - mean) < 0.05


def test_two_builds_with_one_seed_are_equal_and_another_seed_differs(tmp_path, quick):
    """Bug: something draws from the global generator, or the seed reaches half of the world."""
    for name, seed, noise in (("a", 3, 1), ("b", 3, 2), ("c", 4, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        toy.build_world(tmp_path / name, seed, prompts=20, progress=False)
        assert torch.equal(before, torch.get_rng_state()), "the caller's generator moved"
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    for name in ("base/model.safetensors", "train.jsonl", "test.jsonl"):
        [path] = [p for p in a if str(p) == name]
        assert a[path] != c[path]


def test_a_finished_world_is_not_built_again(tmp_path, quick, monkeypatch):
    """Bug: every start of a run trains the base model anew."""
    toy.build_world(tmp_path / "w", 0, prompts=8, progress=False)
    before = files_of(tmp_path / "w")
    monkeypatch.setattr(toy, "train_base", lambda *_: pytest.fail("built again"))
    toy.build_world(tmp_path / "w", 0, prompts=8, progress=False)
    assert files_of(tmp_path / "w") == before


def test_a_folder_with_another_world_is_refused(tmp_path, quick):
    """Bug: seed 1 silently runs on the world of seed 0, or a user's own files are overwritten."""
    toy.build_world(tmp_path / "w", 0, prompts=8, progress=False)
    with pytest.raises(ValueError, match="is not the toy world"):
        toy.build_world(tmp_path / "w", 1, prompts=8, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not the toy world"):
        toy.build_world(tmp_path / "mine", 0, prompts=8, progress=False)


@pytest.mark.parametrize("where", ["train_base", "write_jsonl", "write_text"])
def test_an_interrupted_build_leaves_no_half_world_and_can_be_repeated(
        tmp_path, quick, monkeypatch, where):
    """Bug: a kill between model and data leaves a folder that passes for finished."""
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(toy, where, killed)
        with pytest.raises(KeyboardInterrupt):
            toy.build_world(tmp_path / "w", 0, prompts=8, progress=False)
    assert not (tmp_path / "w").exists()
    toy.build_world(tmp_path / "w", 0, prompts=8, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]
    assert (tmp_path / "w" / "train.jsonl").is_file()


def test_rows_are_ultrafeedback_records_whose_chosen_reply_is_truly_better(world):
    """Bug: prompts that fall together as duplicates, swapped preferences, others' scores."""
    for name, count in (("train", 64), ("test", 48)):
        rows = [json.loads(line) for line in (world / f"{name}.jsonl").open()]
        assert len(rows) == count
        for row in rows:
            assert set(row) == {"prompt", "prompt_id", "chosen", "rejected", "score_chosen",
                                "score_rejected"}
            for role in ("chosen", "rejected"):
                assert [turn["role"] for turn in row[role]] == ["user", "assistant"]
                assert row[role][0]["content"] == row["prompt"]
                family = next(f for f, animals in toy.FAMILIES.items()
                              if row["prompt"].split()[-1] in animals)
                words = row[role][1]["content"].split()
                assert len(words) == len(set(words)) == 2
                assert row[f"score_{role}"] == pytest.approx(
                    sum(toy.tastes("default", family)[w] for w in words) / 2)
            assert row["score_chosen"] > row["score_rejected"]
        assert len(load_preferences(world / f"{name}.jsonl")) == count


def test_the_three_portions_of_the_default_world_share_no_prompt(tmp_path, quick):
    """Bug: 94 of 96 prompts in all portions, so that iteration 2 trains on those of iteration 1;
    or portions that are disjoint but unequal, or rows that a reader drops as repetitions."""
    toy.build_world(tmp_path / "w", 3, progress=False)
    records = load_preferences(tmp_path / "w/train.jsonl")
    portions = preferences.split_portions(records, 3, 512, seed=3)
    prompts = [{record["prompt"][0]["content"] for record in portion} for portion in portions]
    assert [len(portion) for portion in portions] == [512] * 3
    assert [len(p) for p in prompts] == [32] * 3 and len(set.union(*prompts)) == 96


def test_no_test_prompt_occurs_in_training_and_every_animal_in_both():
    """Bug: test rewards measured on prompts that the loop trained on."""
    train, test = toy.split_prompts()
    assert not set(train) & set(test) and len(set(train)) == 96 and len(set(test)) == 48
    assert {a for _, a in train} == {a for _, a in test} == set(toy.FAMILY_OF)


def test_the_tokenizer_round_trips_the_chat_template(tokenizer):
    """Bugs: pad == end token (masking padding masks every end), role markers split into words, the
    assistant's header missing, prompts of unequal length."""
    chat = chat_template.ChatFormat(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert chat.stop_ids == {tokenizer.eos_token_id}
    assert tokenizer.convert_ids_to_tokens(chat.prompt_ids(FOX)) == [
        "<|user|>", "describe", "the", "fox", "<|end|>", "<|assistant|>"]
    reply = chat.response_ids(FOX, "sly swift")
    assert tokenizer.convert_ids_to_tokens(reply) == ["sly", "swift", "<|end|>"]
    assert chat.text(reply) == "sly swift"
    words = [*toy.VERBS, *toy.FAMILY_OF, *toy.ADJECTIVES]
    assert len(set(words)) == len(words) == 3 + 48 + 24
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words))["input_ids"]


def prompt_tensor(tokenizer):
    return torch.tensor([chat_template.ChatFormat(tokenizer).prompt_ids(FOX)])


def test_the_base_says_common_words_more_often_than_rare_ones(base, tokenizer):
    """Bug: the SFT corpus ignores the ranks, or uses those of another family."""
    for family, animals in toy.FAMILIES.items():
        prompt = [{"role": "user", "content": f"describe the {animals[0]}"}]
        ids = torch.tensor([chat_template.ChatFormat(tokenizer).prompt_ids(prompt)])
        probs = base(ids).logits[0, -1].softmax(-1)
        p = probs[tokenizer.convert_tokens_to_ids(toy.ranked_adjectives(family))].tolist()
        assert p[0] > p[1] > sum(p[2:6]) / 4 > sum(p[6:12]) / 6 > sum(p[12:]) / 12
        assert sum(p) > 0.98
        exact = 1 / sum(rank ** -1.6 for rank in range(1, 25))
        assert abs(p[0] - exact) < 0.1


def test_drawn_replies_follow_the_rank_law():
    """Bug: the second word drawn from another law than successive sampling without replacement."""
    rng, ranked = random.Random(0), toy.ranked_adjectives("birds")
    counts = Counter(toy.draw_reply(rng, "birds") for _ in range(20_000))
    weight = {word: rank ** -1.6 for rank, word in enumerate(ranked, 1)}
    total = sum(weight.values())
    for a, b in itertools.permutations(ranked[:5], 2):
        p = weight[a] / total * weight[b] / (total - weight[a])
        assert abs(counts[f"{a} {b}"] / 20_000 - p) < 4 * math.sqrt(p / 20_000)
    assert not any(counts[f"{a} {a}"] for a in ranked)


def enumerate_measures(model, base, tokenizer, depth):
    """Exact KL and entropy of the first `depth` tokens for the fox, token tree walked in full."""
    vocabulary = len(tokenizer)
    level, logp, base_logp = prompt_tensor(tokenizer), torch.zeros(1), torch.zeros(1)
    kl = entropy = 0.0
    for d in range(depth):
        with torch.no_grad():
            step = model(level).logits[:, -1].log_softmax(-1)
            base_step = base(level).logits[:, -1].log_softmax(-1)
        logp = (logp[:, None] + step).flatten()
        base_logp = (base_logp[:, None] + base_step).flatten()
        token = torch.arange(vocabulary).repeat(len(level))
        level = torch.cat([level.repeat_interleave(vocabulary, 0), token[:, None]], 1)
        ended = token == tokenizer.eos_token_id
        # Leaves: where a reply ends, and everything that is left at full depth.
        leaf = ended if d < depth - 1 else torch.ones_like(ended)
        p = logp[leaf].double().exp()
        kl += (p * (logp - base_logp)[leaf]).sum().item()
        entropy -= (p * logp[leaf]).sum().item()
        level, logp, base_logp = level[~leaf], logp[~leaf], base_logp[~leaf]
    return kl, entropy


def test_kl_and_entropy_equal_the_enumeration_of_the_whole_token_tree(base, tokenizer, monkeypatch):
    """Bugs: the KL with its arguments swapped, steps after the end counted, the last step missed,
    a mean over tokens in place of the sum."""
    monkeypatch.setattr(toy, "MAX_REPLY_TOKENS", 3)
    policy = Shifted(base, tokenizer.eos_token_id)
    kl, entropy = enumerate_measures(policy, base, tokenizer, 3)
    found = toy.true_measures(policy, base, tokenizer, [FOX], samples=4000, seed=0)
    swapped, _ = enumerate_measures(base, policy, tokenizer, 3)
    assert abs(swapped / kl - 1) > 0.2, "the policies are too alike for this test"
    assert found["kl"] == pytest.approx(kl, rel=0.05)
    assert found["entropy"] == pytest.approx(entropy, rel=0.02)


def test_kl_is_exactly_zero_where_the_model_is_the_base(base, tokenizer):
    """Bug: the two models see different inputs."""
    found = toy.true_measures(base, copy.deepcopy(base), tokenizer, [FOX], samples=8)
    assert found["kl"] == 0.0
    assert found["entropy"] > 1


def test_measures_of_a_policy_with_one_reply_are_known_by_hand(base, tokenizer):
    """Bugs in each entry: pooled coverage, endless replies passed as valid, wrong tastes."""
    class OneReply(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, words):
            super().__init__()
            self.reply = tokenizer.convert_tokens_to_ids(words)

        def forward(self, ids, logits_to_keep):
            logits = torch.full((len(ids), 1, len(tokenizer)), -100.0)
            logits[:, 0, self.reply[min(ids.shape[1] - 6, len(self.reply) - 1)]] = 100.0
            return type("Output", (), {"logits": logits})

    crow = [{"role": "user", "content": "describe the crow"}]
    taste = [toy.tastes("default", family) for family in ("beasts", "birds")]
    policy = OneReply(["brave", "calm", "<|end|>"])
    found = toy.true_measures(policy, policy, tokenizer, [FOX, crow], samples=3)
    by_hand = [(t["brave"] + t["calm"]) / 2 for t in taste]
    assert found == pytest.approx({
        "reward": sum(by_hand) / 2, "share_good": sum(r > 0.75 for r in by_hand) / 2, "kl": 0,
        "entropy": 0, "coverage": 2, "invalid": 0}, abs=1e-6)
    for words in (["brave"], ["brave", "<|end|>"], ["<|end|>"], ["the", "calm", "<|end|>"]):
        policy = OneReply(words)  # endless, too short, empty, off the language
        assert toy.true_measures(policy, policy, tokenizer, [FOX], samples=3)["invalid"] == 1


def test_almost_all_samples_of_the_base_are_in_the_language(base, tokenizer):
    """Bug: an SFT that is too short; every later figure would measure its noise."""
    _, test = toy.split_prompts()
    found = toy.true_measures(base, base, tokenizer, [toy.question(*p) for p in test], samples=16)
    assert found["invalid"] < 0.02
    again = toy.true_measures(base, base, tokenizer, [toy.question(*p) for p in test], samples=16)
    assert found == again
