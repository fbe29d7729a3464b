"""What a run is told: recipes, the command line, and the checks that need no file.

A recipe is a dictionary of settings; flags replace single ones. `read(argv)` returns a frozen
`Settings`; what belongs together comes out of it as a small group (`settings.batching`, ...), and
`settings.at(k)` is what iteration k uses. Of the project's files, it imports selm.py alone,
for the names of the losses.

Test: pytest tests/test_settings.py.
"""

import argparse
import hashlib
import importlib.util
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import selm

# ----------------------------------------------------------------------------------------------
# 1. Recipes: the paper's settings (released code where the paper is silent), and two small ones
# ----------------------------------------------------------------------------------------------

PAPER = dict(data="HuggingFaceH4/ultrafeedback_binarized", ranker="pairrm",
             iterations=3, offline_first=False, beta=0.01, alpha=1e-3, lr=(5e-7, 3e-7, 1e-7),
             batch_size=128, epochs=1, adam_betas=(0.9, 0.999), adam_eps=1e-8, max_grad_norm=1.0,
             max_length=1024, max_prompt_length=512, max_new_tokens=1024, temperature=0.0, slots=64,
             tokens_per_forward=8192, gradient_checkpointing=True, eval_prompts=256,
             prompts_per_iteration=None, seeds=1, baseline=False, variant=None)
KNOWN_PROMPTS = {PAPER["data"]: 61_135}  # train_prefs, after double prompts; for --dry-run
RECIPES = {
    "zephyr-7b-sft": PAPER | dict(
        model="HuggingFaceH4/mistral-7b-sft-beta", iterations=4, offline_first=True, batch_size=256,
        lr=(5e-7, 5e-7, 5e-7, 1e-7)),
    "llama-3-8b-instruct": PAPER | dict(model="meta-llama/Meta-Llama-3-8B-Instruct", alpha=1e-4),
    # Phi-3 has a key and value for every head: 0.4 MB of cache a token, three times the others'.
    "phi-3-mini": PAPER | dict(model="microsoft/Phi-3-mini-4k-instruct", slots=32),
    # Not in the paper: small enough for one CPU. Also what an unnamed model gets.
    "smollm2-135m": PAPER | dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", lr=(1e-6,), batch_size=16, max_length=512,
        max_prompt_length=256, max_new_tokens=256, slots=16, tokens_per_forward=2048,
        gradient_checkpointing=False, eval_prompts=32, beta=0.1),
    # The toy: a large Adam eps keeps steps proportional to the gradient; with 1e-8 the tiny model
    # is thrown out of its language. alpha is large, or nothing would be seen (README). The learning
    # rate falls from iteration to iteration, as the paper's does: at a constant 6e-3 and alpha 0.3
    # some seeds lose their language, and which ones depends on the processor's rounding
    # (experiments/checks/breakdown.py).
    "toy": PAPER | dict(
        model=None, data=None, ranker="oracle", alpha=0.1, beta=1.0, lr=(6e-3, 3.6e-3, 1.2e-3),
        batch_size=32,
        adam_betas=(0.9, 0.95), adam_eps=0.1, prompts_per_iteration=512,
        max_grad_norm=math.inf,  # clipping would undo what the large eps is for
        max_length=64, max_prompt_length=32, max_new_tokens=8, slots=128, tokens_per_forward=8192,
        gradient_checkpointing=False, eval_prompts=48, seeds=5, baseline=True, variant="default"),
}
# The same world with other hidden tastes, for experiments/evidence/ablation.py.
RECIPES |= {f"toy-{name}": RECIPES["toy"] | dict(variant=name) for name in ("neutral", "rare")}

# ----------------------------------------------------------------------------------------------
# 2. Settings, and the groups in which they travel
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batching:
    """How trees become updates and micro-batches."""
    batch_size: int  # prompts an update, over all processes
    epochs: int
    tokens_per_forward: int
    plain_rows: bool


@dataclass(frozen=True)
class Compute:
    """Where and in which form a policy runs."""
    device: str
    dtype: str  # "fp32", or "bf16": autocast over fp32 master weights
    gradient_checkpointing: bool
    compile: bool
    lora_rank: int
    plain_rows: bool
    offload: bool

    @property
    def attention(self):
        """Of training: ours (model.py), or transformers' most faithful for --plain-rows."""
        return "eager" if self.plain_rows else "selm_tree"


@dataclass(frozen=True)
class Settings:
    """Everything that a command line says, complete. Read-only: an arm, a seed or an iteration that
    differs is a copy with that difference (`dataclasses.replace`)."""
    model: str | None  # hub id, folder or .gguf; None: the toy world makes its own
    data: str | None
    ranker: str
    eval_ranker: str | None  # None: the ranker
    chat_template: str | None
    skip_bad_rows: bool
    run_dir: Path
    alpha: float
    beta: float
    loss: str
    optimism: str
    reference: str
    pairs: str
    iterations: int
    offline_first: bool
    prompts_per_iteration: int | None
    responses_per_prompt: int
    length_penalty: float
    lr: tuple  # one an iteration
    batch_size: int
    epochs: int
    adam_betas: tuple
    adam_eps: float
    max_grad_norm: float
    lora_rank: int
    seed: int
    seeds: int
    max_length: int
    max_prompt_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    samples_from: str | None
    tokens_per_forward: int
    slots: int
    gradient_checkpointing: bool
    compile: bool
    plain_rows: bool
    offload: bool | None  # None: where a GPU is too small without it
    device: str
    dtype: str
    save_dtype: str
    save_every: int
    eval_prompts: int
    baseline: bool
    track: str | None
    dry_run: bool
    processes: int | None
    fresh: bool
    variant: str | None  # of the toy world
    name: str  # of the recipe or the model
    iteration: int | None = None  # set by `at`

    @property
    def first(self):
        """The first iteration's number: the Zephyr recipe has an iteration 0."""
        return 0 if self.offline_first else 1

    def at(self, iteration):
        """The settings of one iteration: its learning rate; iteration 0 is plain offline DPO."""
        changes = {"iteration": iteration}
        if iteration >= self.first:
            changes["lr"] = self.lr[iteration - self.first]
        if iteration == 0:
            changes |= {"alpha": 0.0, "responses_per_prompt": 0, "pairs": "data",
                        "samples_from": None}
        return replace(self, **changes)

    def _group(self, kind):
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    batching = property(lambda self: self._group(Batching))
    compute = property(lambda self: self._group(Compute))

    def as_dict(self):
        return asdict(self)


# ----------------------------------------------------------------------------------------------
# 3. The command line
# ----------------------------------------------------------------------------------------------

YES_OR_NO = argparse.BooleanOptionalAction


def as_text(value):
    """A flag's value that will be written into a file or shown to a model. (Bytes that are not
    UTF-8 reach Python as half characters, which fail only when they are written.)"""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8 text") from None
    return value


def as_path(value):
    """A file, folder or hub id. The shell expands no ~ behind a = or in quotes."""
    return os.path.expanduser(as_text(value))


def as_judge(value):
    """~/judge.py:f, reward:~/model."""
    kind, colon, rest = value.partition(":")
    return as_path(kind) + colon + as_path(rest)


FLAGS = {
    "what to train, on what, judged by whom": {
        "model": dict(type=as_path, default="toy", help=f"a recipe ({', '.join(RECIPES)}), a hub "
                      "id org/name, a folder, or a .gguf file"),
        "data": dict(type=as_path, help="preferences in UltraFeedback-binarized format: a JSONL, "
                     "JSON, csv or parquet file, a folder of datasets, or a hub id"),
        "skip-bad-rows": dict(action="store_true", help="leave out and count rows that cannot be "
                              "used, instead of stopping at the first"),
        "ranker": dict(type=as_judge, help="pairrm[:ID] | reward:ID | file.py:function | human | "
                       "oracle (toy)"),
        "eval-ranker": dict(type=as_judge, help="judge of the held-out answers, another one of "
                            "these; without it the same, and win rates say how well that was "
                            "pleased"),
        "chat-template": dict(type=as_path, metavar="FILE", help="Jinja chat template, for a model "
                              "without one"),
        "run-dir": dict(type=as_path, help="where everything goes (runs/NAME)")},
    "the method": {
        "alpha": dict(type=float, help="optimism; 0 is iterative DPO; the paper: 1e-3 or 1e-4, "
                      "out of 5e-3 .. 1e-4"),
        "beta": dict(type=float, help="strength of the KL anchor; paper: 0.01"),
        "loss": dict(choices=list(selm.PREFERENCE_LOSS), default="dpo", help="of a pair, a name in "
                     "selm.PREFERENCE_LOSS; ipo (arXiv 2310.12036) wants another alpha and --lr"),
        "optimism": dict(choices=list(selm.OPTIMISM), default="selm", help="the term that "
                         "alpha scales: alpha beta r(y), r = log pi/pi_ref (SELM); alpha log pi(y) "
                         "(XPO); alpha / beta (sigmoid(beta r) - 1/2) (POPO)"),
        "reference": dict(choices=["previous", "initial"], default="previous", help="previous: "
                          "Algorithm 1; initial: a KL anchor that stays at the first model"),
        "pairs": dict(choices=["data", "reference"], default="data", help="data: best and worst of "
                      "{y, y_w, y_l}; reference: a sample of the policy against one of the first "
                      "model, which optimism pushes down (XPO, with --optimism xpo)"),
        "iterations": dict(type=int, help="portions the prompts are split into"),
        "offline-first": dict(action=YES_OR_NO, help="the first portion is plain offline DPO, as "
                              "in the Zephyr recipe"),
        "prompts-per-iteration": dict(type=int, help="at most so many prompts a portion"),
        "responses-per-prompt": dict(type=int, default=1, help="fresh samples that join the data's "
                                     "two"),
        "length-penalty": dict(type=float, default=0.0, help="score minus this, a token")},
    "optimiser": {
        "lr": dict(type=float, nargs="+", help="one learning rate, or one an iteration"),
        "batch-size": dict(type=int, help="prompts an update, over all processes"),
        "epochs": dict(type=int, help="passes over a portion"),
        "adam-betas": dict(type=float, nargs=2, help="AdamW's betas"),
        "adam-eps": dict(type=float, help="AdamW's eps"),
        "max-grad-norm": dict(type=float, help="gradients are clipped to this norm; inf: never"),
        "lora-rank": dict(type=int, default=0, help="train LoRA adapters of this rank; 0: all "
                          "weights"),
        "seed": dict(type=int, default=0, help="of shuffling and sampling"),
        "seeds": dict(type=int, help="repeat the whole run so often, for intervals")},
    "lengths and sampling": {
        "max-length": dict(type=int, help="tokens of prompt + response"),
        "max-prompt-length": dict(type=int, help="tokens of the prompt, cut from the left"),
        "max-new-tokens": dict(type=int, help="tokens of a sampled response, at most; --max-length "
                               "limits it too"),
        "temperature": dict(type=float, help="0: greedy, as the authors' code; 1: as the paper "
                            "writes"),
        "top-p": dict(type=float, default=1.0, help="nucleus sampling"),
        "samples-from": dict(type=as_path, metavar="FILE", help="samples that another engine "
                             "(vLLM) has drawn; {k} stands for the iteration. Run it once to get "
                             "the prompts; harness/inputs/engine_samples.py has the format")},
    "speed and memory": {
        "tokens-per-forward": dict(type=int, help="budget of a micro-batch; memory grows with it"),
        "slots": dict(type=int, help="responses sampled side by side"),
        "gradient-checkpointing": dict(action=YES_OR_NO, help="recompute layers in backward"),
        "offload": dict(action=YES_OR_NO, help="fp32 master weights and optimiser in host memory; "
                        "by itself where a GPU is too small without"),
        "compile": dict(action="store_true", help="torch.compile the layers"),
        "plain-rows": dict(action="store_true", help="pad instead of packing, for architectures "
                           "that cannot do it"),
        "device": dict(choices=["cuda", "cpu"], help="a GPU where there is one; the toy: cpu"),
        "dtype": dict(choices=["fp32", "bf16"], help="bf16: autocast over fp32 master weights; "
                      "from the device")},
    "the run": {
        "save-every": dict(type=int, default=0, metavar="UPDATES", help="keep a checkpoint inside "
                           "the training phase too (12 bytes a parameter, twice while one replaces "
                           "another); 0: a kill repeats the phase"),
        "save-dtype": dict(choices=["float32", "start"], default="float32", help="of policies; "
                           "start: the start model's, half the disk from a bf16 model, but then "
                           "steps below 1/512 of a weight are lost between iterations: most, at "
                           "the paper's learning rates"),
        "eval-prompts": dict(type=int, help="held-out prompts for the evaluation; 0: none"),
        "baseline": dict(action=YES_OR_NO, help="also run alpha = 0 from the same start and seeds"),
        "track": dict(choices=["trackio", "wandb", "tensorboard"], help="show the rows of "
                      "metrics.jsonl, as they come, in one of these, if it is installed"),
        "dry-run": dict(action="store_true", help="print the plan, of memory too, and stop; loads "
                        "no weights. Without a GPU it is that of one, unless --device cpu"),
        "processes": dict(type=int, help="of torchrun, that --dry-run plans for"),
        "fresh": dict(action="store_true", help="delete the run in --run-dir and start over")}}


def read(argv=None):
    """The command line -> Settings, complete and checked. Errors: ValueError."""
    parser = argparse.ArgumentParser(
        description="Self-Exploring Language Models (arXiv 2405.19332): online preference "
                    "optimisation that explores. Without flags: the toy world, SELM against "
                    "iterative DPO (alpha = 0), in a minute or two.",
        epilog="Settings that are not given come from the recipe; --dry-run prints them all. "
               "SELM_TRACEBACK=1 shows where a one-line error arose.",
        formatter_class=Help, allow_abbrev=False)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, options in flags.items():
            group.add_argument(f"--{name}", **options)
    return complete(vars(parser.parse_args(argv)))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults that no recipe has."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


def stream(*key):
    """A 63-bit seed that depends on all of key: every prompt owns its random stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def complete(given):
    """Flags (name -> value, None where not given) + recipe -> Settings. Errors: ValueError."""
    model, own_data = given["model"], given["data"] is not None
    if model not in RECIPES and "/" not in model and not Path(model).exists():
        raise ValueError(f"--model {model}: no such recipe, folder or file; the recipes are "
                         f"{', '.join(RECIPES)}, and a hub id has the form org/name")
    recipe = RECIPES.get(model, RECIPES["smollm2-135m"] | {"model": model})
    values = recipe | {name: value for name, value in given.items() if value is not None}
    values["model"] = recipe["model"]
    check_numbers(values)
    one_rate = given["lr"] is None or len(given["lr"]) == 1
    if one_rate:  # a recipe's rates, cut or continued by its last one
        rates = tuple(values["lr"])
        values["lr"] = (rates + rates[-1:] * values["iterations"])[:values["iterations"]]
    path = Path(model).resolve()  # runs/x/iter_3/policy -> x-iter_3-policy
    name = "-".join(path.parts[-3:]) if path.name == "policy" else path.name
    name = model if model in RECIPES else name.removesuffix(".gguf").lower()
    if given["run_dir"] == "":
        raise ValueError("--run-dir: the name is empty")
    if not given["run_dir"] and name != name.encode(errors="ignore").decode():
        raise ValueError("--model: its folder's name, by which the run is called, is not UTF-8 "
                         "text; give --run-dir")
    device = values.get("device") or (
        "cuda" if (torch.cuda.is_available() or values.get("dry_run")) and not values["variant"]
        else "cpu")
    if device == "cpu":
        values["offload"] = bool(values.get("offload"))
    values |= {"name": name, "run_dir": Path(given["run_dir"] or Path("runs") / name),
               "device": device, "lr": tuple(values["lr"]),
               "dtype": values.get("dtype") or ("bf16" if device == "cuda" else "fp32"),
               "adam_betas": tuple(values["adam_betas"])}
    settings = Settings(**{f.name: values.get(f.name) for f in fields(Settings)
                           if f.name != "iteration"})
    check(settings, own_data)
    return settings


# name -> (smallest, largest, whether the smallest itself is out). NaN lies in no range.
RANGES = {"alpha": (0, 1e3, False), "beta": (0, 1e3, True), "lr": (0, 10, True),
          "adam_betas": (0, 0.999999, False), "adam_eps": (0, 1, True),
          "max_grad_norm": (0, math.inf, True), "length_penalty": (0, 1e3, False),
          "temperature": (0, 100, False), "top_p": (0, 1, True),
          "iterations": (1, 1000, False), "seeds": (1, 1000, False), "epochs": (1, 1000, False),
          "responses_per_prompt": (1, 1000, False), "lora_rank": (0, 2**16, False),
          "seed": (0, 2**62, False), "save_every": (0, 2**31, False),
          "eval_prompts": (0, 2**31, False)}
RANGES |= {name: (1, 2**31, False) for name in (
    "prompts_per_iteration", "batch_size", "max_length", "max_prompt_length", "max_new_tokens",
    "tokens_per_forward", "slots", "processes")}


def check_numbers(values):
    """Every number in its range, before anything else is done with it. Errors: ValueError."""
    for name, (low, high, above) in RANGES.items():
        value = values.get(name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            if number is not None and not (low < number <= high or number == low and not above):
                raise ValueError(f"--{name.replace('_', '-')} {number:g}: must be "
                                 f"{'above' if above else 'at least'} {low}"
                                 + ("" if math.isinf(high) else f" and at most {high:g}"))


def check(settings, own_data):
    """Refuses what cannot work whatever the files hold. Errors: ValueError."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    checks = [
        (not (settings.variant and own_data),
         "--data: the toy makes its own; give --model as well"),
        (len(settings.lr) == settings.iterations, f"--lr: {len(settings.lr)} rates for "
         f"{settings.iterations} iterations; give one, or one an iteration"),
        (settings.max_prompt_length < settings.max_length, "--max-prompt-length must be below "
         "--max-length, or no room is left for a response"),
        (settings.responses_per_prompt == 1 or settings.temperature > 0, "--responses-per-prompt "
         "> 1 needs --temperature > 0: greedy samples would all be the same"),
        (settings.pairs == "data" or settings.reference == "initial", "--pairs reference: its "
         "pairs hold a sample of the first model; give --reference initial as well"),
        (settings.pairs == "data" or settings.temperature > 0, "--pairs reference needs "
         "--temperature > 0: greedy, both samples would be the same in the first iteration"),
        (settings.pairs == "data" or settings.responses_per_prompt == 1, "--pairs reference takes "
         "one sample of each model; leave --responses-per-prompt at 1"),
        (not settings.samples_from or settings.pairs == "data", "--samples-from has no sample of "
         "the first model, which --pairs reference needs"),
        (not settings.samples_from or settings.seeds == 1 and not settings.baseline,
         "--samples-from is for one arm: the samples of one policy are not another's; give "
         "--seeds 1 --no-baseline"),
        (not settings.samples_from or "{k}" in settings.samples_from or settings.iterations == 1,
         "--samples-from: every iteration has its own samples; put {k}, its number, into the "
         "name"),
        (not settings.track or importlib.util.find_spec(settings.track),
         f"--track {settings.track}: it is not installed; pip install {settings.track}"),
        (not ("human" in (settings.ranker, settings.eval_ranker) and processes > 1),
         "--ranker human: judge in a single process"),
        (settings.dry_run or not settings.processes, "--processes is what --dry-run plans for; "
         "torchrun --nproc-per-node N starts N"),
        (settings.dry_run or settings.device != "cuda" or torch.cuda.is_available(),
         "--device cuda: no GPU here")]
    for fine, message in checks:
        if not fine:
            raise ValueError(message)


# ----------------------------------------------------------------------------------------------
# 4. The plan that --dry-run prints
# ----------------------------------------------------------------------------------------------


def plan(settings, prompts, source):
    """The iteration table and where files go. prompts: how many there are, or None."""
    s = settings
    portion = min([x for x in (prompts and prompts // s.iterations, s.prompts_per_iteration) if x],
                  default=None)
    lines = [f"model   {s.model or 'made on the spot'}",
             f"data    {s.data or 'made on the spot'}: {prompts or '?'} prompts ({source})",
             f"ranker  {s.ranker}; of the evaluation: {s.eval_ranker or 'the same'}",
             f"loss    {s.loss}, beta {s.beta:g}, reference: {s.reference}", "",
             "iteration  prompts  samples  alpha   lr       updates  warm-up  tokens at most"]
    for k in range(s.first, s.first + s.iterations):
        at = s.at(k)
        n = at.responses_per_prompt
        updates = portion and math.ceil(portion / s.batch_size) * s.epochs
        longest = s.max_prompt_length + (2 + n) * (s.max_length - s.max_prompt_length)
        lines.append(
            f"{k:<10} {portion or '?':<8} {portion * n if portion else '?':<8} {at.alpha:<7g} "
            f"{at.lr:<8g} {updates or '?':<8} {math.ceil(0.1 * updates) if updates else '?':<8} "
            f"{portion * longest if portion else '?'}"
            + ("   offline DPO on the data's own pairs" if n == 0 else ""))
    return "\n".join(lines + [
        "", f"batch   {s.batch_size} prompts an update, in micro-batches of {s.tokens_per_forward} "
        "tokens",
        f"sample  temperature {s.temperature:g} (0 = greedy), at most {s.max_new_tokens} new "
        f"tokens, {s.slots} slots",
        f"rows    prompt {s.max_prompt_length}, with response {s.max_length} tokens",
        f"seeds   {s.seeds}; baseline alpha = 0: {'yes' if s.baseline else 'no'}",
        f"files   {s.run_dir}/iter_K/{{samples.jsonl, pairs.jsonl, reference.jsonl, policy/, "
        f"eval.jsonl}}, {s.run_dir}/metrics.jsonl, report.md, figures/", "all     " + ", ".join(
            f"{name} {value}" for name, value in s.as_dict().items() if value is not None)])
