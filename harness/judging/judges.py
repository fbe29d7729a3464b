"""Judges: PairRM, reward models, your own function, you; and the command line `python rank.py`.

A judge gets B prompts (message lists) and B lists of K_b candidates (strings), and gives K_b scores
for each, higher is better, in the candidates' order. Yours takes three lines (my_judge.py):

    def shorter_is_better(prompts, candidates):
        # prompts[b] = [{"role": "user", "content": "Why is the sky blue?"}]
        return [[-len(text) for text in texts] for texts in candidates]

    python rank.py --ranker my_judge.py:shorter_is_better --input some.jsonl --output ranked.jsonl

It is called with up to 64 prompts (`shorter_is_better.prompts_a_call = 8`: with up to 8), never
with the same text twice for one prompt, and may import its neighbour files. Lists, tuples, arrays
and tensors of finite numbers (True is 1) are scores. A judge that costs money yields one list a
prompt, in the prompts' order: each is kept as it comes, whatever happens next. In place of a list
it may give the exception that this prompt met, and the others are kept (examples/judge_http.py).

The run trusts no judge, and judges are slow. `Judge` is between them and the run: they get copies,
which they must leave in their order, what they return is checked, whatever they raise becomes one
line that names judge and prompt, and each finished score is on disk before the next call, so that
a judge that fails loses nothing.

Leaves PairRM itself and the pair to rank.py, and the thought: candidates are judged as they come,
so callers take a <think>...</think> off first. The toy's oracle is handed in by its owner.
Test: pytest tests/test_judges.py.

Legend: B prompts, K candidates of one, R rows of a forward pass, T tokens of the longest.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import random
import re
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from tqdm import tqdm

from harness.inputs.files import check_file, check_no_pointer, is_special, parse_json
from harness.runs.output_files import (
    check_writable, keep_rows, kept_rows, printable, write_jsonl)
from harness.runs.settings import as_judge, as_path
from harness.models.distributed import say
from harness.judging.user_function import END, PROMPTS_A_CALL, UserFunction, explain
from rank import PairRM, choose_pair, length_batches, pad_rows, pairrm_texts

LARGEST = 1e100  # score: beyond it a variance is no finite number
SPECS = "pairrm[:ID] | reward:ID | FILE.py:FUNCTION | human | oracle (toy world only)"

# ----------------------------------------------------------------------------------------------
# 1. Any judge, from outside
# ----------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What --ranker names: kind is pairrm, reward, human, oracle, "file" or an unknown word."""
    kind: str
    path: str  # a model's folder or hub id, a function's file, or ""
    function: str = ""


def parse_spec(text):
    """FILE.py:FUNCTION is split at its last colon, for a path may have others (C:\\jobs\\a.py:f,
    a:b/judge.py:f); everything else at its first."""
    own_file = re.fullmatch(r"(.+\.py):(\w+)", text, re.DOTALL)
    if own_file:
        return Spec("file", *own_file.groups())
    kind, _, path = text.partition(":")
    return Spec(kind, path)


def load_judge(spec, device="cpu", tokens_per_forward=8192, oracle=None, seed=0, progress=False,
               flag="--ranker"):
    """The value of --ranker, or of another `flag` -> Judge. ValueError with one line for whatever
    cannot be had.

    tokens_per_forward: for models, memory against speed. oracle: the callable behind "oracle".
    seed: for "human", the order in which candidates are shown. progress: draw a bar.
    """
    judge = functools.partial(Judge, spec, progress=progress)
    kind, path, name = parse_spec(spec)
    try:
        if kind == "pairrm":
            model = load_pairrm(path or "llm-blender/PairRM-hf", device)
            model.tokens_per_forward = tokens_per_forward
            return judge(model.scores, lambda prompt: pairrm_texts(prompt, []), 32, is_model=True)
        if kind == "reward" and path:
            model = RewardModel(path, device, tokens_per_forward)
            return judge(model.scores, model.check, 32, is_model=True, afterwards=model.report)
        if kind == "file":
            function = UserFunction(path, name)
            return judge(function, prompts_a_call=function.prompts_a_call, file=function.path)
    except Exception as error:  # a damaged file, a missing GPU, a config of another class, ...
        raise ValueError(one_line(f"{flag} {spec}: {explain(error)}")) from error
    if spec == "human":
        return judge(functools.partial(ask_you, seed=seed), prompts_a_call=1)
    if spec == "oracle" and oracle:
        return judge(oracle, prompts_a_call=1000)
    why = "the oracle belongs to the toy world; use" if spec == "oracle" else "not one of"
    raise ValueError(one_line(f"{flag} {spec}: {why} {SPECS}"))


class Question(NamedTuple):
    prompt_id: str
    prompt: list  # messages
    texts: list  # K candidates


@dataclasses.dataclass(frozen=True)
class Judge:
    """judge(prompts, candidates, prompt_ids, kept) -> B lists of K_b finite floats.

    score: the function or the model. check(prompt): ValueError for a prompt that it will never be
    able to judge.
    is_model: one of ours. It sees repeated texts (PairRM's mean counts them), and the longest
    prompts first: memory that is too small shows at once, and a call holds texts of like length.
    """
    name: str
    score: Callable
    check: Callable = lambda prompt: None
    prompts_a_call: int = PROMPTS_A_CALL
    is_model: bool = False
    afterwards: Callable = lambda: None  # called when all are judged
    progress: bool = False
    length_penalty: float = 0.0
    tokenizer: Any = None
    file: Path | None = None  # of your own function

    def __call__(self, prompts, candidates, prompt_ids=None, kept=None):
        """Scores in the candidates' order; identical texts of a prompt score alike.

        prompt_ids: B names, for errors. kept: a Kept or its path (None: nowhere), to which every
        call's scores are added at once; what is in it is not asked for again.
        ValueError, one line, names judge and prompt. KeyboardInterrupt passes through: a handler
        of another signal must raise that (or a subclass), or the judge is blamed for it.
        """
        ids = map(str, range(len(prompts)) if prompt_ids is None else prompt_ids)
        questions = [Question(*parts) for parts in zip(ids, prompts, candidates, strict=True)]
        kept = kept if isinstance(kept, Kept) else Kept(kept)
        keys = list(map(self._key, questions))
        todo = [(question, key) for question, key in zip(questions, keys)
                if kept.scores.get(key) is None]
        if self.is_model:
            todo.sort(key=lambda item: -len(str(item[0])))
        with tqdm(total=len(questions), initial=len(questions) - len(todo), desc="judge",
                  unit="prompt", leave=False, disable=not self.progress) as bar:
            for start in range(0, len(todo), self.prompts_a_call):
                part = todo[start:start + self.prompts_a_call]
                try:
                    self._ask(part, kept)
                except WholeCall:
                    for one in part:  # keeps what is good alone, and names what is not
                        if kept.scores.get(one[1]) is None:
                            self._ask([one], kept)
                    raise  # all are good alone: an error it remains
                bar.update(len(part))
        self.afterwards()
        rows = [dict(zip(sorted(set(question.texts)), kept.scores[key]))
                for question, key in zip(questions, keys)]
        return [[row[text] - self._penalty(text) for text in texts]
                for row, texts in zip(rows, candidates)]

    def _key(self, question):
        return digest(self.name, question.prompt_id, question.prompt, sorted(question.texts))

    def _ask(self, part, kept):
        """One call for some (question, key). Scores go into `kept` as they come: those of a list
        together, those of a generator prompt by prompt."""
        texts = [list(question.texts) if self.is_model else list(dict.fromkeys(question.texts))
                 for question, _ in part]
        waiting, faults = zip(part, texts), []
        try:
            for rows in self._call(part, texts):
                good = []
                for row, ((question, key), asked) in zip(rows, waiting):
                    try:
                        by_text = dict(zip(asked, check_row(row, asked, self.file)))
                        good.append({"prompt_id": question.prompt_id, "question": key,
                                     "scores": [by_text[text] for text in sorted(by_text)]})
                    except ValueError as error:
                        faults.append(f"judge {self.name}, prompt_id {question.prompt_id}: {error}")
                kept.add(good)
        except Mismatch:  # nobody knows which scores are whose
            kept.forget(part)
            raise
        if faults:
            raise ValueError(one_line(faults[0]))

    def _call(self, part, texts):
        """What the judge says about copies, not yet looked into: yields lists of rows, one row for
        each (question, key) in their order."""
        who = f"judge {self.name}, prompt_id {part[0][0].prompt_id}"
        if len(part) > 1:
            who += f" to {part[-1][0].prompt_id}"
        guard = functools.partial(self._guarded, who, WholeCall if len(part) > 1 else ValueError)
        prompts, count = [question.prompt for question, _ in part], 0
        given = copy.deepcopy([prompts, texts])
        scores = guard(self.score, *given)
        for rows in rows_of(scores, guard):
            if not unchanged(given, prompts, texts):
                raise Mismatch(one_line(
                    f"{who}: the judge changed the lists that it was given (did it sort or edit "
                    "them in place?), so nobody knows which score is whose; let it change a copy"))
            count += len(rows)
            if count > len(part):  # of a generator that may have no end
                break
            yield rows
        if count != len(part):
            got = f"{count} lists" if count else shown(scores)
            raise Mismatch(one_line(f"{who}: a judge must return a list of lists of numbers; "
                                    f"it returned {got} for {len(part)} prompts"))

    def _guarded(self, who, kind, function, *arguments):
        try:
            return function(*arguments)
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # sys.exit(0) too: it would end the run as a success
            raise kind(one_line(f"{who}: {explain(error, self.file)}")) from error

    def _penalty(self, text):
        if not self.length_penalty:
            return 0.0
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.length_penalty * len(ids)

    def dry_call(self, records):
        """Before anything costs: judges the data's own responses to the two shortest of `records`,
        and an empty one, as a sample may be. ValueError if that fails. You are not asked."""
        if self.name == "human":
            return
        size = lambda row: len(str([row["prompt"], row["data_chosen"], row["data_rejected"]]))
        short = sorted(records, key=size)[:2]
        texts = [[row["data_chosen"], row["data_rejected"]] for row in short]
        texts[-1].append("")  # and not all of one length, as in the run
        try:
            dataclasses.replace(self, progress=False)(
                [row["prompt"] for row in short], texts, [row["prompt_id"] for row in short])
        except ValueError as error:
            raise ValueError(f"{error} [a call before the run, on two short prompts of the data; "
                             "an empty candidate is among them, as a sample may be]") from error


def with_length_penalty(judge, weight, tokenizer):
    """The same judge, whose scores lose `weight` >= 0 for every token (by `tokenizer`) of the
    candidate: judges like long answers, and a policy learns that first."""
    if not 0 <= weight <= LARGEST:
        raise ValueError(f"--length-penalty {weight}: must be 0 or a positive number, at most "
                         f"{LARGEST:g}")
    if weight and tokenizer is None:
        raise ValueError("--length-penalty counts tokens: it needs a tokenizer")
    return dataclasses.replace(judge, length_penalty=weight, tokenizer=tokenizer)


class WholeCall(ValueError):
    """A call for several prompts raised something: which of them was it?"""


class Mismatch(ValueError):
    """Nobody knows which scores of a call belong to which candidates."""


def rows_of(scores, guard):
    """Lists of rows: one list, or a generator's rows one by one. guard(function, ...) calls it."""
    rows = guard(as_list, scores)
    if rows is not None:
        yield rows
    elif isinstance(scores, Iterator):
        while (row := guard(next, scores, END)) is not END:
            yield [row]


def unchanged(given, prompts, texts):
    """Whether what a judge was given is still in its order, and says the same. Keys that it has
    added to a message do no harm."""
    try:
        return given[1] == texts and all(
            {**now, **turn} == now for messages, turns in zip(given[0], prompts, strict=True)
            for now, turn in zip(messages, turns, strict=True))
    except Exception:  # other lengths, or other things than lists of messages
        return False


def check_row(row, texts, file=None):
    """The scores of one prompt's texts, as finite floats. ValueError for anything else. file: of
    the judge, to name the line where an exception arose that it gives in place of scores."""
    if isinstance(row, Exception):
        raise ValueError(explain(row, file))
    try:
        scores = as_list(row) or []
        if any(isinstance(score, (str, bytes, bytearray)) for score in scores):
            scores = []  # float("12") would be a number
        scores = list(map(float, scores))
    except KeyboardInterrupt:
        raise
    except BaseException:  # no numbers; or whatever somebody's own kind of number raises
        scores = []
    if len(scores) != len(texts):
        raise ValueError("a judge must return a list of lists of numbers, one a candidate; it "
                         f"returned {shown(row)} for {len(texts)} candidates")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the judge's scores are not finite: {scores}")
    if any(abs(score) > LARGEST for score in scores):
        raise ValueError(f"the judge's scores {scores} are too large to be averaged; divide them "
                         f"by a constant, so that none is beyond {LARGEST:g}")
    return scores


def as_list(values):
    """A list, tuple, array or tensor as a list. None for a string, a dict, a set or a generator,
    which Python would count and convert just as well."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, (list, tuple)) else None


def shown(value):
    """Its repr, which is code of the judge's as well."""
    try:
        return reprlib.repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__}"


def one_line(text):
    return " ".join(printable(str(text)).split())


# ----------------------------------------------------------------------------------------------
# 2. Finished scores, on disk
# ----------------------------------------------------------------------------------------------


def digest(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Kept:
    """A file of finished scores, to which one process appends, and which is read once. path: None
    keeps nothing beyond this object. others: files of other processes, which are read, too.
    scores: question -> scores of its sorted distinct texts, or None: not to be trusted."""

    def __init__(self, path, others=()):
        self.path, self.scores = path and Path(path), {}
        for file in {self.path, *others} - {None}:
            for _, row in kept_rows(file) if file.exists() else ():
                if "question" in row:  # else it is another file
                    self.scores[row["question"]] = row["scores"]

    def forget(self, part):
        """part: some (question, key), whose scores are asked for again."""
        self.add([{"prompt_id": question.prompt_id, "question": key, "scores": None}
                  for question, key in part if self.scores.get(key) is not None])

    def add(self, rows):
        """Rows of prompt_id, question and scores; on disk on return."""
        self.scores |= {row["question"]: row["scores"] for row in rows}
        if self.path is not None and rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_rows(self.path, rows)


# ----------------------------------------------------------------------------------------------
# 3. PairRM's weights
# ----------------------------------------------------------------------------------------------


def load_pairrm(name, device="cpu"):
    """PairRM from a folder or hub id: bf16 body on CUDA, fp32 elsewhere; the head always fp32.

    ValueError where it is no PairRM, or not whole: weights that are missing would be random.
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
    except Exception as error:  # transformers has a dozen kinds
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
    """Of a judge's body. Heads stay in fp32: bf16 numbers near 20 are 1/8 apart, and candidates
    would tie that are not equal."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _pairrm_config(folder):
    """llm-blender/PairRM-hf holds a DeBERTa config. llm-blender/PairRM holds llm-blender's own,
    whose model_type "deberta" transformers would read as DeBERTa v1: there the architecture,
    and the tokenizer if it has none, come from the base model that it names."""
    from transformers import AutoTokenizer, DebertaV2Config, PreTrainedTokenizerFast
    raw = json.loads((folder / "config.json").read_text())
    base = raw["model_name"] if "ranker_type" in raw else folder
    if (folder / "tokenizer.json").exists():
        # Exactly the stored pipeline. The DebertaV2Tokenizer of transformers 5 would rebuild it
        # from the vocabulary and drop SentencePiece's character normalisation.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    return DebertaV2Config.from_pretrained(base), tokenizer


def safetensors_folder(name):
    """`name` itself if it is a folder, else the hub's snapshot of it. ValueError where there is
    none, where it is no whole model, or where its weights are not safetensors: a .bin is a pickle,
    and can run code."""
    folder, wanted = Path(name), ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # the hub raises a dozen kinds; all mean the same to the user
            raise ValueError("neither a folder here nor a model that the hub would give "
                             f"({type(error).__name__}: {error})") from error
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: a LoRA adapter, no whole model; merge it into its base model "
                         "(peft: model.merge_and_unload().save_pretrained(...)), and name that")
    for file in sorted(file for pattern in wanted for file in folder.glob(pattern)):
        if not file.is_file():
            raise ValueError(f"{file} is no regular file")
        check_no_pointer(file)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no .safetensors file (a .bin is refused: it can run code); "
                         "convert it, or name another model")
    return folder


# ----------------------------------------------------------------------------------------------
# 4. Reward models, your function, you
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
            raise ValueError(f"no sequence classifier to be had ({explain(error)})") from error
        if model.config.num_labels != 1:
            raise ValueError(f"{model.config.num_labels} outputs; a reward model has 1. Write a "
                             "FILE.py:FUNCTION that loads it and picks one, or weighs them")
        if info["missing_keys"]:  # a plain language model, to which transformers adds a random head
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
        """Most tokens of a conversation. positions: those that the model's config names, or None.

        A tokenizer's model_max_length is often left from an older model: the larger of the two
        counts. Not where positions are a table (BERT's), which ends."""
        named, words = self.tokenizer.model_max_length, model.get_input_embeddings()
        if named > 1e9:  # transformers' "nobody said it"
            return positions or math.inf
        if not positions or positions == named:
            return named
        table = any(isinstance(module, torch.nn.Embedding) and module is not words
                    and module.num_embeddings >= positions for module in model.modules())
        limit = (min if table else max)(named, positions)
        say(f"reward model: its tokenizer says at most {named} tokens, its config {positions}; "
            f"{limit} is used, and what is longer loses its beginning")
        return limit

    def report(self):
        """Prints how many conversations were cut since the last report."""
        if self.cut:
            say(f"reward model: {self.cut} of {self.judged} conversations have more than its "
                f"{self.max_length} tokens, and were judged without their beginning")
        self.cut = self.judged = 0

    def check(self, prompt):
        """ValueError where the model's own chat template refuses the prompt (a role, an order)."""
        try:
            self.ids(prompt, "a")
        except Exception as error:  # jinja's kinds, and whatever a template calls
            raise ValueError(one_line("the reward model's chat template refuses it: "
                                      + explain(error))) from error

    def ids(self, prompt, text):
        """The conversation's ids, a list: one BOS where template or tokenizer begins with one."""
        ids = self.tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": text}], return_dict=False)
        bos = [self.tokenizer.bos_token_id]
        return bos + ids if self.begins == bos != ids[:1] else ids

    def row(self, prompt, text):
        """Its ids (t,). Too long a conversation loses its beginning after the BOS, not the answer
        that is judged."""
        ids = self.ids(prompt, text)
        surplus, kept = max(0, len(ids) - self.max_length), ids[:1] == [self.tokenizer.bos_token_id]
        self.judged, self.cut = self.judged + 1, self.cut + (surplus > 0)
        return torch.tensor(ids[:kept] + ids[kept + surplus:])

    @torch.inference_mode()
    def scores(self, prompts, candidates):
        """The judge: B message lists, B lists of K_b strings -> B lists of K_b floats."""
        rows = [self.row(prompt, text)
                for prompt, texts in zip(prompts, candidates, strict=True) for text in texts]
        # A decoder's score is read at the last token that is not padding. Where the config names no
        # padding token transformers refuses batches: a budget of 1 sends rows one by one.
        budget, values = 1 if self.pad_id is None else self.tokens_per_forward, [0.0] * len(rows)
        for batch in length_batches([len(row) for row in rows], budget):
            ids, mask = pad_rows([rows[i] for i in batch], self.pad_id or 0)  # (R, T)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            logits = self.model(ids, attention_mask=mask).logits  # (R, 1); by name: GPT-2's second
            for i, value in zip(batch, logits[:, 0].tolist()):  # argument is another
                values[i] = value
        values = iter(values)
        return [[next(values) for _ in texts] for texts in candidates]


class Stopped(SystemExit):
    """You said 'q': the one exit that is no error of the judge."""


def ask_you(prompts, candidates, seed=0):
    """The human judge, in the terminal: best scores 1, worst -1, others 0.

    Candidates are shown in an order drawn from (seed, prompt, texts), whatever order they come in,
    so that nothing tells their source. Raises Stopped with what to do next when you stop.
    """
    scores = []
    for prompt, texts in zip(prompts, candidates, strict=True):
        shown = sorted(texts)
        random.Random(digest(seed, prompt, shown)).shuffle(shown)
        best = worst = 0
        if len(shown) > 1:
            print(f"\n{'=' * 80}\n")
            print(printable("\n".join(f"[{turn['role']}] {turn['content']}" for turn in prompt)))
            for number, text in enumerate(shown, 1):
                print(f"\n--- {number} {'-' * 70}\n{printable(text)}")
            best = ask_number("best", len(shown), None)
            worst = ask_number("worst", len(shown), best) if len(shown) > 2 else 1 - best
        scores.append([float(text == shown[best]) - float(text == shown[worst]) for text in texts])
    return scores


def ask_number(what, count, taken):
    """Your choice, 0 .. count - 1, and not the one already taken."""
    while True:
        try:
            reply = input(f"\n{what} (1-{count}, q stops)? ").strip().lower()
        except EOFError:  # no terminal, or ctrl-D
            reply = "q"
        if reply == "q":
            raise Stopped("stopped; your answers are kept, and the same command goes on from there")
        if reply.isdecimal() and 1 <= int(reply) <= count and int(reply) - 1 != taken:
            return int(reply) - 1
        print(f"a number from 1 to {count}, and not one already taken")


# ----------------------------------------------------------------------------------------------
# 5. The command line of rank.py
# ----------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        prog="rank.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score the candidates of every prompt in a JSONL file with any judge.",
        epilog='input line:   {"prompt": "Why ...?" or messages, "candidates": ["a", "b"], '
               '"prompt_id": optional}\noutput line:  the same with "scores" (higher is better), '
               '"best" and "worst"\n              (indices into candidates; null: all are equal)\n'
               "Candidates are judged as they stand; take thoughts (<think>...</think>) off first.")
    add = parser.add_argument
    add("--input", type=as_path, required=True, help="JSONL file of prompts and candidates")
    add("--output", type=as_path, required=True,
        help="JSONL file to write; it appears whole or not at all")
    add("--ranker", type=as_judge, default="pairrm",
        help=f"{SPECS} (default pairrm = llm-blender/PairRM-hf)")
    add("--length-penalty", type=float, default=0.0, help="subtract this for every token (0)")
    add("--tokenizer", type=as_path,
        help="hub id or folder of the tokenizer that counts for --length-penalty")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--tokens-per-forward", type=int, default=8192, help="halve it when memory runs out")
    add("--scores", "--answers", type=as_path, metavar="FILE", help="keeps finished scores, from "
        "which the same command goes on (OUTPUT.scores.jsonl, which is removed in the end if it is "
        "not yours)")
    add("--seed", type=int, default=0, help="human only: the order in which candidates are shown")
    args = parser.parse_args()
    rank_file(args)


def rank_file(args):
    """What the command line does, after its arguments are parsed."""
    if args.tokens_per_forward < 1:
        raise ValueError(f"--tokens-per-forward {args.tokens_per_forward}: must be at least 1")
    with_length_penalty(Judge("", None), args.length_penalty, args.tokenizer)  # before it costs
    records, kept = read_candidates(args.input), check_outputs(args)
    judge = load_judge(args.ranker, args.device, args.tokens_per_forward, None, args.seed, True)
    if args.length_penalty:
        judge = with_length_penalty(judge, args.length_penalty, load_tokenizer(args.tokenizer))
    prompts, places = ([record.pop(key) for record in records] for key in ("messages", "where"))
    for prompt, where in zip(prompts, places):
        try:
            judge.check(prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if Kept(kept).scores:
        print(f"finished scores are in {kept}; delete it to judge all prompts anew")
    candidates = [record["candidates"] for record in records]
    scores = judge(prompts, candidates, [record["prompt_id"] for record in records], kept)
    pairs = [choose_pair(row, texts) or (None, None) for row, texts in zip(scores, candidates)]
    write_jsonl(args.output, [{**record, "scores": row, "best": best, "worst": worst}
                              for record, row, (best, worst) in zip(records, scores, pairs)])
    if kept and not args.scores and args.ranker != "human":  # nobody wants to answer twice
        Path(kept).unlink(missing_ok=True)
    equal = pairs.count((None, None))
    print(f"{len(records)} prompts ranked, {equal} of them all equal: {args.output}",
          file=sys.stderr if is_special(args.output) else sys.stdout)


def check_outputs(args):
    """The path of the scores, or None: beside a pipe or a device they have no place. ValueError
    where they or the output could not be written, or would replace what the command reads."""
    inputs = [("--input", args.input), ("--ranker", parse_spec(args.ranker).path)]
    inputs += [("--tokenizer", args.tokenizer)] if args.tokenizer else []
    check_writable(args.output, inputs)
    if not args.scores and is_special(args.output):
        return None
    kept = args.scores or f"{args.output}.scores.jsonl"
    check_scores(kept, [*inputs, ("--output", args.output), ("--output", f"{args.output}.tmp")])
    return kept


def check_scores(path, inputs):
    """ValueError where finished scores cannot be kept at `path`, or do not belong there."""
    check_file("--scores", path)
    check_writable(path, inputs, "--scores")


def load_tokenizer(name):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"--tokenizer {name}: {explain(error)}") from error


def read_candidates(path):
    """The records of a candidates file, plus `messages` and `where`; ValueError names the line."""
    check_file("--input", path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--input {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"--input {path}: not UTF-8 text; save it as UTF-8, one JSON object a "
                         "line") from None
    if text.lstrip().startswith("["):
        raise ValueError(f"--input {path}: a JSON array; write one object a line, as does  "
                         f"jq -c '.[]' {path}")
    records = [read_line(line, f"{path}, line {number}", number)
               for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not records:
        raise ValueError(f"--input {path}: no line in it")
    return records


def read_line(line, where, number):
    try:
        row = parse_json(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a surrogate pair (\\ud800 ..) is no text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); one object a line") from None
    if not isinstance(row, dict) or not {"prompt", "candidates"} <= row.keys():
        raise ValueError(f'{where}: expected {{"prompt": ..., "candidates": [...]}}')
    prompt, texts = row["prompt"], row["candidates"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(messages, list) and messages and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str) for turn in messages)):
        raise ValueError(f"{where}: prompt must be a string or a list of role/content messages")
    if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
        raise ValueError(f"{where}: candidates must be a list of at least one string")
    return {"prompt_id": f"line {number}", **row, "messages": messages, "where": where}
