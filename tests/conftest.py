"""Shared by all tests: paths, threads, tiny random models of the recipes' architectures."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that waits for a hub's time-out helps nobody
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config,
    PreTrainedTokenizerFast, Qwen2Config, Qwen3Config)

from harness.runs import plots  # noqa: E402

torch.set_num_threads(1)  # on matrices this small a second thread only waits for the first
VOCABULARY = 384
DRAW_ALL = plots.draw_all

SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=9),  # shorter than the test rows
    "phi3": lambda: Phi3Config(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=7, final_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention"])}

# The chat templates of the recipes' models, written anew after their published formats.
TEMPLATES = {
    "zephyr": ("{% for m in messages %}"
               "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
               "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"),
    "llama3": ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
               "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
               "{% if add_generation_prompt %}"
               "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    "phi3": ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + "
             "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|assistant|>\n' }}{% endif %}"),
    "chatml": ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
               "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|im_start|>assistant\n' }}{% endif %}")}
END_TOKENS = {"zephyr": "</s>", "llama3": "<|eot_id|>", "phi3": "<|end|>", "chatml": "<|im_end|>"}


def make_tokenizer(style="chatml"):
    """A byte-level BPE of 384 tokens with the special tokens and chat template of one family."""
    specials = ["<pad>", "<s>", "</s>"]
    specials += {"zephyr": [], "chatml": ["<|im_start|>", "<|im_end|>"],
                 "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                 "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]}[style]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["hello there, how are you? the cat sat on the mat and looked at the moon " * 5],
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", additional_special_tokens=specials[3:])
    tokenizer.chat_template = TEMPLATES[style]
    return tokenizer


def make_model(architecture="llama", scale=6.0, seed=0):
    """A tiny random model. Weights are scaled up: at the usual 0.02 all logits are nearly equal,
    and a wrong mask or a missing shift would hardly show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](),
                                             attn_implementation="selm_tree").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Figures take most of the time of a tiny run, so runs inside of a test's process draw none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_all", lambda runs, folder: [])
        yield


@pytest.fixture
def figures(monkeypatch):
    """For a test whose subject is the figures: they are drawn."""
    monkeypatch.setattr(plots, "draw_all", DRAW_ALL)


@pytest.fixture
def real_preferences():
    path = ROOT.parent / "shared/data/prefs_real.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/prefs_real.jsonl is not here")
    return path
