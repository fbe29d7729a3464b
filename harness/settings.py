"""Recipes, flags, and their checks."""

import argparse
import math
import os
from pathlib import Path

import torch

PAPER = dict(data="HuggingFaceH4/ultrafeedback_binarized", known_prompts=61_135, ranker="pairrm",
             iterations=3, offline_first=False, beta=0.01, alpha=1e-3, lr=[5e-7, 3e-7, 1e-7],
             batch_size=128, epochs=1, adam_betas=(0.9, 0.999), adam_eps=1e-8,
             max_grad_norm=1.0, max_length=1024, max_prompt_length=512, max_new_tokens=1024,
             temperature=0.0, slots=64,
             tokens_per_forward=8192, gradient_checkpointing=True, eval_prompts=256,
             prompts_per_iteration=None, seeds=1, baseline=False, variant=None)
RECIPES = {
    "zephyr-7b-sft": PAPER | dict(
        model="HuggingFaceH4/mistral-7b-sft-beta", iterations=4, offline_first=True, batch_size=256,
        lr=[5e-7, 5e-7, 5e-7, 1e-7]),
    "llama-3-8b-instruct": PAPER | dict(model="meta-llama/Meta-Llama-3-8B-Instruct", alpha=1e-4),
    # Phi-3 has a key and value for every head: 0.4 MB of cache a token, three times the others'.
    "phi-3-mini": PAPER | dict(model="microsoft/Phi-3-mini-4k-instruct", slots=32),
    # Not in the paper: small enough for one CPU. Also what an unnamed model gets.
    "smollm2-135m": PAPER | dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", lr=[1e-6], batch_size=16, max_length=512,
        max_prompt_length=256, max_new_tokens=256, slots=16, tokens_per_forward=2048,
        gradient_checkpointing=False, eval_prompts=32, beta=0.1),
    # The toy: a large Adam eps keeps steps proportional to the gradient; with 1e-8 the tiny model
    # is thrown out of its language. alpha is large, or nothing would be seen (README, ablation).
    "toy": PAPER | dict(
        model=None, data=None, known_prompts=None, ranker="oracle", alpha=0.3, beta=1.0, lr=[6e-3],
        batch_size=32, adam_betas=(0.9, 0.95), adam_eps=0.1, prompts_per_iteration=512,
        max_grad_norm=math.inf,  # clipping would undo what the large eps is for
        max_length=64, max_prompt_length=32, max_new_tokens=8, slots=128, tokens_per_forward=8192,
        gradient_checkpointing=False, eval_prompts=48, seeds=5, baseline=True, variant="default"),
}
# The same world with other hidden tastes, for experiments/ablation.py.
RECIPES |= {f"toy-{name}": RECIPES["toy"] | dict(variant=name) for name in ("neutral", "rare")}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Self-Exploring Language Models (arXiv 2405.19332): online preference "
                    "optimisation that explores. Without flags: the toy world, SELM against "
                    "iterative DPO (alpha = 0), in a minute or two.",
        epilog="Settings that are not given come from the recipe; --dry-run prints them all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to train, on what, judged by whom").add_argument
    add("--model", default="toy", help=f"a recipe ({', '.join(RECIPES)}), a hub id org/name, a "
        "folder, or a .gguf file")
    add("--data", help="preferences: a JSONL file or hub id in UltraFeedback-binarized format")
    add("--ranker", help="pairrm[:ID] | reward:ID | file.py:function | human | oracle (toy)")
    add("--chat-template", metavar="FILE", help="Jinja chat template, for a model that has none")
    add("--run-dir", type=Path, help="where everything goes (runs/NAME)")
    add = parser.add_argument_group("the method").add_argument
    add("--alpha", type=float, help="optimism; 0 is iterative DPO; paper: 5e-3 .. 1e-4")
    add("--beta", type=float, help="strength of the KL anchor; paper: 0.01")
    add("--reference", choices=["previous", "initial"], default="previous",
        help="previous: Algorithm 1; initial: a KL anchor that stays at the first model")
    add("--iterations", type=int, help="portions the prompts are split into")
    add("--offline-first", action=argparse.BooleanOptionalAction,
        help="the first portion is plain offline DPO, as in the Zephyr recipe")
    add("--prompts-per-iteration", type=int, help="at most so many prompts a portion")
    add("--responses-per-prompt", type=int, default=1,
        help="fresh samples that join the data's two")
    add("--length-penalty", type=float, default=0.0, help="score minus this, a token")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=float, nargs="+", help="one learning rate, or one an iteration")
    add("--batch-size", type=int, help="prompts an update, over all processes")
    add("--epochs", type=int, help="passes over a portion")
    add("--adam-betas", type=float, nargs=2, help="AdamW's betas")
    add("--adam-eps", type=float, help="AdamW's eps")
    add("--max-grad-norm", type=float, help="gradients are clipped to this norm")
    add("--lora-rank", type=int, default=0, help="train LoRA adapters of this rank; 0: all weights")
    add("--seed", type=int, default=0, help="of shuffling and sampling")
    add("--seeds", type=int, help="repeat the whole run so often, for intervals")
    add = parser.add_argument_group("lengths and sampling").add_argument
    add("--max-length", type=int, help="tokens of prompt + response")
    add("--max-prompt-length", type=int, help="tokens of the prompt, cut from the left")
    add("--max-new-tokens", type=int, help="tokens of a sampled response")
    add("--temperature", type=float, help="0: greedy, as the authors' code; 1: as the paper writes")
    add("--top-p", type=float, default=1.0, help="nucleus sampling")
    add = parser.add_argument_group("speed and memory").add_argument
    add("--tokens-per-forward", type=int, help="budget of a micro-batch; memory grows with it")
    add("--slots", type=int, help="responses sampled side by side")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute layers in backward")
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--plain-rows", action="store_true", help="pad instead of packing, for architectures that "
        "cannot do it")
    add("--device", choices=["cuda", "cpu"], help="a GPU where there is one; the toy: cpu")
    add("--dtype", choices=["fp32", "bf16"],
        help="bf16: autocast over fp32 master weights; from the device")
    add = parser.add_argument_group("the run").add_argument
    add("--save-every", type=int, default=0, metavar="UPDATES", help="keep a checkpoint inside the "
        "training phase too (12 bytes a parameter, twice while one replaces another); 0: a kill "
        "repeats the phase")
    add("--eval-prompts", type=int, help="held-out prompts for the evaluation; 0: none")
    add("--baseline", action=argparse.BooleanOptionalAction,
        help="also run alpha = 0 from the same start and seeds")
    add("--dry-run", action="store_true", help="print the plan and stop; loads no weights")
    add("--fresh", action="store_true", help="delete what --run-dir holds and start over")
    return fill_from_recipe(parser.parse_args(argv))


def fill_from_recipe(args):
    """Completes the flags that were not given, from the recipe. Errors: ValueError."""
    if args.model not in RECIPES and "/" not in args.model and not Path(args.model).exists():
        raise ValueError(f"--model {args.model}: no such recipe, folder or file; the recipes are "
                         f"{', '.join(RECIPES)}, and a hub id has the form org/name")
    args.recipe = args.model if args.model in RECIPES else None
    recipe = RECIPES[args.recipe or "smollm2-135m"]
    args.name = args.recipe or Path(args.model).name.removesuffix(".gguf").lower()
    own_data, own_lr = args.data is not None, args.lr
    args.run_dir = args.run_dir or Path("runs") / args.name
    for name, value in recipe.items():
        if name == "model":
            args.model = value if args.recipe else args.model
        elif getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.variant:
        args.model = str(args.run_dir / "world/base")  # made by run(), one for each seed
        args.data = str(args.run_dir / "world/train.jsonl")
    args.device = args.device or (
        "cuda" if torch.cuda.is_available() and not args.variant else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if own_lr is None or len(args.lr) == 1:  # a recipe's rates, cut or continued by its last one
        args.lr = (args.lr + args.lr[-1:] * args.iterations)[:args.iterations]
    args.use_flex = False  # decided by check_forward
    check_flags(args, own_data)
    return args


def check_flags(args, own_data):
    """Refuses what cannot work whatever the files hold. Errors: ValueError."""
    checks = [
        (not (args.variant and own_data), "--data: the toy makes its own; give --model as well"),
        (args.alpha >= 0, f"--alpha {args.alpha}: must be 0 (iterative DPO) or positive"),
        (args.beta > 0, f"--beta {args.beta}: must be positive"),
        (min(args.lr) > 0, f"--lr {args.lr}: must be positive"),
        (len(args.lr) == args.iterations, f"--lr: {len(args.lr)} rates for {args.iterations} "
         f"iterations; give one, or one an iteration"),
        (args.max_prompt_length < args.max_length, "--max-prompt-length must be below "
         "--max-length, or no room is left for a response"),
        (args.responses_per_prompt == 1 or args.temperature > 0, "--responses-per-prompt > 1 needs "
         "--temperature > 0: greedy samples would all be the same"),
        (0 < args.top_p <= 1, f"--top-p {args.top_p}: must be in (0, 1]"),
        (args.temperature >= 0, f"--temperature {args.temperature}: must not be negative"),
        (not (args.ranker == "human" and int(os.environ.get("WORLD_SIZE", 1)) > 1), "--ranker human: judge in a single process"),
        (args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no GPU here")]
    checks += [(args.save_every >= 0, f"--save-every {args.save_every}: must be 0 or positive")]
    checks += [(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
               for name in ("iterations", "responses_per_prompt", "batch_size", "epochs", "seeds",
                            "max_prompt_length", "max_new_tokens", "tokens_per_forward", "slots")]
    for fine, message in checks:
        if not fine:
            raise ValueError(message)
