"""The toy world: a tiny language, its base model, and the true reward that a real run never sees.

    prompt    describe the fox          (3 verbs x 48 animals, in 4 families of 12)
    reply     sly swift <|end|>         (2 of 24 adjectives)

  language  In each family the adjectives have a fixed random rank. A reply is two of them without
            replacement, p ~ rank^-1.6. So the base model (SFT) says some words often and some
            hardly ever, like a real one. The language is the same for all seeds and variants.
  reward    In each family every adjective has a hidden taste in [0, 1]. The reward of a reply is
            the mean taste of its two words, so it is in [0, 1]. `oracle` replaces PairRM.
  variants  "default": about half of the words are good (0.75 .. 1) and half bad (0 .. 0.25): one
            each of ranks 2 and 3, of ranks 4 and 5, ...; in every other family the good one comes
            first. The commonest word is poor (0.1), which leaves room for a visible gain. But then
            it is right to push down what the model says by habit, as the optimism term does. So a
            higher reward with alpha > 0 proves little in this world.
            "neutral": the same, but the commonest word is average (0.5). Less room for a gain, and
            no advantage for the term.
            "0.8", or any number in [0, 1]: the same with this taste of the commonest word.
            "rare": the best words are those that the base model hardly ever says; an ablation.

Its purpose: the loop runs in a second, with the same inputs as for a real model (a Hugging Face
folder, a JSONL preference file, a ranker), and `true_measures` gives what a real run cannot know:
the true reward, the KL from the base model, the entropy, the words still in use. It shows nothing
about judges that err, long replies, or many prompts: 48 are held out as test prompts, the training
rows repeat the other 96 with new pairs, and an iteration sees 32 of them.

The loop is in train_loop.py. Runs on real models use nothing of this file.
Test: pytest tests/test_toy.py.
Build by hand: python -c "from harness.inputs import toy; toy.build_world('w', 0)"

Legend: B prompts, S samples of each, V vocabulary.
"""

import json
import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.runs.output_files import write_jsonl, write_text

# ----------------------------------------------------------------------------------------------
# 1. Words, how common they are, and how good
# ----------------------------------------------------------------------------------------------

VERBS = "describe portray sketch".split()
FAMILIES = {
    "beasts": "fox wolf bear lion tiger horse rabbit deer otter badger mouse camel".split(),
    "birds": "owl eagle hawk crow robin swan heron finch gull stork parrot raven".split(),
    "fish": "shark eel trout salmon cod pike carp tuna herring perch mackerel ray".split(),
    "insects": "ant bee wasp moth beetle cricket fly locust flea hornet gnat mantis".split()}
ADJECTIVES = ("sly swift brave calm fierce gentle clever loud quiet proud shy bold graceful clumsy "
              "lazy eager wild tame noble playful patient stubborn hungry lonely").split()
FAMILY_OF = {animal: family for family, animals in FAMILIES.items() for animal in animals}
VARIANTS = ("default", "neutral", "rare")  # and any number, see commonest_taste
RANK_EXPONENT = 1.6
GOOD_REWARD = 0.75  # `share_good` counts the replies above it

SFT_STEPS, SFT_BATCH, SFT_LR = 400, 32, 5e-3
TRAIN_ROWS = 3 * 512  # three iterations of 512 prompts
CONTEXT = 64  # tokens of prompt + reply that its model has positions for
MAX_REPLY_TOKENS = 8  # a reply needs 3; one that does not stop by then is not in the language


def ranked_adjectives(family):
    """The 24 adjectives of a family, most common first."""
    return random.Random(f"rank {family}").sample(ADJECTIVES, len(ADJECTIVES))


def tastes(variant, family):
    """adjective -> hidden taste in [0, 1]."""
    ranked, words = ranked_adjectives(family), len(ADJECTIVES)
    # Values are distinct where possible: equal rewards give no preference.
    if variant != "rare":
        order, pairs = list(FAMILIES).index(family), words // 2
        rng = random.Random(f"taste {family}")
        bad = rng.sample([0.25 * i / (pairs - 1) for i in range(pairs)], pairs)
        good = rng.sample([1 - taste for taste in bad], pairs)
        values = [commonest_taste(variant)]
        for i in range(pairs):  # ranks 2 and 3, 4 and 5, ...; 25 does not exist
            values += [good[i], bad[i]] if (i + order) % 2 else [bad[i], good[i]]
    else:
        middle = words - 8
        values = [0.5] * 4 + [0.25 * i / middle for i in range(middle)] + [1.0] * 4
    return dict(zip(ranked, values))


def commonest_taste(variant):
    """The taste of the base model's commonest word; the higher, the less there is to gain."""
    try:
        taste = {"default": 0.1, "neutral": 0.5}.get(variant) or float(variant)
        assert 0 <= taste <= 1
        return taste
    except (ValueError, AssertionError):
        raise ValueError(f"toy variant '{variant}' is unknown; there are {', '.join(VARIANTS)} and "
                         "any number from 0 to 1") from None


def draw_reply(rng, family):
    """One reply of the SFT distribution: two adjectives without replacement, p ~ rank^-1.6."""
    words = ranked_adjectives(family)
    weights = [rank ** -RANK_EXPONENT for rank in range(1, len(words) + 1)]
    first, second = rng.choices(words, weights, k=2)
    while second == first:
        second = rng.choices(words, weights)[0]
    return f"{first} {second}"


def is_valid(reply):
    """Whether a reply is in the language: two adjectives. Twice the same one is poor, but valid: so
    are about 3 % of the base model's replies, because a tied embedding favours repetition."""
    words = reply.split()
    return len(words) == 2 and set(words) <= set(ADJECTIVES)


def family_of(messages):
    """The family of the animal that the last turn names; None if it names none."""
    return next((FAMILY_OF[w] for w in messages[-1]["content"].split() if w in FAMILY_OF), None)


def said_before(messages):
    """The words of the assistant's earlier turns."""
    return {word for turn in messages if turn["role"] == "assistant"
            for word in turn["content"].split()}


def oracle(variant="default"):
    """The true reward as a ranker: (prompts, candidates) -> list of lists of float in [0, 1].

    Reward = sum of the tastes of the distinct adjectives / max(2, words). Defined for any string:
    an unknown word adds nothing, and a repeated one counts once (one of an earlier turn not at
    all). More than two words lower the mean; a plain sum would reward length, and the loop would
    exploit that. An unknown animal scores 0.
    """
    by_family = {family: tastes(variant, family) for family in FAMILIES}

    def reward(messages, reply):
        taste, words = by_family.get(family_of(messages), {}), reply.split()
        new = set(words) - said_before(messages)
        return sum(taste.get(word, 0.0) for word in sorted(new)) / max(2, len(words))

    return lambda prompts, candidates: [
        [reward(messages, reply) for reply in replies]
        for messages, replies in zip(prompts, candidates, strict=True)]


# ----------------------------------------------------------------------------------------------
# 2. The base model
# ----------------------------------------------------------------------------------------------

CHAT_TEMPLATE = ("{% for message in messages %}"
                 "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def make_tokenizer():
    """One token a word, so all prompts are equally long. Padding has its own token: if that were
    the end token, code that masks padding by id would mask every end of turn."""
    specials = ["<pad>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = [*specials, "the", *VERBS, *FAMILY_OF, *ADJECTIVES]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, width=64):
    """A Llama of 0.1 M parameters with random weights (drawn from torch's global generator)."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=0.1,  # 0.02 suits wide layers; here it is slow
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def question(verb, animal):
    return [{"role": "user", "content": f"{verb} the {animal}"}]


def second_turns(prompts, conversations, seed):
    """(verb, animal)s -> for each, `conversations` message lists that ask a second time, with
    another verb. The first answer is drawn like an SFT reply; its words earn no reward again
    (`oracle`)."""
    rng, result = random.Random(f"conversations {seed}"), []
    for verb, animal in prompts * conversations:
        first = rng.choice([other for other in VERBS if other != verb])
        result.append([*question(first, animal),
                       {"role": "assistant", "content": draw_reply(rng, FAMILY_OF[animal])},
                       *question(verb, animal)])
    return result


def render(tokenizer, prompts):
    """Message lists -> ids (B, T) up to and including the assistant's header."""
    rows = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert len(set(map(len, rows))) == 1, "toy prompts have equal lengths; pad others yourself"
    return torch.tensor(rows)


def train_base(seed, progress=True, width=64, prompts=None):
    """(model, tokenizer): SFT from random weights, loss on the reply only. prompts: message lists
    of equal lengths, by default the 144 questions. A reply depends on the last turn alone."""
    rng = random.Random(f"sft {seed}")
    tokenizer = make_tokenizer()
    prompts = prompts or [question(verb, animal) for verb in VERBS for animal in FAMILY_OF]
    prompt_ids = render(tokenizer, prompts)  # (144, 6)
    picks = rng.choices(range(len(prompts)), k=SFT_STEPS * SFT_BATCH)
    replies = [draw_reply(rng, family_of(prompts[i])) + tokenizer.eos_token for i in picks]
    reply_ids = torch.tensor(tokenizer(replies)["input_ids"])  # (steps * batch, 3)
    ids = torch.cat([prompt_ids[picks], reply_ids], dim=1)  # (steps * batch, 9)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator unchanged
        torch.manual_seed(seed)
        model = make_model(tokenizer, width)
    labels = ids.clone()
    labels[:, :prompt_ids.shape[1]] = -100  # transformers shifts them by one itself
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SFT_LR, SFT_STEPS, pct_start=0.1)
    batches = zip(ids.split(SFT_BATCH), labels.split(SFT_BATCH))
    for batch, batch_labels in tqdm(batches, "toy SFT", SFT_STEPS, disable=not progress):
        model(batch, labels=batch_labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


# ----------------------------------------------------------------------------------------------
# 3. A world in a folder
# ----------------------------------------------------------------------------------------------


def split_prompts():
    """(96 training prompts, 48 test prompts) as (verb, animal). Each animal is tested with the verb
    that preference training never shows for it. SFT saw them all."""
    pairs = [(verb, animal) for verb in VERBS for animal in FAMILY_OF]
    held_out = {(VERBS[i % len(VERBS)], animal) for i, animal in enumerate(FAMILY_OF)}
    return [p for p in pairs if p not in held_out], [p for p in pairs if p in held_out]


def preference_rows(prompts, variant, name):
    """One UltraFeedback-binarized row a prompt (messages): two replies of the SFT distribution, of
    which the true reward chooses one. Replies with equal rewards are drawn again, and so are those
    that repeat an earlier row, which a reader of rows would leave out. name: the seed."""
    rng, ranker = random.Random(name), oracle(variant)
    rows, known = [], set()
    for i, messages in enumerate(prompts):
        prompt = [turn["content"] for turn in messages]
        while True:
            replies = [draw_reply(rng, family_of(messages)) for _ in range(2)]
            [scores] = ranker([messages], [replies])
            content = (*prompt, *sorted(replies))
            if scores[0] != scores[1] and content not in known:
                break
        known.add(content)
        row = {"prompt": prompt[0], "prompt_id": f"{name} {i}"}
        for role, (score, reply) in zip(("rejected", "chosen"), sorted(zip(scores, replies))):
            row[role] = [*messages, {"role": "assistant", "content": reply}]
            row[f"score_{role}"] = score
        rows.append(row)
    return rows


def build_world(folder, seed, *, variant="default", prompts=TRAIN_ROWS, progress=True):
    """Writes folder/base (Hugging Face), train.jsonl (`prompts` rows), test.jsonl (48 rows).

    The same (seed, variant, prompts) and thread count give the same world, bit for bit; its base
    model depends on the seed only. Returns at once if the folder already holds this world.
    ValueError if it holds anything else. A killed build leaves no folder, because the files are
    first written under a temporary name.
    """
    folder = Path(folder)
    tastes(variant, "birds")  # an unknown variant fails here, not after the SFT
    world = {"seed": seed, "variant": variant, "prompts": prompts,
             "sft": [SFT_STEPS, SFT_BATCH, SFT_LR]}
    if folder.exists() and any(folder.iterdir()):
        record = folder / "world.json"
        if record.is_file() and json.loads(record.read_text()) == world:
            return
        raise ValueError(f"{folder} is not the toy world {world}; remove it or name another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed
    unfinished.mkdir(parents=True)
    model, tokenizer = train_base(seed, progress)
    model.save_pretrained(unfinished / "base")
    tokenizer.save_pretrained(unfinished / "base")
    train, test = split_prompts()
    for name, pairs in (("train", repeated(train, prompts, seed)), ("test", test)):
        rows = preference_rows([question(*pair) for pair in pairs], variant,
                               f"toy {variant} {seed} {name}")
        write_jsonl(unfinished / f"{name}.jsonl", rows)
    write_text(unfinished / "world.json", json.dumps(world))
    os.replace(unfinished, folder)


def repeated(prompts, rows, seed):
    """`rows` prompts in an order drawn by seed, each prompt equally often. So three disjoint
    portions of 32 prompts have 512 rows each."""
    order = random.Random(f"prompts {seed}").sample(prompts, len(prompts))
    return [order[i % len(order)] for i in range(rows)]


def textbook_world(seed, rows, portions=3):
    """The same without files, for textbook.py -> (model, tokenizer, portions of records, test
    prompts). A record is {"prompt": messages, "data_chosen": text, "data_rejected": text}."""
    model, tokenizer = train_base(seed)
    train, test = split_prompts()
    order = repeated(train, len(train), seed)
    share = len(train) // portions
    result = []
    for k in range(portions):
        prompts = [question(*prompt) for prompt in
                   repeated(order[k * share:(k + 1) * share], rows, seed)]
        result.append([{"prompt": row["chosen"][:-1], "data_chosen": row["chosen"][-1]["content"],
                        "data_rejected": row["rejected"][-1]["content"]}
                       for row in preference_rows(prompts, "default", f"textbook {seed} {k}")])
    return model, tokenizer, result, [question(*prompt) for prompt in test]


# ----------------------------------------------------------------------------------------------
# 4. What a real run cannot know
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def true_measures(model, base_model, tokenizer, prompts, *, variant="default", samples=16, seed=0):
    """Draws `samples` replies a prompt (message lists) at temperature 1; a dict of floats:

    reward      mean true reward, in [0, 1]
    share_good  share of replies with a true reward above GOOD_REWARD (0.75)
    kl          KL(model || base) in nats a reply: the sum of the exact KL of every next-token
                distribution along each sampled reply (Rao-Blackwell). It has the same mean as the
                log-ratios, far less variance, and is never negative.
    entropy     of the model, in nats a reply, in the same way
    coverage    words in use: exp(entropy of the adjectives' frequencies) in each family, mean over
                the families. (Over all replies together, two words in each of four families would
                look like eight.) Between 1 and 24; 0 if no adjective was said at all.
    invalid     share of replies that are not two adjectives and the end token
    """
    ids = render(tokenizer, prompts).repeat_interleave(samples, 0).to(model.device)  # (B*S, T)
    replies, kl, entropy = sample_replies(model, base_model, ids, tokenizer.eos_token_id, seed)
    texts = [text.partition(tokenizer.eos_token) for text in tokenizer.batch_decode(replies)]
    owners = [messages for messages in prompts for _ in range(samples)]
    rewards = sum(oracle(variant)(owners, [[reply] for reply, _, _ in texts]), [])
    said = {family: Counter() for family in FAMILIES}
    for messages, (reply, _, _) in zip(owners, texts):
        said[family_of(messages)].update(word for word in reply.split() if word in ADJECTIVES)
    used = [perplexity(counts) for family, counts in said.items()
            if family in map(family_of, prompts)]
    return {"reward": sum(rewards) / len(rewards),
            "share_good": sum(r > GOOD_REWARD for r in rewards) / len(rewards),
            "kl": kl.mean().item(), "entropy": entropy.mean().item(),
            "coverage": sum(used) / len(used),
            "invalid": sum(not (end and is_valid(reply)) for reply, end, _ in texts) / len(texts)}


def sample_replies(model, base_model, ids, end_id, seed):
    """Prompts of one length (N, T) -> a reply to each, at most (N, MAX_REPLY_TOKENS), and along it
    the exact KL(model || base) and the model's entropy, (N,) nats each."""
    generator, start = torch.Generator().manual_seed(seed), ids.shape[1]
    alive = torch.arange(len(ids), device=ids.device)  # the replies that have not ended, (n,)
    kl, entropy = torch.zeros(2, len(ids), device=ids.device)
    while len(alive) and ids.shape[1] < start + MAX_REPLY_TOKENS:
        prefixes, which = ids[alive].unique(dim=0, return_inverse=True)  # few distinct ones
        logps, base_logps = (
            m(prefixes, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)[which]
            for m in (model, base_model))  # (n, V)
        kl[alive] += (logps.exp() * (logps - base_logps)).sum(-1)
        entropy[alive] -= (logps.exp() * logps).sum(-1)
        # Random numbers for all rows, so that they do not depend on which replies have ended.
        chances = torch.ones(len(ids), logps.shape[1])
        chances[alive.cpu()] = logps.exp().cpu()
        token = torch.multinomial(chances, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, token], dim=1)  # after its end a reply gets noise, which is ignored
        alive = alive[token[alive, 0] != end_id]
    return ids[:, start:], kl, entropy


def perplexity(counts):
    """exp(entropy) of a Counter: the number of equally frequent words that would be as diverse."""
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return math.exp(entropy) if total else 0.0
