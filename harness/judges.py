"""Judges: PairRM, reward models, your own function, you; and the command line `python rank.py`.

A judge gets B prompts (message lists) and B lists of K_b candidates (strings), and gives K_b scores
for each, higher is better, in the candidates' order. Yours takes three lines (my_judge.py):

    def shorter_is_better(prompts, candidates):
        # prompts[b] = [{"role": "user", "content": "Why is the sky blue?"}]
        return [[-len(text) for text in texts] for texts in candidates]

    python rank.py --ranker my_judge.py:shorter_is_better --input some.jsonl --output ranked.jsonl

It is called with up to 64 prompts, never with the same text twice for one prompt, and may import
its neighbour files. Lists, tuples, arrays and tensors of finite numbers (True is 1) are scores.

Judges are strangers, and they are slow. `Judge` stands between them and the run: they get copies,
what they return is checked, whatever they raise becomes one line that names judge and prompt, and
each finished score is on disk before the next call, so that a judge that fails loses nothing.

Leaves PairRM itself and the pair to rank.py, and the thought: candidates are judged as they come,
so callers take a <think>...</think> off first. The toy's oracle is handed in by its owner.
Test: pytest tests/test_judges.py.

Legend: B prompts, K candidates of one, R rows of a forward pass, T tokens of the longest.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import re
import reprlib
import sys
import traceback
import types
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from tqdm import tqdm

from harness.files import check_file, is_special, parse_json, parts_of
from harness.rundir import check_writable, printable, write_jsonl
from harness.settings import as_judge, as_path
from rank import PairRM, choose_pair, length_batches, pad_rows, pairrm_texts

SPECS = "pairrm[:ID] | reward:ID | FILE.py:FUNCTION | human | oracle (toy world only)"

# ----------------------------------------------------------------------------------------------
# 1. Any judge, from outside
# ----------------------------------------------------------------------------------------------


def load_judge(spec, device="cpu", tokens_per_forward=8192, oracle=None, seed=0, progress=False):
    """--ranker -> Judge. ValueError with one line for whatever cannot be had.

    tokens_per_forward: for models, memory against speed. oracle: the callable behind "oracle".
    seed: for "human", the order in which candidates are shown. progress: draw a bar.
    """
    judge = functools.partial(Judge, spec, progress=progress)
    kind, _, rest = spec.partition(":")
    own_file = re.fullmatch(r"(.+\.py):(\w+)", spec)
    try:
        if kind == "pairrm":
            model = load_pairrm(rest or "llm-blender/PairRM-hf", device)
            model.tokens_per_forward = tokens_per_forward
            return judge(model.scores, lambda prompt: pairrm_texts(prompt, []), 32, is_model=True)
        if kind == "reward" and rest:
            model = RewardModel(rest, device, tokens_per_forward)
            return judge(model.scores, model.check, 32, is_model=True)
        if own_file:
            function = UserFunction(*own_file.groups())
            return judge(function, file=function.path)
    except Exception as error:  # a damaged file, a missing GPU, a config of another class, ...
        raise ValueError(one_line(f"--ranker {spec}: {explain(error)}")) from error
    if spec == "human":
        return judge(functools.partial(ask_you, seed=seed), prompts_a_call=1)
    if spec == "oracle" and oracle:
        return judge(oracle, prompts_a_call=1000)
    why = "the oracle belongs to the toy world; use" if spec == "oracle" else "not one of"
    raise ValueError(f"--ranker {spec}: {why} {SPECS}")


class Question(NamedTuple):
    prompt_id: str
    prompt: list  # messages
    texts: list  # K candidates


@dataclasses.dataclass(frozen=True)
class Judge:
    """judge(prompts, candidates, prompt_ids, kept) -> B lists of K_b finite floats.

    score: the stranger. check(prompt): ValueError for a prompt that it will never be able to judge.
    is_model: one of ours. It sees repeated texts (PairRM's mean counts them), and the longest
    prompts first: memory that is too small shows at once, and a call holds texts of like length.
    """
    name: str
    score: Callable
    check: Callable = lambda prompt: None
    prompts_a_call: int = 64
    is_model: bool = False
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
        todo = [(question, key) for question, key in zip(questions, keys) if key not in kept.scores]
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
                        self._ask([one], kept)
                    raise  # all are good alone: an error it remains
                bar.update(len(part))
        rows = [dict(zip(sorted(set(question.texts)), kept.scores[key]))
                for question, key in zip(questions, keys)]
        return [[row[text] - self._penalty(text) for text in texts]
                for row, texts in zip(rows, candidates)]

    def _key(self, question):
        return digest(self.name, question.prompt_id, question.prompt, sorted(question.texts))

    def _ask(self, part, kept):
        """One call for some (question, key); their scores go into `kept`."""
        questions, keys = zip(*part)
        texts = [q.texts if self.is_model else list(dict.fromkeys(q.texts)) for q in questions]
        rows, faults = [], []
        for question, key, asked, row in zip(questions, keys, texts, self._call(questions, texts)):
            try:
                by_text = dict(zip(asked, check_row(row, asked)))
                rows.append({"prompt_id": question.prompt_id, "question": key,
                             "scores": [by_text[text] for text in sorted(by_text)]})
            except ValueError as error:
                faults.append(f"judge {self.name}, prompt_id {question.prompt_id}: {error}")
        kept.add(rows)
        if faults:
            raise ValueError(one_line(faults[0]))

    def _call(self, part, texts):
        """What the stranger says about copies: a row for each question, not yet looked into."""
        who = f"judge {self.name}, prompt_id {part[0].prompt_id}"
        if len(part) > 1:
            who += f" to {part[-1].prompt_id}"
        try:
            scores = self.score(copy.deepcopy([q.prompt for q in part]), copy.deepcopy(texts))
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # sys.exit(0) too: it would end the run as a success
            kind = WholeCall if len(part) > 1 else ValueError
            raise kind(one_line(f"{who}: {explain(error, self.file)}")) from error
        rows = as_list(scores)
        if rows is None or len(rows) != len(part):
            got = reprlib.repr(scores) if rows is None else f"{len(rows)} lists"
            raise ValueError(one_line(f"{who}: a judge must return a list of lists of numbers; "
                                      f"it returned {got} for {len(part)} prompts"))
        return rows

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
    if not 0 <= weight < math.inf:
        raise ValueError(f"--length-penalty {weight}: must be 0 or a positive number")
    if weight and tokenizer is None:
        raise ValueError("--length-penalty counts tokens: it needs a tokenizer")
    return dataclasses.replace(judge, length_penalty=weight, tokenizer=tokenizer)


class WholeCall(ValueError):
    """A call for several prompts raised something: which of them was it?"""


def check_row(row, texts):
    """The scores of one prompt's texts, as finite floats. ValueError for anything else."""
    scores = as_list(row) or []
    if any(isinstance(score, (str, bytes, bytearray)) for score in scores):
        scores = []  # float("12") would be a number
    try:
        scores = list(map(float, scores))
    except Exception:  # no numbers; or whatever somebody's own kind of number raises
        scores = []
    if len(scores) != len(texts):
        raise ValueError("a judge must return a list of lists of numbers, one a candidate; it "
                         f"returned {reprlib.repr(row)} for {len(texts)} candidates")
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"the judge's scores are not finite: {scores}")
    return scores


def as_list(values):
    """A list, tuple, array or tensor as a list. None for a string, a dict, a set or a generator,
    which Python would count and convert just as well."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, (list, tuple)) else None


def explain(error, file=None):
    """An exception as text, with the line of the user's `file` where it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(file)]
    where = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
    text = "".join(traceback.format_exception_only(error)).removeprefix("ValueError: ").strip()
    return f"{text:.500}{where}"


def one_line(text):
    return " ".join(printable(str(text)).split())


# ----------------------------------------------------------------------------------------------
# 2. Finished scores, on disk
# ----------------------------------------------------------------------------------------------


def digest(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Kept:
    """A JSONL file of finished scores, of one process alone, read once. path: None keeps nothing
    beyond this object. others: files that are read as well, what other processes have left.
    scores: question -> scores of its sorted distinct texts."""

    def __init__(self, path, others=()):
        self.path, self.scores = path and Path(path), {}
        for file in {self.path, *others} - {None}:
            if not file.exists():
                continue
            for line in file.read_text("utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                    if row.pop("check") == digest(row):
                        self.scores[row["question"]] = row["scores"]
                except (ValueError, KeyError, AttributeError, TypeError):
                    pass  # a line that is not whole to the last bit is asked for again

    def add(self, rows):
        """Rows of prompt_id, question and scores; on disk on return."""
        self.scores |= {row["question"]: row["scores"] for row in rows}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for row in rows:  # \n first: it ends a line that was cut off by a kill
                file.write("\n" + json.dumps({**row, "check": digest(row)}))
            file.flush()
            os.fsync(file.fileno())


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
    none, or where its weights are not safetensors: a .bin is a pickle, and can run code."""
    folder, wanted = Path(name), ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # the hub raises a dozen kinds; all mean the same to the user
            raise ValueError("neither a folder here nor a model that the hub would give "
                             f"({type(error).__name__}: {error})") from error
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
            raise ValueError(f"{model.config.num_labels} outputs; a reward model has 1")
        if info["missing_keys"]:  # a plain language model, to which transformers adds a random head
            raise ValueError(f"no trained head (missing {sorted(info['missing_keys'])})")
        if not self.tokenizer.chat_template:
            raise ValueError("no chat template; write a FILE.py:FUNCTION that has one")
        head = getattr(model, "score", getattr(model, "classifier", None))
        if isinstance(head, torch.nn.Linear):
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.model, self.tokens_per_forward = model.eval().to(device), tokens_per_forward
        config = model.config.get_text_config()
        self.pad_id, self.begins = config.pad_token_id, self.tokenizer("")["input_ids"][:1]
        self.max_length = min(self.tokenizer.model_max_length,
                              getattr(config, "max_position_embeddings", None) or math.inf)

    def check(self, prompt):
        """ValueError where the model's own chat template refuses the prompt (a role, an order)."""
        try:
            self.row(prompt, "a")
        except Exception as error:  # jinja's kinds, and whatever a template calls
            raise ValueError(one_line("the reward model's chat template refuses it: "
                                      + explain(error))) from error

    def row(self, prompt, text):
        """The conversation's ids (t,): one BOS wherever template or tokenizer begins with one. Too
        long a conversation loses its beginning behind that, not the answer that is judged."""
        ids = self.tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": text}], return_dict=False)
        bos = [self.tokenizer.bos_token_id]
        if ids[:1] == bos:
            ids = ids[1:]
        elif self.begins != bos:
            bos = []
        return torch.tensor(bos + ids[max(0, len(ids) + len(bos) - self.max_length):])

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
            for i, value in zip(batch, self.model(ids, mask).logits[:, 0].tolist()):  # (R, 1)
                values[i] = value
        values = iter(values)
        return [[next(values) for _ in texts] for texts in candidates]


class UserFunction:
    """The function `name` of the Python file `path`, run in a room of its own.

    Inside, its folder is where `import` looks first, also for a data.py or model.py, which are
    names of our files too. Afterwards sys.path, the working directory, torch's default dtype and
    the gradient mode are what they were, whatever the judge did with them.
    """

    def __init__(self, path, name):
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise ValueError(f"no file {path}")
        folder, self.names = self.path.parent, {self.path.stem}  # what `import` finds here
        if not any(Path(place).resolve() == folder for place in sys.path):  # there: as for us
            self.names |= {file.stem for file in folder.glob("*.py")}
            self.names |= {file.parent.name for file in folder.glob("*/__init__.py")}
        # In sys.modules under its own name, or dataclasses and pickle would not find its classes.
        module = types.ModuleType(self.path.stem)
        module.__file__ = str(self.path)
        self.modules = {module.__name__: module}
        try:
            with self.room():  # compiled here: a .pyc of the same second could be an older version
                exec(compile(self.path.read_bytes(), str(self.path), "exec"), vars(module))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(f"importing {path} failed, {explain(error, self.path)}") from error
        self.function = getattr(module, name, None)
        if not callable(self.function):
            raise ValueError(f"{path} has no function {name}")

    def __call__(self, prompts, candidates):
        with self.room():
            return self.function(prompts, candidates)

    @contextlib.contextmanager
    def room(self):
        own = lambda: [name for name in sys.modules if name.partition(".")[0] in self.names]
        hidden = {name: sys.modules.pop(name) for name in own()}
        sys.modules.update(self.modules)
        folder, path, dtype = os.getcwd(), sys.path[:], torch.get_default_dtype()
        sys.path.insert(0, str(self.path.parent))
        try:
            with torch.enable_grad():
                yield
        finally:
            self.modules = {name: sys.modules.pop(name) for name in own()}
            sys.modules.update(hidden)
            sys.path[:] = path
            os.chdir(folder)
            torch.set_default_dtype(dtype)


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
    inputs = [("--input", args.input), *parts_of("--ranker", args.ranker)]
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
