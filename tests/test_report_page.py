"""report.html: what a person sees, what a model's output can do there, how large it may grow."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess

import pytest

from harness.runs import plots, report_page
from harness.runs.output_files import write_jsonl
from test_plots import home, write_config, write_iteration, write_pairs  # noqa: F401 (a fixture)

HOSTILE = ("<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
           "</div></details>{{ 7 * 7 }} \x1b[2J \u202e \" ' & <b>bold</b>")


def write(folder):
    report_page.write(plots.find_runs(folder), folder / "report.html", [])
    return (folder / "report.html").read_text("utf-8")


def rows_of(text, title):
    """The rows of a section: [(prompt, meta, [(who and meta, role, text)])], as plain text."""
    plain = lambda piece: html.unescape(re.sub("<[^>]*>", "", piece)).strip()
    [section] = [part for part in text.split("<details")[1:] if title in part]
    found = []
    for row in section.split('<div class="row"')[1:]:
        cells = re.findall(r'<div class="cell (.*?)">\s*<div class="meta">(.*?)</div>\s*'
                           r'<div class="text">(.*?)</div>', row, re.DOTALL)
        prompt, meta = (plain(re.search(f'<div class="{name}">(.*?)</div>', row, re.DOTALL)[1])
                        for name in ("text prompt", "meta"))
        found.append((prompt, meta, [(plain(meta), role, plain(t)) for role, meta, t in cells]))
    return found


def test_candidates_stand_side_by_side_with_what_is_known_of_them(home):  # noqa: F811
    """Log-probs of another prompt (the files' orders differ); a role at the wrong candidate; a cut
    sample that looks finished."""
    rows = rows_of(write(home), "SELM, iteration 1: candidates")
    assert rows[1] == ("tell 1", "q1", [
        ("chosen, data_chosen score 0.5; log pi_ref -2.50; 3 tokens", "chosen", "good 1"),
        ("rejected, data_rejected score -1; log pi_ref -2.50; 3 tokens", "rejected", "bad 1"),
        ("sampled score 0.25; 3 tokens, cut: no end token", "", "mine 1")])


def rescore(path, prompt_id, score):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in rows if row["prompt_id"] == prompt_id)["scores"][2] = score
    write_jsonl(path, rows)


def test_held_out_answers_stand_side_by_side_largest_change_first(home):  # noqa: F811
    """Answers of neighbours (the files' orders differ); a start an arm; small changes on top; a
    change whose sign is lost."""
    write_iteration(home / "iter_2", (1, 0), 5.0, 1.0, text="other {}")
    rescore(home / "iter_2/eval.jsonl", "p1", -33.0)
    first, second = rows_of(write(home), "Held-out")
    assert first == ("say 1", "p1; largest change of the score: -34", [
        ("start score 1; log-ratio +1.00; 2 tokens", "", "a 1"),
        ("SELM 1 score 11; log-ratio -29.00; 2 tokens; as start", "", "a 1"),
        ("SELM 2 score -33; log-ratio -14.00; 2 tokens", "", "other 1"),
        ("DPO 1 score 21; log-ratio -59.00; 2 tokens; as start", "", "a 1")])
    assert second[:2] == ("say 0", "p0; largest change of the score: +20")
    assert second[2][2] == (
        "SELM 2 score 5; log-ratio -14.00; 2 tokens, cut: no end token", "", "other 0")


def test_warnings_judge_command_and_figures_are_on_the_page(home, tmp_path):  # noqa: F811
    """A page that shows the curves of a run that fails, and not the warning."""
    text = html.unescape(write(home))
    assert '<p class="warning">warning: 100% of the samples hit the length limit' in text
    assert "`r`, which also chose the pairs" in text and "train_loop.py <b>" in text
    (tmp_path / "one.png").write_bytes(b"\x89PNG")
    report_page.write(plots.find_runs(home), home / "report.html", [tmp_path / "one.png"])
    assert 'alt="one" src="data:image/png;base64,iVBORw=="' in (home / "report.html").read_text()


def test_a_page_of_thousands_of_long_prompts_stays_small_and_says_what_it_leaves_out(tmp_path):
    """A gigabyte that no browser opens; texts that grow fivefold when they are escaped."""
    write_config(tmp_path, 0.3)
    write_iteration(tmp_path / "start", range(300), 0.0, 0.0, text="'\"&<" * 5000 + "{}")
    write_pairs(tmp_path / "iter_1", ("<" * 20_000, "b" * 20_000, "c"), 3000)
    text = write(tmp_path)
    assert 2e6 < len(text.encode()) < 7e6 and "No evaluation was run" in text
    rows = rows_of(text, "SELM, iteration 1: candidates")
    assert 100 < len(rows) < 1000 and f"({len(rows)} of 3000 prompts)" in text
    assert f"{3000 - len(rows)} prompts are left out" in text
    assert rows[0][2][1][2] == "b" * report_page.CHARACTERS + " ... (17002 more characters)"


# ----------------------------------------------------------------------------------------------
# In a real browser
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def browse(tmp_path):
    """(text of a page) -> its document after its scripts have run."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("no chromium here")

    def dump(text):
        (tmp_path / "page.html").write_text(text, "utf-8")
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000",
             (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-1000:]
        return done.stdout
    return dump


PROBE = """
    const first = () => document.querySelector(".rows .prompt").textContent;
    const shown = () => rows.filter(row => row.checkVisibility()).length;
    document.querySelectorAll("details").forEach(box => box.open = true);
    const seen = [rows.length, shown(), first()];
    const act = (what, value, event) => {
      what.value = value;
      what.dispatchEvent(new Event(event));
      seen.push(shown(), first());
    };
    act(filter, "NEEDLE 2", "input");
    act(filter, "", "input");
    act(sort, "order", "change");
    act(sort, "change", "change");
    seen.push(document.querySelectorAll(".text *").length);
    document.body.setAttribute("data-seen", JSON.stringify(seen));
"""


def test_a_models_output_does_nothing_and_the_pages_own_script_does(home, browse):  # noqa: F811
    """Markup of a model that runs; a content security policy that stops our own script as well; a
    filter or an order that does nothing."""
    write_pairs(home / "iter_1", (HOSTILE, "bad", "needle"), 3)
    write_iteration(home / "iter_2", (1, 0), 3.0, 1.0, text="{}" + HOSTILE.replace("{{", "{{{{"))
    rescore(home / "iter_2/eval.jsonl", "p1", 99.0)
    text = write(home)
    dumped = browse(text)
    assert "<title>SELM run: x</title>" in dumped and "7 of 7 rows shown" in dumped
    assert "&lt;script&gt;document.title = 'ran'" in dumped and "{{ 7 * 7 }}" in dumped
    assert "\x1b" not in dumped and "\u202e" not in dumped

    # The page with a probe behind its script, which types, chooses and writes down what it sees.
    [script] = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    probed = text.replace(script, script + PROBE).replace(digest(script), digest(script + PROBE))
    seen = json.loads(html.unescape(re.search('data-seen="(.*?)"', browse(probed))[1]))
    assert seen == [7, 7, "say 1", 1, "say 1", 7, "say 1", 7, "say 0", 7, "say 1", 0]


def test_even_markup_that_was_not_escaped_could_not_run(home, browse):  # noqa: F811
    """A content security policy with a hole. (Without it the same page does run: a test that cannot
    fail shows nothing.)"""
    unsafe = write(home).replace("mine 0", HOSTILE)
    assert "<title>SELM run: x</title>" in browse(unsafe)
    assert "<title>ran</title>" in browse(unsafe.replace("Content-Security-Policy", "x"))


def digest(script):
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
