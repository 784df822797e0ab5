"""Keep runs in results/ and write the tables of README.md from what is kept here.

    python -m results.tables                                 the tables anew, from results/
    python -m results.tables runs/alexcaps-single ...        keep these runs first: config.json,
                                                             metrics.csv, report.json, pictures

Run evaluate.py on a run before it is kept. In README.md each table stands between two markers,
<!-- results: NAME --> and <!-- end -->; nothing between them is written by hand. The line numbers
of its equations are brought up to date, too.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import evaluate
from results.benchmark import report_table, speed_table
from train_single import UsageError, run_main, write_text

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
KEPT = ("config.json", "metrics.csv", "report.json")  # and, for the first seed, the pictures


def keep(run_dir: Path) -> None:
    """Copy what stays of a run; UsageError if it has not been evaluated."""
    run = evaluate.read_run(run_dir)
    if evaluate.read_report(run) is None:
        raise UsageError(f"{run_dir} has no report of its best.pt: run evaluate.py on it first")
    target = HERE / run_dir.name
    target.mkdir(exist_ok=True)
    pictures = run_dir.glob("*.png") if run["config"]["seed"] == 0 else ()
    for path in (*(run_dir / name for name in KEPT), *pictures):
        shutil.copy(path, target / path.name)


def kept_rows() -> list[dict]:
    """The rows of all runs kept here."""
    runs = [evaluate.read_run(path.parent) for path in sorted(HERE.glob("*/config.json"))]
    return evaluate.make_rows([run | {"report": evaluate.read_report(run)} for run in runs])


def headline(rows: list[dict]) -> str:
    """The highest test accuracy of each network, in a line each."""
    text = ""
    for model in dict.fromkeys(row["model"] for row in rows):
        row = max((row for row in rows if row["model"] == model), key=lambda r: r["accuracy"])
        report = row["report_accuracy"]
        text += (
            f"- **{model}: {row['accuracy']:.2f} %** of the test digits ({row['runs']} run(s), "
            f"{row['setup']}, {row['epochs']} epoch(s) of {row['train_images']:,} digits, "
            f"{row['hardware']}); the report: {report:.2f} % after {row['report_epochs']} epochs\n"
        )
    return text


def sections(rows: list[dict]) -> dict[str, str]:
    """Marker's name -> the Markdown between the markers."""
    return {
        "headline": headline(rows),
        "accuracy": evaluate.results_table(rows),
        "cost": evaluate.cost_table(rows),
        "claims": evaluate.claims_table(rows),
        "speed": "\n".join(
            speed_table(json.loads(path.read_text())) for path in sorted(HERE.glob("speed-*.json"))
        ),
        "report-code": report_table(json.loads((HERE / "report-code-cpu.json").read_text())),
    }


def fill(text: str, tables: dict[str, str]) -> str:
    """The README's text with each table between its markers."""
    for name, table in tables.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(
            pattern, lambda m, t=table: f"{m[1]}\n{t}\n{m[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise UsageError(f"README.md has {found} places for the table {name!r} instead of one")
    return text


def renumber(text: str) -> str:
    """The README's text with the present line number of each line of code that it quotes."""

    def place(match: re.Match) -> str:
        lines = (HERE.parent / match[1]).read_text().splitlines()
        number = next((k for k, line in enumerate(lines, 1) if match[2] in line), None)
        if number is None:
            raise UsageError(f"README.md quotes {match[2]!r}, which is not in {match[1]}")
        return f"| {match[1]}:{number} | `{match[2]}` |"

    return re.sub(r"\| (\w+\.py):\d+ \| `(.+?)` \|", place, text)


def main() -> None:
    for run_dir in map(Path, sys.argv[1:]):
        keep(run_dir)
    rows = kept_rows()
    write_text(HERE / "comparison.md", evaluate.comparison_text(rows))
    write_text(HERE / "comparison.csv", evaluate.comparison_csv(rows))
    evaluate.draw_comparison(rows, HERE)
    write_text(README, renumber(fill(README.read_text(), sections(rows))))
    print(f"{len(rows)} rows from {HERE}: comparison.md, .csv, .png and the tables of README.md")


if __name__ == "__main__":
    run_main(main)
