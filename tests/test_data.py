"""Records, the tokenisation contract for four families of chat templates, portions, packing."""

import json

import pytest
import torch

import data
from conftest import END_TOKENS, TEMPLATES, make_tokenizer
from harness import rundir
from harness.rundir import read_jsonl, write_jsonl

CHAT = [{"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "how are you?"},
        {"role": "user", "content": "the cat sat"}]


def row(**changes):
    chosen = CHAT + [{"role": "assistant", "content": "on the mat"}]
    rejected = CHAT + [{"role": "assistant", "content": "at the moon"}]
    return {"prompt": "the cat sat", "prompt_id": "7",
            "chosen": chosen, "rejected": rejected} | changes


# ----------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------


def test_only_the_last_assistant_turn_of_a_long_conversation_is_the_response():
    """Training on the earlier assistant turns, which chosen and rejected share."""
    record = data.parse_record(row(), "x")
    assert record == {"prompt_id": "7", "prompt": CHAT,
                      "data_chosen": "on the mat", "data_rejected": "at the moon"}


@pytest.mark.parametrize("broken, words", [
    ({"chosen": "only a string"}, None),
    ({"rejected": []}, "'rejected' must be"),
    ({"chosen": CHAT}, "'chosen' must be"),
    ({"chosen": "a", "rejected": "b", "prompt": None}, "'prompt'")])
def test_a_malformed_row_is_named_with_its_place_and_field(broken, words):
    """A KeyError deep in the run instead of one line at its start."""
    if words is None:
        assert data.parse_record(row(**broken), "f, line 3")["data_chosen"] == "only a string"
        return
    with pytest.raises(ValueError, match="f, line 3.*" + words):
        data.parse_record(row(**broken), "f, line 3")


def test_a_missing_field_names_what_was_found():
    """An error that does not help to find the misspelt column."""
    broken = row()
    broken["choosen"] = broken.pop("chosen")
    with pytest.raises(ValueError, match="no field 'chosen'.*choosen"):
        data.parse_record(broken, "f, line 3")


def test_a_broken_line_of_a_file_is_named_by_its_number(tmp_path):
    """Blaming the file as a whole when line 3 of 60,000 is at fault."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row()) + "\n\n{oops\n")
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        data.load_records(path)
    with pytest.raises(ValueError, match="no such file"):
        data.load_records(tmp_path / "absent.jsonl")
    path.write_text("\n")
    with pytest.raises(ValueError, match="no preference rows"):
        data.load_records(path)


def test_portions_are_disjoint_of_equal_size_and_repeat_with_the_seed():
    """A prompt that is trained on in two iterations; a shuffle that differs from run to run."""
    records = [{"prompt_id": str(i)} for i in range(100)]
    portions = data.split_portions(records, 3, seed=5)
    ids = [r["prompt_id"] for portion in portions for r in portion]
    assert [len(p) for p in portions] == [33, 33, 33] and len(set(ids)) == 99
    assert data.split_portions(records, 3, seed=5) == portions
    assert data.split_portions(records, 3, seed=6) != portions
    assert [len(p) for p in data.split_portions(records, 3, limit=10)] == [10, 10, 10]
    with pytest.raises(ValueError, match="cannot be split"):
        data.split_portions(records[:2], 3)


def test_repeated_prompts_are_kept_once(tmp_path):
    """Portions that are disjoint as rows but not as prompts."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row()) + "\n")
    assert len(data.load_records(path)) == 1


def test_the_real_preference_file_parses(real_preferences):
    """A schema of UltraFeedback-binarized that the parser does not know."""
    records = data.load_records(real_preferences)
    assert len(records) == 600 and all(r["prompt"][-1]["role"] == "user" for r in records)


# ----------------------------------------------------------------------------------------------
# The tokenisation contract
# ----------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(TEMPLATES))
def chat(request):
    tokenizer = make_tokenizer(request.param)
    tokenizer.style = request.param
    return data.ChatFormat(tokenizer)


def test_the_end_token_is_the_templates_own(chat):
    """Ending Llama-3 or ChatML turns with eos_token: the policy would never learn to stop."""
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == END_TOKENS[chat.tokenizer.style]


def test_a_prompt_has_exactly_the_bos_of_its_template_and_ends_with_the_header(chat):
    """A second BOS from tokenising rendered text; a header that ends up among the labels."""
    ids = chat.prompt_ids(CHAT)
    text = chat.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert chat.tokenizer.decode(ids) == text
    assert ids.count(chat.tokenizer.bos_token_id) == text.count("<s>")
    assert ids.count(chat.tokenizer.bos_token_id) == (chat.tokenizer.style in ("llama3", "phi3"))
    assert text.rstrip("\n").endswith(
        ("assistant|>", "assistant<|end_header_id|>", "<|im_start|>assistant"))


def test_prompt_plus_response_is_the_rendered_conversation(chat):
    """Ids that differ from what the template would give: a lost newline, a doubled end token."""
    answer = "how are you?"
    whole = chat.tokenizer.apply_chat_template(
        CHAT + [{"role": "assistant", "content": answer}], tokenize=True, return_dict=False)
    ids = chat.prompt_ids(CHAT) + chat.response_ids(answer)
    assert list(whole)[:len(ids)] == ids  # a template may add a newline after the end token


@pytest.mark.parametrize("text", ["hello", " hello", "\nhello", "hello </s> there", "", "日本 🙂"])
def test_a_response_ends_with_the_end_token_once_and_has_no_bos(chat, text):
    """A second end token, a BOS in the middle, text lost at the border to the header."""
    if text.find("</s>") > 0:
        text = text.replace("</s>", END_TOKENS[chat.tokenizer.style])
    ids = chat.response_ids(text)
    assert ids[-1] == chat.end_id and ids.count(chat.end_id) == 1
    assert chat.tokenizer.bos_token_id not in ids
    quoted = text.partition(END_TOKENS[chat.tokenizer.style])[0]
    assert chat.tokenizer.decode(ids[:-1]) == quoted


def test_sentencepiece_puts_no_space_that_the_policy_would_never_sample():
    """Tokenising the response by itself: 'Hello' becomes '▁Hello', but after 'assistant\\n' the
    policy says 'Hello'; the data's responses look unlikely by their first token alone."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", "Hello", "▁Hello", "▁<|assistant|>", "<|user|>",
              "x"]
    core = Tokenizer(models.Unigram([(p, -1.0 if p != "<unk>" else 0.0) for p in pieces], 0))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", chat_template=TEMPLATES["zephyr"])
    chat = data.ChatFormat(tokenizer)
    by_itself = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(by_itself) == ["▁Hello"]
    assert tokenizer.convert_ids_to_tokens(chat.response_ids("Hello")) == ["Hello", "</s>"]


def test_a_template_that_never_closes_the_turn_falls_back_to_eos_or_is_refused():
    """Responses that cannot end, found out only when every sample hits the length limit."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert data.ChatFormat(tokenizer).end_id == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ### ' }}{% endfor %}"
    with pytest.raises(ValueError, match="does not close the assistant's turn"):
        data.ChatFormat(tokenizer)


def test_a_model_without_a_chat_template_is_told_what_to_pass(tmp_path):
    """A base model trained on text that no template separates."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--chat-template FILE"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"])
    assert data.load_tokenizer(tmp_path, tmp_path / "t.jinja").chat_template == TEMPLATES["chatml"]
    with pytest.raises(ValueError, match="no such file"):
        data.load_tokenizer(tmp_path, tmp_path / "absent.jinja")


def test_prompts_are_cut_from_the_left_and_all_responses_from_the_right_by_one_rule():
    """Cutting the question off instead of the oldest context, or giving y more room than y_w."""
    prompt, responses = data.cut(list(range(10)), [[1] * 9, [2] * 3, [3] * 7], 4, 9)
    assert prompt == [6, 7, 8, 9]
    assert responses == [[1] * 5, [2] * 3, [3] * 5]


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
    groups = data.plan_micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget


@pytest.mark.parametrize("budget", [1, 12, 30, 1000])
def test_plain_rows_stay_within_the_budget_with_their_padding(budget):
    """A budget that counts real tokens while memory pays for padded ones."""
    sizes = [(3, (4, 2)), (1, (9,)), (5, (1, 1, 1)), (2, (2, 7)), (4, (3,))]
    trees = [data.Tree([1] * p, [[2] * n for n in ns], 0, 0, []) for p, ns in sizes]
    groups = data.plan_plain_rows(trees, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(trees)))
    for group in groups:
        assert len(group) == 1 or data.pad([trees[i] for i in group]).input_ids.numel() <= budget


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """A half-written phase file that the resumed run takes for a finished one."""
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])
    monkeypatch.setattr(
        rundir.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        write_jsonl(path, [{"a": 2}] * 1000)
    assert [r for _, r in read_jsonl(path)] == [{"a": 1}]
