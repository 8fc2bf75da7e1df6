"""`python tools/gpu_report.py DIR`: the results of `make gpu` as Markdown.

python tools/gpu_report.py gpu-results                 # stages, tests, figures
python tools/gpu_report.py gpu-results --fastest       # JSON: what is fastest per case
python tools/gpu_report.py gpu-results --keep          # the figures into benchmarks/results/
python tools/gpu_report.py gpu-results --table         # the winners into fastlm/ops/gpus/
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_report, machine, results_file  # noqa: E402
from fastlm.ops import _measured  # noqa: E402


def stages(folder: Path) -> str:
    """A line per stage and per process of it."""
    file = folder / "summary.json"
    if not file.exists():
        return ""
    lines = []
    for stage in json.loads(file.read_text())["stages"]:
        lines.append(f"- {stage['name']}: {stage['status']} {stage['note']}".rstrip())
        for step in stage["steps"]:
            text = f"  - {step['name']}: {step['status']}, {step['seconds']:.0f} s {step['note']}"
            lines.append(text.rstrip())
    return "\n".join(lines)


def tests(folder: Path) -> str:
    """Counts per file, and every failure with the end of what it said."""
    file = folder / "tests.jsonl"
    if not file.exists():
        return ""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the line a kill cut off
            continue
    lines = ["| tests | passed | failed | skipped |", "| --- | ---: | ---: | ---: |"]
    for name in dict.fromkeys(test["id"].split("::")[0] for test in found):
        counts = Counter(t["outcome"] for t in found if t["id"].split("::")[0] == name)
        cells = [str(counts[outcome]) for outcome in ("passed", "failed", "skipped")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for test in found:
        if test["outcome"] == "failed":
            lines.append(f"\n`{test['id']}`:\n\n```\n{test['note']}\n```")
    return "\n".join(lines)


def decoding(folder: Path) -> str:
    """A line per model and way of running it."""
    lines = []
    for file in sorted(folder.glob("decode-*.json")):
        for model in results_file.read(file)["models"]:
            for name, figures in model["variants"].items():
                what = f"- {model['size']} {model['dtype']}, {name}:"
                if "failed" in figures:
                    lines.append(f"{what} failed: {figures['failed']}")
                    continue
                rate = figures["tokens_per_second"]
                share = rate / model["limit"]
                lines.append(f"{what} {rate:.1f} tokens/s, {share:.0%} of the bandwidth's limit")
    return "\n".join(lines)


def write_table(bench: Path, content: dict, folder: Path) -> Path:
    """Writes the chooser's table of the GPU that was measured; ValueError where there is none."""
    try:
        section = gpu_report.table(content)
    except (AttributeError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{bench}: a result file that is damaged: {what}") from None
    except ValueError as error:
        raise ValueError(f"{bench}: {error}") from None
    name = re.sub(r"[^a-z0-9]+", "-", section["for"]["GPU"].lower()).strip("-")
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    _measured.write(path, [section])
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fastest", action="store_true", help="JSON: what is fastest per case")
    parser.add_argument("--keep", action="store_true", help="copy into benchmarks/results/")
    add = parser.add_argument
    add("--table", action="store_true", help="the table that the chooser reads on such GPUs")
    add("--into", type=Path, default=_measured.SHIPPED, help="the folder of --table")
    args = parser.parse_args(argv)
    bench = args.folder / "bench.json"
    try:
        content = results_file.read(bench) if bench.exists() else None
        if content is None and (args.fastest or args.keep or args.table):
            raise ValueError(f"{bench}: no such file; run `make gpu STAGES=bench` first")
        if args.table:
            print(f"written: {write_table(bench, content, args.into)}")
            return 0
    except ValueError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 1
    if args.fastest:
        print(json.dumps(gpu_report.fastest(content), indent=1))
        return 0
    if args.keep:
        name = machine.slug({**content["machine"], "cpu": content["machine"]["gpu"]})
        target = results_file.FOLDER / name / f"{content['date'][:10]}-{content['commit']}.json"
        results_file.write(target, {k: v for k, v in content.items() if k != "format"})
        print(f"written: {target}")
        for file in sorted(args.folder.glob("decode-*.json")):
            copy = target.with_name(f"{target.stem}-{file.name}")
            results_file.write_text(copy, file.read_text())
            print(f"written: {copy}")
        return 0
    parts = {"Stages": stages(args.folder), "Tests": tests(args.folder)}
    parts["Decoding"] = decoding(args.folder)
    if content is not None:
        parts["Figures"] = gpu_report.render(content)
    shown = [f"## {title}\n\n{text}" for title, text in parts.items() if text]
    if not shown:
        print(f"gpu_report: nothing of `make gpu` in {args.folder}", file=sys.stderr)
        return 1
    print("\n\n".join(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
