"""Writes report.html, a page to read a run: its table, warnings and figures, and for each prompt
the candidates and the answers. The page needs no network and no server.

    python -m harness.runs.report_page runs/toy    writes the page (and draws the figures) again

jinja2 escapes every text, so a model's output is never markup. A content security policy allows the
page to run its own script only, whose checksum it contains. To keep the page small, long texts are
cut and prompts left out; the page says how many.

Test: pytest tests/test_report_page.py.
"""

import base64
import hashlib
import re
from pathlib import Path

import jinja2
from markupsafe import escape

from harness.runs import exits, plots, report
from harness.runs.output_files import printable, write_text
from harness.runs.run_reader import by_iteration, config_of, finished_rows, home_of, rows_of

TEMPLATE = Path(__file__).with_suffix(".html")
BYTES = 6_000_000  # of all texts together
CHARACTERS = 3000  # of one text


def write(runs, path, figures):
    """Writes the page of [(arm, folder)]; figures: paths of PNG files. The data shown are those of
    the first seed; the others' are in their folders."""
    config, source = config_of(runs[0][1]), TEMPLATE.read_text("utf-8")
    settings = config["settings"]
    [script] = re.findall("<script>(.*?)</script>", source, re.DOTALL)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     finalize=lambda value: printable(str(value)))
    write_text(path, environment.from_string(source).render(
        settings=settings, command=" ".join(config["command"]),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        table=report.table_cells(runs), notes=[*report.notes(runs),
                                               report.judged(settings)],
        summaries=[(arm, folder, summaries(folder)) for arm, folder in runs],
        figures=[(Path(f).stem, base64.b64encode(Path(f).read_bytes()).decode()) for f in figures],
        sections=sections([run for run in runs if home_of(run[1]) == runs[0][1]])))


def summaries(folder):
    """The lines of all iterations, warnings among them."""
    return [line.strip() for k in sorted({row["iteration"]
                                                    for row in rows_of(folder, "rank")})
            for line in report.summary(folder, k)]


# ----------------------------------------------------------------------------------------------
# 1. The data, as sections of rows of cells
# ----------------------------------------------------------------------------------------------


def sections(runs):
    """Held-out prompts, then the candidates of each arm and iteration. A section has title, note,
    file, total and rows; a row has prompt, meta, cells, and order and change to sort by; a cell has
    who, meta, role and text."""
    found, answers = [], {}
    for arm, folder in runs:
        for k, rows in by_iteration(folder, "eval.jsonl").items():
            answers["start" if rows.path.parent.name == "start" else f"{arm} {k}"] = rows
        for k, rows in by_iteration(folder, "pairs.jsonl").items():
            found.append({
                "title": f"{arm}, iteration {k}: candidates", "file": rows.path,
                "note": "Green: chosen, red: rejected. Scores compare candidates of one prompt.",
                "total": len(rows), "rows": candidate_rows(rows)})
    if answers:
        found.insert(0, {
            "title": "Held-out prompts: the answer of every iteration",
            "file": answers["start"].path, "total": len(answers["start"]),
            "note": "Score: by the judge, in one list with the data's two responses. Log-ratio: "
                    "log pi(y|x) / pi_start(y|x), in nats.",
            "rows": sorted(held_out_rows(answers), key=lambda row: -row["change"])})
    for section in found:
        section["rows"] = list(up_to(BYTES // len(found), section["rows"]))
    return found


def up_to(size, rows):
    """The first rows, as many as fit into about `size` bytes of markup."""
    for row in rows:
        texts = [row["prompt"], *(cell["text"] for cell in row["cells"])]
        size -= sum(300 + len(escape(printable(text)).encode()) for text in texts)
        if size < 0:
            return
        yield row


def candidate_rows(pairs):
    """The rows of pairs.jsonl, with the reference's log-probs where there are any."""
    reference = pairs.path.with_name("reference.jsonl")
    reference = finished_rows(reference) if reference.exists() else None
    for order, row in enumerate(pairs):
        candidates, scores = row["candidates"], [c.get("score", 0.0) for c in row["candidates"]]
        logps = reference.of(row["prompt_id"])["logps"] if reference else [None] * len(candidates)
        cells = []
        for i, (c, logp) in enumerate(zip(candidates, logps)):
            roles = [name for name in ("chosen", "rejected") if row[name] == i]
            meta = [f"score {c['score']:.4g}"] if "score" in c else []
            meta += [] if logp is None else [f"log pi_ref {logp:.2f}"]
            meta += [f"{len(c['ids'])} tokens" + ("" if c["finished"] else ", cut: no end token")]
            cells.append({"who": ", ".join([*roles, *c["sources"]]), "meta": "; ".join(meta),
                          "role": " ".join(roles), "text": cut(c["text"])})
        equal = "all equal for the judge" if row["chosen"] == row["rejected"] else ""
        yield {"prompt": prompt_text(row["prompt"]), "order": order, "cells": cells,
               "change": max(scores) - min(scores), "meta": "; ".join(filter(None, [
                   row["prompt_id"], row["dropped"] and f"dropped: {row['dropped']}", equal]))}


def held_out_rows(answers):
    """{"start" or arm and iteration: rows of its eval.jsonl} -> a row for each prompt. change: the
    largest difference of a score from the start's, in any iteration."""
    for order, start in enumerate(answers["start"]):
        cells, changes = [], []
        for who, rows in answers.items():
            row = rows.of(start["prompt_id"])
            cells.append(answer_cell(who, row, cells))
            changes.append(row["scores"][2] - start["scores"][2])
        change = max(changes, key=abs)
        yield {"prompt": prompt_text(start["prompt"]), "order": order, "cells": cells,
               "change": abs(change),
               "meta": f"{start['prompt_id']}; largest change of the score: {change:+.4g}"}


def answer_cell(who, row, before):
    """One policy's answer. before: the cells to the left; the first one with this text is named."""
    ratio = row["policy_logps"][2] - row["start_logps"][2]
    meta = [f"score {row['scores'][2]:.4g}", f"log-ratio {ratio:+.2f}",
            f"{len(row['ids'])} tokens" + ("" if row["finished"] else ", cut: no end token")]
    text = cut(row["response"])
    same = next((cell["who"] for cell in before if cell["text"] == text), None)
    return {"who": who, "role": "", "text": text,
            "meta": "; ".join(meta + ([f"as {same}"] if same else []))}


def prompt_text(messages):
    """A single user turn without its role, several turns with their roles."""
    if [turn["role"] for turn in messages] == ["user"]:
        return cut(messages[0]["content"])
    return cut("\n".join(f"[{turn['role']}] {turn['content']}" for turn in messages))


def cut(text):
    """The text, or its beginning and the number of characters that are left out."""
    over = len(text) - CHARACTERS
    return text if over <= 0 else f"{text[:CHARACTERS]} ... ({over} more characters)"


def main(argv=None):
    folder, found = plots.command_line("report_page", "report.html", argv)
    write(found, folder / "report.html", plots.draw_all(found, folder / "figures"))
    print(folder / "report.html")


if __name__ == "__main__":
    exits.run(main, "the same command writes it again")
