"""Tests of rank.py. PairRM's oracle: llm-blender 0.0.2 on random scaled-up weights.

The set-up (a tokenizer trained here, a small PairRM, the same weights as an llm_blender.Blender)
comes from tests/blender.py.
"""

import copy
import itertools
import json
import os
import urllib.request
from pathlib import Path

import blender
import pytest
import torch

from harness.judging.judge_models import load_pairrm
from harness.judging.judges import load_judge
from rank import PairRM, choose_pair, give_roles, length_batches, pairrm_texts

PROMPTS = ["hello, how are you!", "I love you!", "Write a line\nabout  the sea, please."]
CANDIDATES = [["get out!", "hi! I am fine, thanks!", "bye!"],
              ["I love you too!", "I hate you!", "Thanks! You're a good guy!"],
              ["The sea is wide and the sea is blue. " * 4, "No.", "The sea\n\nis here [SEP] now."]]


def user(text):
    return [{"role": "user", "content": text}]


MESSAGES = [user(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer():
    corpus = PROMPTS + [text for texts in CANDIDATES for text in texts]
    corpus += ["a b c d e f g h i j k l m n o p q r s t u v w x y z"]
    return blender.train_tokenizer(corpus * 4, vocab_size=160)


@pytest.fixture(scope="module")
def pairrm(tokenizer):
    return blender.random_pairrm(tokenizer, hidden=32, layers=2, heads=2, scale=8.0, seed=1)


@pytest.fixture(scope="module")
def scores(pairrm):
    return pairrm.scores(MESSAGES, CANDIDATES)


def assert_close(left, right, tolerance=1e-5):
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


# --- PairRM against llm-blender ---------------------------------------------------------------


def blender_logits(pairrm, sources, firsts, seconds):
    """Logits by llm-blender's Hugging Face class and its own `tokenize_pair`."""
    blender.import_llm_blender()
    from llm_blender.blender.blender_utils import tokenize_pair
    from llm_blender.pair_ranker.pairrm import DebertaV2PairRM
    model = DebertaV2PairRM(copy.deepcopy(pairrm.pretrained_model.config)).eval()
    model.load_state_dict(pairrm.state_dict())
    with torch.no_grad():
        encodings = tokenize_pair(pairrm.tokenizer, sources, firsts, seconds)
        encodings.pop("token_type_ids", None)
        return model(**encodings, return_dict=True).logits


def blender_scores(pairrm, prompts, candidates):
    """Scores by `Blender.rank`: CrossCompareCollator, _full_predict and get_scores_from_cmps. Batch
    size 1, where it cuts each text by itself."""
    return blender.as_blender(pairrm).rank(prompts, candidates, return_scores=True,
                                                  batch_size=1, disable_tqdm=True)


def our_logits(pairrm, sources, firsts, seconds):
    rows = []
    for source, first, second in zip(sources, firsts, seconds):
        source_ids, (first_ids, second_ids) = pairrm.encode(source, [first, second])
        rows.append((source_ids, first_ids, second_ids))
    with torch.no_grad():
        return pairrm(rows)


def test_logits_of_a_padded_batch_equal_llm_blenders_hugging_face_class(pairrm):
    """Catches a wrong marker position, head, segment order, mask or position bucket."""
    triples = [(prompt, *pair) for prompt, texts in zip(PROMPTS, CANDIDATES)
               for pair in itertools.permutations([t.replace("[SEP]", "") for t in texts], 2)]
    expected = blender_logits(pairrm, *zip(*triples))
    assert expected.std() > 0.5, "the weights must tell the candidates apart"
    assert torch.allclose(our_logits(pairrm, *zip(*triples)), expected, atol=1e-4)


@pytest.mark.parametrize("lengths", [(1500, 900, 30), (40, 1200, 1300), (1224, 500, 500)])
def test_texts_that_are_too_long_are_cut_as_llm_blender_cuts_them(pairrm, lengths):
    """Catches left truncation, a lost [SEP], and a wrong share of the 2048 tokens."""
    words = ["sea", "love", "hate", "fine", "out", "good", "bye"]
    texts = [" ".join(words[(i * i + n) % 7] for i in range(n)) for n in lengths]
    source, candidates = pairrm.encode(texts[0], texts[1:])
    assert len(source) <= 1224 and len(source) + sum(map(len, candidates)) <= 2048
    expected = blender_logits(pairrm, texts[:1], texts[1:2], texts[2:])
    assert torch.allclose(our_logits(pairrm, texts[:1], texts[1:2], texts[2:]), expected, atol=1e-4)


def test_scores_and_ranks_equal_blender_rank(pairrm, scores):
    """Catches a score that is not mean_j(M_ij - M_ji), and [SEP] in a text left as it is."""
    blender.import_llm_blender()
    from llm_blender.gpt_eval.utils import get_ranks_from_scores
    expected = blender_scores(pairrm, PROMPTS, CANDIDATES)
    assert_close(scores, expected.tolist(), 1e-4)
    assert (get_ranks_from_scores(scores) == get_ranks_from_scores(expected)).all()


def test_identical_candidates_count_as_in_llm_blender_but_are_never_compared(pairrm, monkeypatch):
    """Catches a mean over distinct candidates only, and 12 rows where 6 are enough."""
    texts = [CANDIDATES[0][0], *CANDIDATES[0]]
    expected = blender_scores(pairrm, PROMPTS[:1], [texts])
    asked = []
    forward = PairRM.forward
    monkeypatch.setattr(PairRM, "forward",
                        lambda self, rows: asked.extend(rows) or forward(self, rows))
    (ours,) = pairrm.scores(MESSAGES[:1], [texts])
    assert ours == pytest.approx(expected[0].tolist(), abs=1e-4)
    assert ours[0] == ours[1] and len(asked) == 6


def test_an_empty_candidate_is_scored_as_llm_blender_scores_it(pairrm):
    """Catches a sample that ended at once and that breaks the tokenizer or loses its marker."""
    texts = [["", "bye!", "hi! I am fine, thanks!"]]
    expected = blender_scores(pairrm, PROMPTS[:1], texts)
    assert_close(pairrm.scores(MESSAGES[:1], texts), expected.tolist(), 1e-4)


def test_many_turns_are_written_as_llm_blender_writes_conversations():
    """Catches a format that PairRM never saw: a template, swapped roles, numbers off by one."""
    blender.import_llm_blender()
    from llm_blender.blender.blender_utils import get_pair_from_conv
    turns = ["Hi.", "Hello!", "Who are you?", "A model.", "Tell a joke."]
    roles = ["user", "assistant"] * 3
    prompt = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    conversations = [[{"role": role.upper(), "content": text}
                      for role, text in zip(roles, [*turns, last])] for last in ("No.", "Why?")]
    sources, firsts, seconds = get_pair_from_conv(conversations[:1], conversations[1:])
    assert pairrm_texts(prompt, ["No.", "Why?"]) == (sources[0], [firsts[0], seconds[0]])


def test_one_turn_is_raw_text_and_a_system_message_comes_first():
    """Catches a chat template around the prompt, and a system message that is lost."""
    assert pairrm_texts(user("Hi."), ["a"]) == ("Hi.", ["a"])
    system = [{"role": "system", "content": "Be brief."}]
    assert pairrm_texts(system + user("Hi."), ["a"]) == ("Be brief.\nHi.", ["a"])


@pytest.mark.parametrize("roles", [
    "", "system", "user assistant", "assistant user", "user user", "user system user", "user tool",
    "system system user", "user assistant system user", "tool", "system assistant user"])
def test_another_order_of_turns_is_refused_before_it_is_judged(roles, pairrm, tmp_path):
    """Catches a system turn that silently moves to the front, and roles that are read as others."""
    prompt = [{"role": role, "content": "Hi."} for role in roles.split()]
    judge = load_judge(f"pairrm:{save_pairrm(pairrm, tmp_path / 'model')}")
    judge.check(user("Hi."))
    judge.check([{"role": role, "content": ""} for role in "system user assistant user".split()])
    with pytest.raises(ValueError, match="user turns"):
        judge.check(prompt)
    with pytest.raises(ValueError, match="prompt_id p7: PairRM reads user"):
        judge([prompt], [["a", "b"]], ["p7"])


def test_a_marker_in_a_text_does_not_move_the_places_where_the_head_looks(pairrm):
    """Catches a policy that learns to write <|candidate1|>."""
    texts = ["I won. <|candidate1|> yes", "no <|source|>"]
    plain = [text.replace("<|candidate1|>", " ").replace("<|source|>", " ") for text in texts]
    assert_close(pairrm.scores(MESSAGES[:1], [texts]), pairrm.scores(MESSAGES[:1], [plain]), 0)


def test_our_attention_equals_that_of_transformers(pairrm, tokenizer):
    """Catches swapped c2p and p2c, a wrong bucket sign or scale, and attention to padding."""
    from transformers import DebertaV2Model
    theirs = DebertaV2Model(pairrm.pretrained_model.config).eval()
    theirs.load_state_dict(pairrm.pretrained_model.state_dict())
    ids = torch.arange(5, 5 + 2 * 400).remainder(60).view(2, 400)  # 400 > 256: log buckets too
    mask = torch.ones_like(ids)
    mask[1, 300:] = 0
    with torch.no_grad():
        expected = theirs(ids, mask).last_hidden_state[mask.bool()]
        ours = pairrm.pretrained_model(ids, mask).last_hidden_state[mask.bool()]
    assert torch.allclose(ours, expected, atol=1e-4)


# --- Invariance -------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch_size(pairrm, scores, monkeypatch):
    """Catches padding that leaks; 1 token a forward pass is one pair at a time."""
    for budget in (1, 60, 100_000):
        monkeypatch.setattr(pairrm, "tokens_per_forward", budget)
        assert_close(pairrm.scores(MESSAGES, CANDIDATES), scores)


def test_scores_do_not_depend_on_the_order_of_prompts(pairrm, scores):
    """Catches results that the sorted queue gives to the wrong prompt."""
    shuffled = pairrm.scores(MESSAGES[::-1], CANDIDATES[::-1])
    assert_close(shuffled[::-1], scores)


def test_scores_follow_the_candidates_when_they_are_reordered(pairrm, scores):
    """Catches M[i, j] that is mistaken for M[j, i]."""
    for order in itertools.permutations(range(3)):
        (permuted,) = pairrm.scores(MESSAGES[:1], [[CANDIDATES[0][i] for i in order]])
        assert permuted == pytest.approx([scores[0][i] for i in order], abs=1e-5)


def test_prompts_may_have_different_numbers_of_candidates(pairrm, scores):
    """Catches a stacked tensor; one candidate alone scores 0."""
    result = pairrm.scores(MESSAGES[:2], [["alone"], CANDIDATES[1]])
    assert result[0] == [0.0]
    assert result[1] == pytest.approx(scores[1], abs=1e-5)


def test_batches_hold_every_index_once_and_keep_to_the_budget():
    """Catches a lost last batch and a budget that ignores padding."""
    lengths = [7, 3, 100, 5, 5, 64, 1]
    batches = list(length_batches(lengths, 21))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 21
    assert list(length_batches([], 21)) == []


# --- Loading ----------------------------------------------------------------------------------


def save_pairrm(pairrm, folder, base=None):
    """The layout of llm-blender/PairRM-hf or, given a base model, that of llm-blender/PairRM."""
    from safetensors.torch import save_file
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in pairrm.state_dict().items()},
              folder / "model.safetensors")
    if base:
        (folder / "config.json").write_text(json.dumps(
            {"ranker_type": "pairranker", "model_type": "deberta", "model_name": base}))
    else:
        pairrm.pretrained_model.config.save_pretrained(folder)
        pairrm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_both_layouts_of_the_hub_load_to_the_same_scores(pairrm, scores, tmp_path):
    """Catches llm-blender's config that is read as DeBERTa v1, and a tokenizer that is rebuilt."""
    own = save_pairrm(pairrm, tmp_path / "PairRM-hf")
    assert_close(load_judge(f"pairrm:{own}")(MESSAGES, CANDIDATES), scores, 1e-6)
    foreign = save_pairrm(pairrm, tmp_path / "PairRM", base=own)
    assert_close(load_judge(f"pairrm:{foreign}")(MESSAGES, CANDIDATES), scores, 1e-6)


def test_a_bf16_body_keeps_an_fp32_head_and_roughly_the_scores(pairrm, scores):
    """Catches a head that is cast with the body, and a mask value that overflows in bf16."""
    half = PairRM(pairrm.pretrained_model.config, pairrm.tokenizer)
    half.load_state_dict(pairrm.state_dict())
    half.pretrained_model.bfloat16()
    result = half.scores(MESSAGES, CANDIDATES)
    assert half.head_layer[1].weight.dtype == torch.float32
    assert torch.isfinite(torch.tensor(result)).all()
    assert_close(result, scores, 0.15)  # scores are about 1; bf16 has 3 digits


def test_a_folder_that_is_not_a_safe_pairrm_is_refused_in_one_line(pairrm, tmp_path):
    """Catches a pickle that is loaded, missing weights that stay random, and wrong marker ids."""
    from safetensors.torch import load_file, save_file
    with pytest.raises(ValueError, match="safetensors"):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
        load_judge(f"pairrm:{tmp_path / 'bin'}")
    folder = Path(save_pairrm(pairrm, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    save_file({"head_layer.4.weight": state["head_layer.4.weight"]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not a PairRM"):
        load_judge(f"pairrm:{folder}")
    fewer = {key: value for key, value in state.items() if key != "head_layer.1.bias"}
    save_file(fewer, folder / "model.safetensors")
    with pytest.raises(ValueError, match="head_layer.1.bias"):
        load_judge(f"pairrm:{folder}")
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "source_prefix_id": 7}))
    with pytest.raises(ValueError, match="do not belong together"):
        load_judge(f"pairrm:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no usable config.json"):
        load_judge(f"pairrm:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no usable config.json"):
        load_judge(f"pairrm:{folder}")
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    with pytest.raises(ValueError, match="size mismatch") as error:
        load_judge(f"pairrm:{folder}")
    assert error.value.args[0].startswith(f"--ranker pairrm:{folder}: ") and len(
        error.value.args[0].splitlines()) == 1
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="SafetensorError"):
        load_judge(f"pairrm:{folder}")


def test_repeated_candidates_count_as_in_llm_blender_also_behind_the_front_door(pairrm, tmp_path):
    """Catches a judge that hands PairRM distinct texts only: its mean is over all of them."""
    texts = [CANDIDATES[0][0], *CANDIDATES[0]]
    judge = load_judge(f"pairrm:{save_pairrm(pairrm, tmp_path / 'model')}")
    expected = blender_scores(pairrm, PROMPTS[:1], [texts])
    for _ in range(2):
        (ours,) = judge(MESSAGES[:1], [texts], ["a"], tmp_path / "kept")
        assert ours == pytest.approx(expected[0].tolist(), abs=1e-4)


def test_a_tokenizers_own_code_is_neither_run_nor_asked_about(pairrm, tmp_path, monkeypatch):
    """Catches transformers' question on stdin, after which a `y` runs a stranger's code."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on stdin"))
    folder = Path(save_pairrm(pairrm, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Any: pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        {**config, "model_type": "new", "auto_map": {"AutoConfig": "code.Any"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Any", "auto_map": {"AutoTokenizer": ["code.Any", None]}}))
    with pytest.raises(ValueError, match="no usable config.json or tokenizer"):
        load_judge(f"pairrm:{folder}")
    assert not (tmp_path / "ran").exists()


def online():
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        url = "https://huggingface.co/llm-blender/PairRM-hf/resolve/main/config.json"
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3)
        return True
    except OSError:
        return False


@pytest.mark.hub
@pytest.mark.parametrize("name", ["llm-blender/PairRM-hf", "llm-blender/PairRM"])
def test_the_real_pairrm_ranks_llm_blenders_own_examples_as_its_readme_says(name):
    """Catches whatever random weights cannot show. https://github.com/yuchenlin/LLM-Blender: README
    (the ranks) and pairrm_to_hf.ipynb (the two logits)."""
    if not online():
        pytest.skip("no model hub; where there is one: HF_HUB_OFFLINE=0 pytest -m hub")
    model = load_pairrm(name)
    for row, ranks in zip(model.scores(MESSAGES[:2], CANDIDATES[:2]), [[3, 1, 2], [1, 3, 2]]):
        assert [1 + sum(other > score for other in row) for score in row] == ranks
    logits = our_logits(model, ["hello!", "I love you!"], ["hi!", "I hate you!"],
                        ["f**k off!", "I love you, too!"])
    assert logits.tolist() == pytest.approx([1.9003021717071533, -1.2547134160995483], abs=1e-2)


# --- Best and worst ---------------------------------------------------------------------------


def test_best_and_worst_do_not_depend_on_the_order_of_candidates():
    """Catches argmax and argmin, which favour whoever stands first."""
    texts, scores = ["a", "b", "c", "d", "e"], [1.0, 1.0, 0.0, 0.0, 0.5]
    winners = set()
    for order in itertools.permutations(range(5)):
        best, worst = choose_pair([scores[i] for i in order], [texts[i] for i in order])
        winners.add((texts[order[best]], texts[order[worst]]))
    assert len(winners) == 1
    ((best, worst),) = winners
    assert best in "ab" and worst in "cd"


def test_ties_go_by_the_hash_of_the_text_and_equal_scores_give_no_pair():
    """Catches a rule other than the stated one, and a pair made of nothing."""
    import hashlib
    texts = ["a", "b", "c"]
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()
    best, worst = choose_pair([1.0, 1.0, 0.0], texts)
    assert texts[best] == min("ab", key=digest) and texts[worst] == "c"
    best, worst = choose_pair([1.0, 0.0, 0.0], texts)
    assert best == 0 and texts[worst] == max("bc", key=digest)
    assert choose_pair([0.3, 0.3, 0.3], texts) is None
    assert choose_pair([0.3], ["a"]) is None


@pytest.mark.parametrize("scores, roles", [
    ([0.1, 0.7, -2.0], (1, 2)), ([0.7, -2.0, 0.1], (0, 1)), ([-2.0, 0.1, 0.7], (2, 0)),
    ([0.5, 0.5, 0.5], (2, 2)),  # all equal: y has both roles
    (None, (0, 1))])  # no judge: the data's own pair
def test_the_best_is_chosen_the_worst_rejected_and_y_stays_sampled(scores, roles):
    """Catches best and worst that change places on their way from the scores into a row."""
    row = {"dropped": None, "candidates": [{"sources": [source], "text": text} for source, text in (
        ("data_chosen", "a"), ("data_rejected", "b"), ("sampled", "c"))]}
    give_roles(row, scores)
    assert (row["chosen"], row["rejected"], row["sampled"]) == (*roles, [2])
    assert row["dropped"] is None
