"""Throughput of rank.PairRM against llm-blender's own `Blender.rank`: same weights, same texts.

Both get one random PairRM: a layer of PairRM's true width (1024, 16 heads), of which the real one
has 24 alike, so that matrix products and attention have their real shares; what is timed does not
depend on the weights' values. Both get the same prompts, three candidates each, in arrival order;
llm-blender runs at its default batch size 8. They alternate in one process for some rounds, and the
result is the ratio of medians: a busy machine slows both. The largest difference of the scores is
printed too; it is rounding, except where llm-blender cut a text by what else was in its batch.

Data: ../shared/data/prefs_real.jsonl where it exists, else random texts of the same lengths.

Run: python experiments/benchmark_rank.py [--prompts 16] [--rounds 3]     (one JSON line last)
The llm-blender set-up here (tokenizer, random weights, shims) also serves tests/test_rank.py.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from rank import PairRM  # noqa: E402

REAL_DATA = ROOT.parent / "shared" / "data" / "prefs_real.jsonl"


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


def load_rows(count, seed=0):
    """`count` (prompt text, 3 candidates): chosen, rejected, and another row's answer as sample."""
    chooser = random.Random(seed)
    if REAL_DATA.exists():
        rows = [json.loads(line) for line in REAL_DATA.read_text().splitlines()]
        return [(row["prompt"], [row["chosen"][-1]["content"], row["rejected"][-1]["content"],
                                 other["chosen"][-1]["content"]])
                for row, other in zip(chooser.sample(rows, count), chooser.sample(rows, count))]
    # Log-normal lengths with the real rows' medians and 90th percentiles, in words.
    words = ["".join(chooser.choices("abcdefghijklmnop", k=chooser.randint(2, 8)))
             for _ in range(3000)]

    def text(median, spread):
        length = min(1700, max(1, int(median * chooser.lognormvariate(0, spread))))
        return " ".join(chooser.choices(words, k=length))

    return [(text(17, 0.95), [text(266, 0.5), text(189, 0.65), text(266, 0.5)])
            for _ in range(count)]


def run(results=None, prompts=16, rounds=3, hidden=1024, layers=1, heads=16):
    """Measures and returns a dict; `results`: a folder that gets benchmark_rank.json, or None."""
    corpus = [text for prompt, texts in load_rows(150) for text in (prompt, *texts)]
    model = random_pairrm(train_tokenizer(corpus, 6000), hidden, layers, heads)
    blender = as_blender(model)
    texts, candidates = map(list, zip(*load_rows(prompts)))
    messages = [[{"role": "user", "content": text}] for text in texts]
    seconds = {"rank.py": [], "llm-blender": []}
    for _ in range(rounds):
        start = time.perf_counter()
        ours = model.scores(messages, candidates)
        middle = time.perf_counter()
        theirs = blender.rank(texts, candidates, return_scores=True, disable_tqdm=True)
        seconds["rank.py"].append(middle - start)
        seconds["llm-blender"].append(time.perf_counter() - middle)
        print({name: round(values[-1], 1) for name, values in seconds.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    difference = (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item()
    result = {
        "benchmark": "rank", "device": "cpu", "threads": torch.get_num_threads(),
        "data": REAL_DATA.name if REAL_DATA.exists() else "synthetic", "prompts": prompts,
        "pairs": 6 * prompts, "hidden": hidden, "layers": layers, "rounds": rounds,
        "pairs_per_second": round(6 * prompts / median["rank.py"], 2),
        "llm_blender_pairs_per_second": round(6 * prompts / median["llm-blender"], 2),
        "speedup": round(median["llm-blender"] / median["rank.py"], 2),
        "speedup_by_round": [round(theirs / ours, 2) for ours, theirs in zip(*seconds.values())],
        "largest_score_difference": float(f"{difference:.1e}")}
    if results is not None:
        Path(results).mkdir(parents=True, exist_ok=True)
        (Path(results) / "benchmark_rank.json").write_text(json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="prompts to rank (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations (default 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(json.dumps(run(None, arguments.prompts, arguments.rounds)))
