"""The command `python train_loop.py`: its settings and inputs, the arms of a run, and the report.

An arm is one (alpha, seed): a folder, and one run of Algorithm 1 (train_loop.self_explore).
Test: pytest tests/test_train_loop.py.
"""

from dataclasses import replace

import torch
import transformers

from harness.models import distributed, memory, weights
from harness.runs import plots, report, report_page, run_record, setup, trackers
from harness.runs import settings as flags
from harness.models.distributed import PROCESS, say
from harness.runs.run_folder import Run


def main(argv, self_explore):
    """argv: the flags; None: those of the command line. self_explore: Algorithm 1."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = flags.read(argv)
    if settings.dry_run:
        prompts, source = setup.count_prompts(settings)
        say(flags.dry_run_text(settings, prompts, source))
        return say(memory.describe(settings, prompts))
    settings = memory.fitted(settings)
    weights.spare_housekeeping()
    if settings.variant:
        torch.set_num_threads(1)  # for matrices this small a second thread is no help
    distributed.start(settings.device)
    inputs = setup.read_inputs(settings)  # refuses all that cannot work
    folder, arms = settings.run_dir, []
    with run_record.locked(folder):
        if settings.fresh:
            distributed.only_first(run_record.delete_run, folder, inputs.files)
        for seed in range(settings.seed, settings.seed + settings.seeds):
            home, start = folder if seed == settings.seed else folder / f"seed_{seed}", None
            for name, alpha, here in arms_of(settings, home):
                s = replace(settings, alpha=alpha, seed=seed)
                say(f"\n=== {name}, alpha {alpha:g}, seed {seed} -> {here}")
                distributed.only_first(run_record.claim, here, s.as_dict(), inputs.made_from)
                start = start or setup.make_start(inputs, s, Run(home))
                tracker = s.track and PROCESS == 0 and trackers.tracker(s.track, here, s.as_dict())
                self_explore(Run(here, tracker), start, s)
                arms.append((name, here))
        distributed.only_first(finish, arms, settings)
    distributed.stop()


def arms_of(settings, home):
    """(name, alpha, folder) of the arms of a seed: SELM, and iterative DPO to compare it with."""
    yield ("SELM" if settings.alpha > 0 else "DPO"), settings.alpha, home
    if settings.baseline and settings.alpha > 0:
        yield "DPO", 0.0, home / "baseline"


def finish(arms, settings):
    """Draws the figures, writes report.md and report.html, and prints where everything is."""
    figures = plots.draw_all(arms, settings.run_dir / "figures")
    say("\n" + report.write(arms, settings.run_dir / "report.md", figures))
    report_page.write(arms, settings.run_dir / "report.html", figures)
    say(f"\nreport   {settings.run_dir / 'report.md'}, {settings.run_dir / 'report.html'}")
    say(f"figures  {', '.join(map(str, figures))}")
    say(f"policy   {settings.run_dir}/iter_{settings.first + settings.iterations - 1}/policy")
