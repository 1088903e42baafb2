"""Verifies, measures and compares on this machine's GPUs, and writes one report: `benchmarks/gpu.sh` runs it.

Every step is a process with a time limit. Its results are on disk before the next step begins, and a step that
fails or hangs does not stop the others. `--device cpu --small` rehearses every line on a CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from on_gpu.found import read
from on_gpu.step import STEPS

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
# The most seconds for each step, the most important step first, and for all steps. With the installation all steps
# take at most 8 minutes.
LIMITS = {"machine": 45, "exact": 135, "decode": 75, "kernels": 45, "denoise": 90, "whole": 100}
SECONDS = 430.0
# A rehearsal on a busy CPU may take this many times as long.
SLOWER_ON_CPU = 10
LOG_LINES = 25
DONE = "done"


@dataclass
class Outcome:
    """The outcome of a step: a status in words, its seconds, its results, and the end of its log if it failed."""

    name: str
    status: str
    seconds: float
    found: dict[str, Any]
    log: str = ""

    @property
    def well(self) -> bool:
        return self.status == DONE and not self.found["wrong"]


def carry_out(name: str, command: Sequence[str], out: Path, *, limit: float, env: Mapping[str, str]) -> Outcome:
    """Run the step `name` with `command`, for `limit` seconds at most. The step leaves its results in `out`."""
    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        # The step gets its own session, so that its ranks are ended together with it.
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            status = DONE if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"ended after its limit of {limit:.0f} s"
        finally:
            end(process)
    words = "" if status == DONE else "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    return Outcome(name, status, time.monotonic() - started, read(file), words)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all of its ranks."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all processes have ended
    process.wait()


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table. It has the columns of all rows, in the order of their first occurrence."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines)


def markdown(about: str, outcomes: Sequence[Outcome], *, waiting: Sequence[str]) -> str:
    """The report: the status of each step, what is wrong, and then every step's tables."""
    parts = ["# On this machine", about]
    rows = [{"step": o.name, "went": o.status, "seconds": f"{o.seconds:.0f}"} for o in outcomes]
    rows += [{"step": name, "went": "not run yet", "seconds": ""} for name in waiting]
    wrong = [f"- **{o.name}**: {text}" for o in outcomes for text in o.found["wrong"]]
    wrong += [f"- **{o.name}**: {o.status}" for o in outcomes if o.status != DONE]
    parts += [table(rows), "## Wrong", "\n".join(wrong) or "Nothing that was looked at."]
    for outcome in outcomes:
        parts.append(f"## {outcome.name}")
        for title, lines in outcome.found["tables"].items():
            parts += [f"### {title}", table(lines)]
        if outcome.found["notes"]:
            parts.append("\n".join(f"- {note}" for note in outcome.found["notes"]))
        if outcome.log:
            parts += [f"{outcome.status}; the end of its log:", f"```\n{outcome.log}\n```"]
    return "\n\n".join(parts) + "\n"


def revision() -> str:
    """The git commit, with a suffix if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # a bare machine may have no git
        return "an unknown revision"
    return done.stdout.strip() or "an unknown revision"


def environment(device: str) -> dict[str, str]:
    """The environment variables of the steps."""
    path = [str(BENCHMARKS), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        found["COSMOS3_ACCELERATOR_PATH"] = "1"  # take the accelerator's branches, see distributed/host_path.py
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--seconds", type=float, help=f"of all steps together, at most: {SECONDS:.0f} on a GPU")
    parser.add_argument("--topology", default="h200_x1", help="whose accelerator is planned for")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    return parser.parse_args()


def main() -> int:
    """Run the steps. Returns 1 if a step failed or found something wrong, else 0."""
    given = options()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="minutes")
    about = f"{now}, {revision()}, `benchmarks/gpu.sh {' '.join(sys.argv[1:])}`."
    if given.device == "cpu":
        about += " **A rehearsal on a CPU: its numbers say nothing of a GPU.**"
    outcomes: list[Outcome] = []
    slower, env = SLOWER_ON_CPU if given.device == "cpu" else 1, environment(given.device)
    deadline = time.monotonic() + (given.seconds or SECONDS * slower)
    for number, name in enumerate(given.steps):
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "on_gpu.step", name, "--file", str(out / f"{name}.json")]
        command += ["--device", given.device, "--topology", given.topology, *["--small"] * given.small]
        limit = min(LIMITS[name] * slower, deadline - time.monotonic())
        if limit > 0:
            outcomes.append(carry_out(name, command, out, limit=limit, env=env))
        else:
            outcomes.append(Outcome(name, "not run: the time was over", 0.0, read(out / "none")))
        page = markdown(about, outcomes, waiting=given.steps[number + 1 :])
        (out / "report.md").write_text(page, encoding="utf-8")
    print((out / "report.md").read_text(encoding="utf-8"))
    return 0 if all(outcome.well for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
