"""llm-blender's own PairRM, the oracle of test_rank.py: tokenizer, random weights, its class.

No package index has PairRM's weights. So both sides get one small random PairRM of its shape.
"""

import json

import torch

from rank import PairRM


def import_llm_blender():
    """llm-blender 0.0.2 beside transformers 5: two names that it needs are gone; put them back."""
    import transformers.utils.hub
    from transformers import PreTrainedTokenizerBase
    transformers.utils.hub.TRANSFORMERS_CACHE = "unused"
    PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__
    import llm_blender
    return llm_blender


def train_tokenizer(texts, vocab_size=2000):
    """A DeBERTa-v2-style tokenizer (Unigram, [CLS] text [SEP]) trained on `texts`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import DebertaV2Tokenizer
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="[UNK]", show_progress=False))
    vocab = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    return DebertaV2Tokenizer(vocab=vocab, unk_id=3)


def random_pairrm(tokenizer, hidden, layers, heads, scale=4.0, seed=0):
    """A PairRM in deberta-v3's shape, but small. `scale` multiplies the matrices: under the default
    initialisation all logits are nearly equal and every comparison passes."""
    from transformers import DebertaV2Config
    tokenizer.add_tokens(list(PairRM.MARKERS))
    ids = dict(zip(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"),
                   tokenizer.convert_tokens_to_ids(list(PairRM.MARKERS))))
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * hidden, max_position_embeddings=512,
        position_buckets=256, relative_attention=True, max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
        position_biased_input=False, type_vocab_size=0, layer_norm_eps=1e-7, pad_token_id=0,
        n_tasks=1, drop_out=0.05, sep_token_id=tokenizer.sep_token_id, **ids)
    torch.manual_seed(seed)
    model = PairRM(config, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= scale
    return model


def as_blender(model):
    """The same weights and tokenizer as an llm_blender.Blender whose ranker is loaded."""
    from transformers import DebertaV2Model
    llm_blender = import_llm_blender()
    from llm_blender.blender.config import BlenderConfig
    from llm_blender.pair_ranker.collator import CrossCompareCollator
    from llm_blender.pair_ranker.config import RankerConfig
    from llm_blender.pair_ranker.ranker import CrossCompareReranker
    body = DebertaV2Model(model.pretrained_model.config)
    body.config.out_hidden_state_size = body.config.hidden_size
    blender = llm_blender.Blender(BlenderConfig(device="cpu", use_tqdm=False))
    blender.ranker_config = RankerConfig(
        ranker_type="pairranker", model_type="deberta", source_maxlength=1224,
        candidate_maxlength=412, n_tasks=1, device="cpu", load_checkpoint="")
    blender.ranker_collator = CrossCompareCollator(1224, model.tokenizer, 412)
    blender.ranker = CrossCompareReranker(body, blender.ranker_config, model.tokenizer).eval()
    blender.ranker.load_state_dict(model.state_dict())
    return blender
