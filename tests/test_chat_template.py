"""ChatFormat over the published shapes of chat templates: the template's own tokens, or a refusal.

The oracle is `apply_chat_template` on the finished conversation, which ChatFormat never tokenises
as a whole with its end. Templates are written anew after their published formats.
"""

import functools
import json
import os
import random
import re
import time

import pytest
from tokenizers import (
    AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from conftest import END_TOKENS, TEMPLATES, make_tokenizer
from harness.inputs.preferences import check_rows
from harness.inputs.chat_template import ChatFormat, load_tokenizer, strip_thought

CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = TEMPLATES["chatml"]
ALTERNATE = ("{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}")
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}")
INST = "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
R1 = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
      "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}"
      "{{ '<|User|>' + m['content'] }}{% endif %}{% endfor %}")
QWEN3 = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
         "{% if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] %}"
         "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}")

# name: (template, the token that ends the assistant's turn, what the template does to a text)
SHAPES = {name: (template, end, str.strip if name == "llama3" else str) for name, template, end in [
    ("zephyr", TEMPLATES["zephyr"], "</s>"), ("llama3", TEMPLATES["llama3"], "<|eot_id|>"),
    ("phi3", TEMPLATES["phi3"], "<|end|>"), ("chatml", CHATML, "<|im_end|>")]} | {
    "phi3_with_eos_behind_all": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        "<|end|>", str),
    "default_system": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML,
        "<|im_end|>", str),
    "trims_content": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + (m['content'] | trim)"
        " + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}", "<|eot|>", str.strip),
    "gemma": (
        NO_SYSTEM + "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{{ '<start_of_turn>' + "
        "('model' if m['role'] == 'assistant' else m['role']) + '\n' + (m['content'] | trim) + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<start_of_turn>model\n' }}{% endif %}", "<end_of_turn>", str.strip),
    "mistral": (
        NO_SYSTEM + "{{ bos_token }}{% for m in messages %}" + ALTERNATE + INST +
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}", "</s>", str),
    "mistral_with_system_in_the_last_user_turn": (
        "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' "
        "else '' %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}", "</s>", str),
    "space_around_answer": (  # and a system turn that it takes for an answer, before any BOS
        "{% for m in messages %}{% if m['role']=='user' %}{{ bos_token + '[INST] ' + m['content']"
        " + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
        "{% endfor %}", "</s>", str),
    "llama2": (
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if "
        "messages[0]['role'] == 'system' else '' %}"
        "{% for m in (messages[1:] if system else messages) %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}", "</s>", str),
    "newline_before_end": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'\n<|im_end|>\n' }}{% endfor %}" + CHATML_PROMPT, "<|im_end|>", str),
    "empty_thought_before_last_answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == "
        "'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}" + CHATML_PROMPT, "<|im_end|>", str),
    "newline_behind_header": (
        CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant'"), "<|im_end|>", str),
    "words_before_end": (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' + ('<|done|>'"
        " if m['role'] == 'assistant' else '') }}{% endfor %}"
        "{{ '### assistant:\n' if add_generation_prompt else '' }}", "<|done|>", str),
    "qwen3": (QWEN3 + "{% if enable_thinking is defined and not enable_thinking %}"
              "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}", "<|im_end|>", str),
    "deepseek_r1": (R1 + "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
                    None, str),
    "deepseek_v3_1": (
        R1.replace("'<|Assistant|>'", "'<|Assistant|></think>'") +
        "{{ '<|Assistant|></think>' if add_generation_prompt else '' }}", "</s>", str),
    "thinks_always": (QWEN3 + "{{ '<think>\n' }}{% endif %}", None, str),
    "glm_with_a_switch": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == "
        "'assistant' and loop.last %}{{ '<think></think>\n' }}{% endif %}{{ m['content'] | trim }}"
        "{% if m['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' + ('<think></think>\n' if "
        "enable_thinking is defined and not enable_thinking else '<think>') }}{% endif %}",
        "<|endoftext|>", str.strip),
    "gpt_oss_channel": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|start|>assistant<|channel|>"
        "final<|message|>' + m['content'] }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{{ '<|start|>assistant' if add_generation_prompt }}",
        "<|return|>", str),
    "an_empty_analysis_before_the_answer": (  # the end token stands in the lead too
        "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}{{ "
        "'<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>' }}"
        "{% else %}{{ '<|message|>' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
        "{{ '<|start|>assistant' if add_generation_prompt else '' }}", "<|end|>", str),
    "command_r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START|>' + m['role'] + ('<|START_RESPONSE|>' "
        "if m['role'] == 'assistant' else '') + m['content'] + ('<|END_RESPONSE|>' if m['role'] "
        "== 'assistant' else '') + '<|END|>' }}{% endfor %}"
        "{{ '<|START|>assistant' if add_generation_prompt else '' }}", "<|END_RESPONSE|>", str),
    "upper_case": (CHATML.replace("m['content']", "m['content'] | upper"), None, str)}
USER = {"role": "user", "content": "the cat sat on the mat"}
SYSTEM = {"role": "system", "content": "you are a cat"}
LONG = [{"role": "user", "content": " how are you?\n"},
        {"role": "assistant", "content": "\nlooked at the moon"}, USER]
CONVERSATIONS = {"one turn": [USER], "system": [SYSTEM, USER], "turns": LONG,
                 "system and turns": [SYSTEM, *LONG]}
TEXTS = ["hello", "\nhello\n", "  hello ", "hello\n\nthere", "hello there 🙂\n", "", " ",
         "</p>\n```"]


@functools.cache
def pieces(specials):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["hello there, how are you? the cat sat on the mat and looked at the moon " * 5],
        trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return core.to_str()


def make(template, adds_bos=False, specials=(), added=()):
    """A byte-level BPE that knows the special tokens that stand in the template; `added`: tokens
    that are not marked as special."""
    found = re.findall(r"<\|\w+\|>|<\w+_of_turn>|\[gMASK\]|<sop>", template)
    if "'<|' + m" in template:
        found += ["<|system|>", "<|user|>", "<|assistant|>"]
    core = Tokenizer.from_str(pieces(tuple(dict.fromkeys(
        ["<pad>", "<s>", "</s>", *found, *specials]))))
    core.add_tokens(list(added))
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", chat_template=template)


def finished_ids(tokenizer, messages, text, end):
    """The oracle: the template's own ids of the whole conversation, up to the last end token."""
    ids = list(tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": text}], tokenize=True, return_dict=False))
    return ids[:len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(end))]


# ----------------------------------------------------------------------------------------------
# Ids
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_and_response_are_the_templates_own_tokens_or_the_model_is_refused(shape):
    """A space, newline, channel or thought that the template puts around an answer is lost; a
    template that trims, or whose prompt opens a thought, is taken for one that does not."""
    template, end, _ = SHAPES[shape]
    tokenizer = make(template)
    if end is None:
        with pytest.raises(ValueError, match="chat template") as refusal:
            ChatFormat(tokenizer)
        assert "\n" not in str(refusal.value)
        return
    chat, equal, refused = ChatFormat(tokenizer), 0, set()
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == end
    for name, messages in CONVERSATIONS.items():
        for text in TEXTS:
            try:
                ids = chat.prompt_ids(messages) + chat.response_ids(messages, text)
            except ValueError as refusal:
                assert "chat template" in str(refusal) and "\n" not in str(refusal)
                refused.add(name)
                continue
            equal += 1
            assert ids == finished_ids(tokenizer, messages, text, end), (name, text)
    system = {"system", "system and turns"}
    assert refused == (system if shape in ("gemma", "mistral", "mistral_with_system_in_the_last_"
                                           "user_turn") else set())
    assert equal == len(TEXTS) * (len(CONVERSATIONS) - len(refused))


def test_thoughts_are_taken_off_in_linear_time_and_as_the_plain_pattern_does():
    """A minute for one row of a stranger's file that repeats an opening tag."""
    chance, pieces = random.Random(0), ["<think>", "</think>", " ", "a", "\n"]
    for _ in range(2000):
        text = "".join(chance.choices(pieces, k=chance.randrange(12)))
        plain = re.sub(r"(\A\s*)?<think>.*?</think>\s*", "", text, flags=re.DOTALL)
        assert strip_thought(text) == ("" if plain.lstrip().startswith("<think>") else plain)
    begin = time.perf_counter()
    assert strip_thought("a</think>" + "<think>" * 40000).startswith("a")  # 30 s in n^2
    assert time.perf_counter() - begin < 1


def test_a_thought_that_the_prompt_opens_is_closed_with_the_templates_switch_and_said():
    """y starts inside a thought that the data's responses never have; or it is closed silently."""
    chat = ChatFormat(make(SHAPES["glm_with_a_switch"][0]))
    assert chat.render([USER], "hello")[0].endswith("<|assistant|>\n<think></think>\n")
    assert "opens a thought" in chat.note and "enable_thinking=False" in chat.note
    assert ChatFormat(make(CHATML)).note is None


@pytest.mark.parametrize("template", [
    SHAPES["glm_with_a_switch"][0], "\n  " + SHAPES["glm_with_a_switch"][0],
    SHAPES["qwen3"][0].replace("assistant\n'", "assistant\n' + ('' if enable_thinking is defined "
                               "and not enable_thinking else '<think>\n')"),
    "{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% macro opened() %}{{ '<think>' if enable_thinking else '' }}{% endmacro %}" + CHATML.replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + opened()")])
def test_a_saved_policy_has_the_switch_in_its_template(template, tmp_path):
    """Thinking switched off in training only: whoever chats with the saved policy meets a prompt
    that it was never trained on. The oracle is transformers' own argument."""
    tokenizer = make(template)
    asked = [tokenizer.apply_chat_template(messages, enable_thinking=False, tokenize=False,
                                           add_generation_prompt=True)
             for messages in CONVERSATIONS.values()]
    chat = ChatFormat(tokenizer)
    assert [chat.render(messages, "hello")[0] for messages in CONVERSATIONS.values()] == asked
    chat.tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert [plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in CONVERSATIONS.values()] == asked
    again = ChatFormat(load_tokenizer(tmp_path))  # a run that starts from it, and sample.py
    assert again.note is None and [again.prompt_ids(messages) for messages in
                                   CONVERSATIONS.values()] == [
        chat.prompt_ids(messages) for messages in CONVERSATIONS.values()]
    assert again.tokenizer.chat_template == chat.tokenizer.chat_template != chat.own_template
    assert chat.own_template == template and "saved policies" in chat.note


def test_many_conversations_in_one_call_give_the_ids_of_single_calls():
    """Results in another order than the conversations, or a prompt's ids given to its neighbour."""
    chat = ChatFormat(make(CHATML, adds_bos=True))
    conversations = list(CONVERSATIONS.values())
    answers = [TEXTS[i:2 * i] for i in range(len(conversations))]  # none, one, two, three
    prompts = [chat.prompt_ids(messages) for messages in conversations]
    assert chat.prompts_ids(conversations) == prompts
    assert chat.encode(conversations, answers) == (prompts, [
        [chat.response_ids(messages, text) for text in texts]
        for messages, texts in zip(conversations, answers)])
    assert chat.encode([], []) == ([], [])


SPLITS = {"bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
          "bytes with a space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
          "metaspace first": (pre_tokenizers.Metaspace(prepend_scheme="first"), None),
          "metaspace always": (pre_tokenizers.Metaspace(prepend_scheme="always"), None),
          "prepend": (None, normalizers.Sequence([normalizers.Prepend("▁"),
                                                  normalizers.Replace(" ", "▁")]))}


@pytest.mark.parametrize("split, kind", [
    (split, kind) for split in SPLITS for kind in ("plain", "normalized", "lstrip", "rstrip")
    if (split, kind) != ("prepend", "normalized")])  # such an end token is none: it is refused
def test_what_stands_before_the_header_has_no_say_in_a_responses_ids(split, kind):
    """Responses are tokenised behind the header alone; where a tokenizer sees further, behind the
    prompt. The oracle is the whole text, tokenised at once."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.normalizer = SPLITS[split]
    core.train_from_iterator(
        ["assistant\nhello there the moon assistant\n hello system\nyou are a cat"] * 5,
        trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"],
                            show_progress=False))
    core.add_special_tokens([AddedToken(
        token, normalized=kind == "normalized", lstrip=kind == "lstrip", rstrip=kind == "rstrip")
        for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        chat_template=CHATML)
    chat = ChatFormat(tokenizer)
    assert (chat.cut is None) == (kind == "normalized")
    for text in TEXTS:
        for messages in CONVERSATIONS.values():
            prompt, response = chat.render(messages, text)
            whole, before = (tokenizer(x, add_special_tokens=False)["input_ids"]
                             for x in (prompt + response, prompt))
            ids = chat.response_ids(messages, text)
            if whole[:len(before)] == before:
                assert ids == whole[len(before):]
            else:
                assert ids == chat._apart(response)


def test_a_token_that_grows_over_the_border_leaves_the_prompt_as_the_sampler_sees_it():
    """The header's newline and the answer's make one token: the prompt loses its last token, and
    the response its newline, or the response starts in the middle of a word."""
    core = Tokenizer(models.BPE(
        vocab={t: i for i, t in enumerate(["<|im_start|>", "<|im_end|>", "<s>", "</s>", "Ċ", "ĊĊ",
                                           "ĊĊĊ", *sorted(set("assistantuserhi:xĠ"))])},
        merges=[("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        chat_template=CHATML)
    chat, hi = ChatFormat(tokenizer), [{"role": "user", "content": "hi"}]
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(chat.prompt_ids(hi))[-1] == "Ċ"
    assert tokens(chat.response_ids(hi, "\n\nhi")) == ["ĊĊ", "h", "i", "<|im_end|>"]
    assert tokens(chat.response_ids(hi, "hi")) == ["h", "i", "<|im_end|>"]


@pytest.mark.parametrize("text", ["Hello", "\nHello"])
def test_sentencepiece_puts_no_space_that_the_policy_would_never_sample(text):
    """Tokenising the response by itself: 'Hello' becomes '▁Hello', but after 'assistant\\n' the
    policy says 'Hello'; the data's responses look unlikely by their first token alone."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", "\n\n", "Hello", "▁Hello", "▁<|assistant|>",
              "<|user|>", "x"]
    core = Tokenizer(models.Unigram([(p, -1.0 if p != "<unk>" else 0.0) for p in pieces], 0))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", chat_template=TEMPLATES["zephyr"])
    by_itself = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(by_itself) == ["▁Hello"]
    ids = ChatFormat(tokenizer).response_ids([{"role": "user", "content": "x"}], text)
    assert tokenizer.convert_ids_to_tokens(ids) == [*text.partition("Hello")[0], "Hello", "</s>"]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("shape", ["zephyr", "llama3", "llama2", "qwen3", "gemma"])
def test_there_is_one_bos_where_template_or_tokenizer_begins_texts_with_one(shape, adds_bos):
    """Zephyr: the tokenizer adds a BOS that its template lacks; the policy sees prompts without.
    Llama-3: both have one, and rendered text that is tokenised gets two."""
    template = SHAPES[shape][0]
    chat = ChatFormat(make(template, adds_bos))
    has_bos = adds_bos or "bos_token" in template
    assert chat.bos_id == (1 if has_bos else None)
    ids = chat.prompt_ids([USER])
    assert ids.count(1) == has_bos and (ids[0] == 1) == has_bos
    assert 1 not in chat.response_ids([USER], "hello")
    short = data.cut_prompt(ids, 5, chat.bos_id)
    assert short == ([1] + ids[-4:] if has_bos else ids[-5:])


def test_a_quoted_end_token_does_not_give_a_second_end():
    """An answer about chat templates that trains the policy to go on behind its own end."""
    chat = ChatFormat(make(CHATML))
    ids = chat.response_ids([USER], "hello <|im_end|> there")
    assert ids.count(chat.end_id) == 1 and ids[-1] == chat.end_id and chat.text(ids) == "hello "


def test_sampling_stops_at_the_end_of_turn_at_eos_and_at_the_models_own_stops():
    """Llama-3 stops at <|eom_id|> too: named in its generation_config only."""
    chat = ChatFormat(make(CHATML, specials=["<|eom_id|>"]), model_stop_ids=[7, 2])
    assert chat.stop_ids == {chat.end_id, 2, 7}


@pytest.mark.parametrize("template, why", [
    ("{% for m in messages %}{{ m['content'] + ' ### ' }}{% endfor %}", "does not close"),
    ("{{ raise_exception('no chat here') }}", "no chat here"),
    ("{{ messages[0]['content'] }}", "does not show"),
    ("{% for m in messages %", "refuses"), ("{{ messages + 1 }}", "refuses"),
    ("{{ messages[0].content }}{{ 'A:' if add_generation_prompt else messages[1].content }}",
     "does not begin with its own prompt")])
def test_a_template_that_cannot_be_used_is_refused_with_its_reason(template, why):
    """A traceback of Jinja's, or responses that never end, found when the run is hours old."""
    with pytest.raises(ValueError, match=why) as refusal:
        ChatFormat(make(template))
    assert "\n" not in str(refusal.value)


def test_an_answer_that_the_template_does_not_close_is_refused():
    """A response without an end among those that have one; its last letter lost, or a traceback."""
    template = CHATML.replace(
        "'<|im_end|>\n'", "('' if m['content'] == 'open' else '<|im_end|>\n')")
    chat = ChatFormat(make(template))
    assert chat.response_ids([USER], "hello")[-1] == chat.end_id
    with pytest.raises(ValueError, match="does not close this answer"):
        chat.response_ids([USER], "open")


def test_a_template_that_never_closes_the_turn_falls_back_to_eos():
    """Responses that cannot end, found out only when every sample hits the length limit."""
    chat = ChatFormat(make("{% for m in messages %}{{ m['content'] + '\n\n' }}{% endfor %}"))
    assert chat.end_id == chat.tokenizer.eos_token_id
    assert chat.tokenizer.decode(chat.response_ids([USER], "hello")) == "hello\n\n</s>"


NEXT_ROLE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
OPEN_AT_THE_END = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
                   "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
                   "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}"
                   "{% endif %}")


@pytest.mark.parametrize("template, stops, end", [
    (NEXT_ROLE, ["</s>", "<|user|>", "<s>"], "<|user|>"), (NEXT_ROLE, ["<|user|>"], "<|user|>"),
    (NEXT_ROLE.replace("{{ '<|'", "{{ '' if loop.first else '\n' }}{{ '<|'").replace(
        "{{ '<|assistant|>", "{{ '\n<|assistant|>"), ["</s>", "<|user|>"], "\n<|user|>"),
    (OPEN_AT_THE_END, ["</s>", "<|im_end|>"], "<|im_end|>"),
    (NEXT_ROLE, ["</s>", "<s>"], "</s>"), (NEXT_ROLE, [], "</s>"), (NEXT_ROLE, [-1], "</s>"),
    ("{{ raise_exception('one question') if messages | length > 2 }}" + NEXT_ROLE,
     ["</s>", "<|user|>"], "</s>")])
def test_where_the_template_leaves_the_end_out_an_answer_ends_as_the_models_own_do(
        template, stops, end):
    """GLM-4: the data's answers end with eos and sampled ones with <|user|>, so that equal answers
    are two candidates, and DPO trains the end token."""
    tokenizer = make(template)
    ids = [i if i == -1 else tokenizer.convert_tokens_to_ids(i) for i in stops]
    chat = ChatFormat(tokenizer, ids)
    sampled = tokenizer("hello there" + end, add_special_tokens=False)["input_ids"]
    assert chat.response_ids([USER], "hello there") == sampled
    assert sampled[-1] == chat.end_id and chat.text(sampled) == "hello there"
    record = {"prompt_id": "1", "prompt": [USER]}
    [row] = data.make_rows([(record, chat.prompt_ids([USER]), [
        ("data_chosen", chat.response_ids([USER], "hello there")), ("sampled", sampled)])], chat)
    assert [(c["sources"], c["finished"]) for c in row["candidates"]] == [
        (["data_chosen", "sampled"], True)]


def test_a_response_ends_with_its_first_stop_token_whichever_that_is():
    """An answer of the data that quotes eos: the policy could say nothing after it, but what
    follows would be trained."""
    chat = ChatFormat(make_tokenizer("chatml"))
    eos = chat.tokenizer.eos_token_id
    ids = chat.response_ids([USER], "hello</s> there")
    assert eos != chat.end_id and ids[-1] == eos and ids.count(eos) == 1 and chat.end_id not in ids


def test_a_model_that_ends_its_turns_as_the_template_never_shows_is_refused():
    """The data's answers end with eos, which this model never says."""
    tokenizer = make(NEXT_ROLE, specials=["<|eom|>"])
    with pytest.raises(ValueError, match="ends its own with <s> or <.eom.>; write that into"):
        ChatFormat(tokenizer, tokenizer.convert_tokens_to_ids(["<s>", "<|eom|>"]))


LONG_ONES = CHATML.replace("m['content']", "({} if m['role'] == 'assistant' and m['content'] | "
                           "length > 17 else m['content'])")
WIDE = "hello there, how are you?"


@pytest.mark.parametrize("changed, fine", [
    ("'TOO LONG'", False), ("m['content'][:17]", False), ("m['content'] | upper", False),
    ("m['content'] + ' (long)'", False), ("m['content'] | replace('  ', ' ')", False),
    ("''", False), ("m['content'] | trim", True), ("' ' + m['content'] + '\n'", True),
    ("'<think>\n\n</think>\n\n' + m['content']", True)])
@pytest.mark.parametrize("name", ["data_chosen", "data_rejected"])
def test_a_template_that_changes_some_answers_is_refused_by_the_row(changed, fine, name, capsys):
    """'TOO LONG' is judged and trained on instead of the answer; a template is tried on one short
    answer only. Spaces around an answer are the template's own business."""
    chat = ChatFormat(make(LONG_ONES.replace("{}", changed)))
    records = [{"prompt": [USER], "data_chosen": "hi", "data_rejected": "moon", "where": "line 1"}]
    records.append(records[0] | {name: WIDE.replace("there,", "there,  "), "where": "line 2"})
    if fine:
        assert check_rows(records, chat) == records
        return
    with pytest.raises(ValueError, match="line 2: the chat template changes this answer; .* where "
                                         ".*--chat-template, or drop such rows") as refusal:
        check_rows(records, chat)
    assert "\n" not in str(refusal.value)
    assert check_rows(records, chat, skip_bad_rows=True) == records[:1]
    assert "1 rows dropped" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [name for name, (_, end, _) in SHAPES.items() if end])
@pytest.mark.parametrize("text", TEXTS)
def test_a_judge_reads_the_answer_without_what_the_template_puts_around_it(shape, text):
    """A judge that scores a channel header, an empty thought, or the template's own spaces."""
    template, _, changed = SHAPES[shape]
    chat = ChatFormat(make(template))
    ids = chat.response_ids([USER], text)
    answers = chat.texts([ids, [], ids[:-1]])
    assert answers[:2] == [changed(text), ""]

    class Slow:  # a tokenizer in Python has no backend that would take many at once
        def __call__(self, *args, **more):
            return chat.tokenizer(*args, **more)

        def __getattr__(self, name):
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(chat.tokenizer, name)
    slow = ChatFormat(Slow())
    assert slow.texts([ids, [], ids[:-1]]) == answers and slow.response_ids([USER], text) == ids


def test_a_tokenizer_file_that_cuts_or_pads_texts_does_not_cut_or_pad_ours(tmp_path):
    """Responses of at most 512 tokens, or all of the length of the longest, because somebody saved
    the tokenizer after a call that cut and padded; transformers' own calls take that back."""
    tokenizer, messages, long = make(CHATML), [USER], "hello there " * 20
    ids = ChatFormat(tokenizer).response_ids(messages, long)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    tokenizer.save_pretrained(tmp_path)
    assert '"truncation": {' in (tmp_path / "tokenizer.json").read_text()
    chat = ChatFormat(load_tokenizer(tmp_path))
    assert len(ids) > 40 and chat.encode([messages], [[long, "hello"]])[1] == [
        [ids, chat.response_ids(messages, "hello")]] and chat.response_ids(messages, long) == ids


def test_an_end_token_that_is_not_marked_as_special_ends_a_response_too():
    """A tokenizer whose chat tokens were added with add_tokens: '</turn>' is read by the judge; or
    a run of spaces, which many tokenizers add as a token, is taken for the end."""
    template = ("{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] }}"
                "{{ '    </turn>' }}{% endfor %}"
                "{{ '<turn>assistant\n' if add_generation_prompt else '' }}")
    chat = ChatFormat(make(template, added=["<turn>", "</turn>", "    ", "moon"]))
    ids = chat.response_ids([USER], "hello moon")
    assert chat.tokenizer.decode(ids) == "hello moon    </turn>" and chat.text(ids) == "hello moon"
    assert ids[-1] == chat.end_id and chat.end == "</turn>"


def test_of_a_cut_response_a_judge_reads_what_is_left_of_it():
    """Text that is judged but not trained on: the tail that the length limit cut off."""
    chat = ChatFormat(make(SHAPES["newline_before_end"][0]))
    ids = chat.response_ids([USER], "hello there\nhow")
    left = ids[:-3]
    assert 0 < len(chat.text(left)) < len("hello there\nhow")
    assert "hello there\nhow".startswith(chat.text(left))
    newline = chat.response_ids([USER], "hello\n")[:-2]  # cut right behind the answer's own newline
    assert chat.text(newline) == "hello\n" and chat.text([]) == ""


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("said, answer", [
    ("<think>\na plan\n</think>\n\nhello", "hello"), ("hello", "hello"),
    ("<think>\n\n</think>\n\n<think>more</think>hello", "hello"),
    ("<think>\nnever closed", ""), ("\n <think>a</think>hello\n", "hello\n"),
    ("say <think> first", "say <think> first"), ("", "")])
def test_a_judge_reads_the_answer_and_not_the_thought(said, answer, special):
    """Thoughts that win the ranking; special tags that vanish and leave the thought behind."""
    chat = ChatFormat(make(CHATML, specials=["<think>", "</think>"] if special else []))
    ids = chat.tokenizer(said + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert chat.text(ids) == strip_thought(said) == answer


@pytest.mark.parametrize("said, answer", [
    ("<|channel|>final<|message|>hello<|return|>", "hello"),
    ("<|channel|>analysis<|message|>a plan<|end|><|start|>assistant<|channel|>final<|message|>hello"
     "<|return|>", "hello"),
    ("<|channel|>final<|message|>wait<|end|><|start|>assistant"
     "<|channel|>final<|message|>hello", "hello"),
    ("<|channel|>analysis<|message|>a plan that was cut", ""), ("hello<|return|>", "hello")])
def test_of_several_channels_a_judge_reads_the_answers(said, answer):
    """gpt-oss: the analysis is judged, or its header is read as part of the answer."""
    chat = ChatFormat(make(SHAPES["gpt_oss_channel"][0]))
    assert chat.text(chat.tokenizer(said, add_special_tokens=False)["input_ids"]) == answer


# ----------------------------------------------------------------------------------------------
# The recipes' templates
# ----------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "how are you?"},
        {"role": "user", "content": "the cat sat"}]


@pytest.fixture(params=sorted(TEMPLATES))
def chat(request):
    tokenizer = make_tokenizer(request.param)
    tokenizer.style = request.param
    return ChatFormat(tokenizer)


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
    ids = chat.prompt_ids(CHAT) + chat.response_ids(CHAT, answer)
    assert list(whole)[:len(ids)] == ids  # a template may add a newline after the end token


@pytest.mark.parametrize("text", ["hello", " hello", "\nhello", "hello </s> there", "", "日本 🙂"])
def test_a_response_ends_with_the_end_token_once_and_has_no_bos(chat, text):
    """A second end token, a BOS in the middle, text lost at the border to the header."""
    if text.find("</s>") > 0:
        text = text.replace("</s>", END_TOKENS[chat.tokenizer.style])
    ids = chat.response_ids(CHAT, text)
    assert ids[-1] == chat.end_id and ids.count(chat.end_id) == 1
    assert chat.tokenizer.bos_token_id not in ids
    text = text.strip() if chat.tokenizer.style == "llama3" else text  # its template trims
    assert chat.tokenizer.decode(ids[:-1]) == text.partition(END_TOKENS[chat.tokenizer.style])[0]


def test_of_several_named_templates_the_default_is_used_or_one_must_be_named(tmp_path):
    """A traceback on models with templates for tools and retrieval beside that for chats, or the
    wrong one of them."""
    tokenizer = make(CHATML)
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "default": CHATML}
    tokenizer.save_pretrained(tmp_path / "named")
    assert load_tokenizer(tmp_path / "named").chat_template == CHATML
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "rag": CHATML}
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="tool_use.*none is the default.*--chat-template"):
        load_tokenizer(tmp_path / "other")


def test_a_model_without_a_chat_template_is_told_what_to_pass(tmp_path):
    """A base model trained on text that no template separates."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--chat-template FILE"):
        load_tokenizer(tmp_path)
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"])
    assert load_tokenizer(tmp_path, tmp_path / "t.jinja").chat_template == TEMPLATES["chatml"]
    with pytest.raises(ValueError, match="absent.jinja: cannot be read .No such file"):
        load_tokenizer(tmp_path, tmp_path / "absent.jinja")
    (tmp_path / "t.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_tokenizer(tmp_path, tmp_path / "t.jinja")


@pytest.mark.parametrize("broken", [
    {"chat_template": 5}, {"chat_template": True}, {"chat_template": []}, {"chat_template": ["x"]},
    {"chat_template": {"default": 5}}, {"chat_template": [{"name": "default", "template": 7}]},
    {"chat_template": "{{ '\ud800' }}"}, {"model_max_length": "x"}, {"eos_token": 5}], ids=str)
def test_a_tokenizer_config_of_the_wrong_shape_is_one_line(broken, tmp_path):
    """A traceback of Python's where a number takes the place of the chat template."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))
    with pytest.raises(ValueError, match="--model .*(chat.template|could be loaded)") as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_chat_template_that_is_no_regular_file_is_refused_at_once(tmp_path):
    """A pipe to which nobody writes: the command hangs without a word."""
    make_tokenizer().save_pretrained(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"--chat-template {path}: .*no regular file"):
            load_tokenizer(tmp_path, path)
