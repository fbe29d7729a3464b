"""The models behind judges: PairRM's weights, and reward models.

Both are refused unless they can be loaded completely, and no code of a model's folder is run.
PairRM's forward pass is in rank.py. judges.py calls `scores` of either: B message lists and B lists
of K_b candidates -> B lists of K_b floats.
Test: pytest tests/test_judges.py.

Legend: B prompts, K candidates of one, R rows of a forward pass, T tokens of the longest.
"""

import json
import math
from pathlib import Path

import torch

from harness.inputs.files import check_no_pointer
from harness.judging.user_function import explain, one_line
from harness.models.distributed import say
from rank import PairRM, length_batches, pad_rows

# ----------------------------------------------------------------------------------------------
# 1. PairRM's weights
# ----------------------------------------------------------------------------------------------


def load_pairrm(name, device="cpu"):
    """PairRM from a folder or hub id: bf16 body on CUDA, fp32 elsewhere; the head always fp32.

    ValueError if it is not a PairRM, or weights are missing, which would be random.
    """
    from safetensors.torch import load_file
    folder = safetensors_folder(name)
    state = {key: value for file in sorted(folder.glob("*.safetensors"))
             for key, value in load_file(file).items()}
    words, last = "pretrained_model.embeddings.word_embeddings.weight", "head_layer.4.weight"
    if words not in state or last not in state:
        raise ValueError(f"not a PairRM, it lacks {words} or {last}. If it is a reward model, "
                         f"use reward:{name}")
    try:
        config, tokenizer = _pairrm_config(folder)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{folder}: no usable config.json or tokenizer "
                         f"({type(error).__name__}: {error})") from error
    config.vocab_size = state[words].shape[0]
    model = PairRM(config, tokenizer, n_tasks=state[last].shape[0])
    missing, unexpected = model.load_state_dict(state, strict=False)
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]  # old buffer
    if missing or unexpected:
        raise ValueError(f"{folder}: its weights do not fit its config.json: missing "
                         f"{missing[:3]}, unexpected {unexpected[:3]}")
    model.pretrained_model.to(body_dtype(device))
    model.head_layer.float()
    return model.to(device)


def body_dtype(device):
    """The dtype of a judge's body. Heads stay in fp32: bf16 numbers near 20 are 1/8 apart, so
    different candidates would tie."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _pairrm_config(folder):
    """llm-blender/PairRM-hf has a DeBERTa config. llm-blender/PairRM has llm-blender's own, whose
    model_type "deberta" transformers would read as DeBERTa v1. For that one the architecture, and a
    missing tokenizer, come from the base model that it names."""
    from transformers import AutoTokenizer, DebertaV2Config, PreTrainedTokenizerFast
    raw = json.loads((folder / "config.json").read_text())
    base = raw["model_name"] if "ranker_type" in raw else folder
    if (folder / "tokenizer.json").exists():
        # The stored pipeline, unchanged. The DebertaV2Tokenizer of transformers 5 would rebuild it
        # from the vocabulary, without SentencePiece's character normalisation.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    return DebertaV2Config.from_pretrained(base), tokenizer


def safetensors_folder(name):
    """`name` itself if it is a folder, else the hub's snapshot of it. ValueError if there is none,
    if it is not a complete model, or if its weights are not safetensors: a .bin is a pickle, and
    can run code."""
    folder, wanted = Path(name), ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # the hub raises many kinds; for the user all mean the same
            raise ValueError("neither a folder here nor a model that the hub provides "
                             f"({type(error).__name__}: {error})") from error
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: a LoRA adapter, not a complete model; merge it into its base "
                         "model (peft: model.merge_and_unload().save_pretrained(...)), and name "
                         "that")
    for file in sorted(file for pattern in wanted for file in folder.glob(pattern)):
        if not file.is_file():
            raise ValueError(f"{file} is no regular file")
        check_no_pointer(file)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no .safetensors file (a .bin is refused: it can run code); "
                         "convert it, or name another model")
    return folder


# ----------------------------------------------------------------------------------------------
# 2. Reward models
# ----------------------------------------------------------------------------------------------


class RewardModel:
    """Any sequence-classification reward model: chat-templated prompt + candidate -> one scalar."""

    def __init__(self, name, device="cpu", tokens_per_forward=8192):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        try:
            folder = safetensors_folder(name)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=body_dtype(device), output_loading_info=True, trust_remote_code=False,
                use_safetensors=True)
        except Exception as error:
            raise ValueError(
                f"no sequence classifier could be loaded ({explain(error)})") from error
        if model.config.num_labels != 1:
            raise ValueError(f"{model.config.num_labels} outputs; a reward model has 1. Write a "
                             "FILE.py:FUNCTION that loads it and picks one, or weighs them")
        if info["missing_keys"]:  # a language model, to which transformers adds a random head
            raise ValueError(f"no trained head (missing {sorted(info['missing_keys'])})")
        surplus = [key for key in sorted(info["unexpected_keys"])
                   if not key.endswith(("position_ids", "inv_freq"))]  # old buffers
        if surplus:
            raise ValueError(f"{len(surplus)} of its weights have no place in a "
                             f"{type(model).__name__} of its config.json ({surplus[0]}, ...), and "
                             "its scores depend on them; write a FILE.py:FUNCTION that loads it "
                             "as its authors do")
        if not self.tokenizer.chat_template:
            raise ValueError("no chat template; write a FILE.py:FUNCTION that has one")
        head = getattr(model, "score", getattr(model, "classifier", None))
        if isinstance(head, torch.nn.Linear):
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.model, self.tokens_per_forward = model.eval().to(device), tokens_per_forward
        config = model.config.get_text_config()
        self.pad_id, self.begins = config.pad_token_id, self.tokenizer("")["input_ids"][:1]
        self.max_length = self._limit(model, getattr(config, "max_position_embeddings", None))
        self.cut = self.judged = 0

    def _limit(self, model, positions):
        """The most tokens of a conversation. positions: how many the model's config names, or None.

        A tokenizer's model_max_length often comes from an older model, so the larger of the two
        counts. But a table of positions (BERT's) cannot be exceeded."""
        named, words = self.tokenizer.model_max_length, model.get_input_embeddings()
        if named > 1e9:  # how transformers writes "unknown"
            return positions or math.inf
        if not positions or positions == named:
            return named
        table = any(isinstance(module, torch.nn.Embedding) and module is not words
                    and module.num_embeddings >= positions for module in model.modules())
        limit = min(named, positions) if table else max(named, positions)
        say(f"reward model: its tokenizer says at most {named} tokens, its config {positions}; "
            f"{limit} is used, and a longer conversation loses its beginning")
        return limit

    def report(self):
        """Prints how many conversations were cut since the last report."""
        if self.cut:
            say(f"reward model: {self.cut} of {self.judged} conversations have more than its "
                f"{self.max_length} tokens, and were judged without their beginning")
        self.cut = self.judged = 0

    def check(self, prompt):
        """ValueError if the model's own chat template refuses the prompt (a role, an order)."""
        try:
            self.ids(prompt, "a")
        except Exception as error:  # Jinja's, or that of anything that a template calls
            raise ValueError(one_line("the reward model's chat template refuses it: "
                                      + explain(error))) from error

    def ids(self, prompt, text):
        """The conversation's ids, a list, with one BOS if template or tokenizer begin with one."""
        ids = self.tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": text}], return_dict=False)
        bos = [self.tokenizer.bos_token_id]
        if self.begins == bos and ids[:1] != bos:
            return bos + ids
        return ids

    def row(self, prompt, text):
        """The conversation's ids (t,). If it is too long, it loses tokens after the BOS, not those
        of the answer that is judged."""
        ids = self.ids(prompt, text)
        self.judged += 1
        surplus = len(ids) - self.max_length
        if surplus > 0:
            self.cut += 1
            bos = int(ids[0] == self.tokenizer.bos_token_id)
            ids = ids[:bos] + ids[bos + surplus:]
        return torch.tensor(ids)

    @torch.inference_mode()
    def scores(self, prompts, candidates):
        """The judge: B message lists, B lists of K_b strings -> B lists of K_b floats."""
        rows = [self.row(prompt, text)
                for prompt, texts in zip(prompts, candidates, strict=True) for text in texts]
        # A decoder's score is read at the last token that is not padding. Without a padding token
        # in the config transformers refuses batches; a budget of 1 makes batches of one row.
        budget = 1 if self.pad_id is None else self.tokens_per_forward
        values = [0.0] * len(rows)
        for batch in length_batches([len(row) for row in rows], budget):
            ids, mask = pad_rows([rows[i] for i in batch], self.pad_id or 0)  # (R, T)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            # The mask is passed by name: GPT-2's second argument is another one.
            logits = self.model(ids, attention_mask=mask).logits  # (R, 1)
            for i, value in zip(batch, logits[:, 0].tolist()):
                values[i] = value
        values = iter(values)
        return [[next(values) for _ in texts] for texts in candidates]
