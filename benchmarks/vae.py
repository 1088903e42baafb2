"""Compares the parallel VAE with one rank, diffusers, DistVAE and convolutions alone, in interleaved rounds.

    python benchmarks/vae.py                                              # every case at the small width: minutes
    python benchmarks/vae.py --width full --cases layer_pipeline          # the Wan2.2 VAE itself
    python benchmarks/vae.py --cases spatial_shard --frames 5 --rows 45 --cols 80
    python benchmarks/vae.py --old ../before                              # beside another checkout of this project

Writes vae.json and vae.md into --out after each case. docs/bench.md says how the numbers are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simulate import MeasuredCosts, clip_seconds

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.jobs.verify.distance import ROUNDING_DB
from cosmos3_pipeline.plugin_api import LatentShape, Link, OwnRunner, discover
from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.vae.program import program_for

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"small": "toy_random", "full": "nano"}  # options of conf/model with these widths
PEERS = ("diffusers", "diffusers_tiled", "distvae", "roofline")
ALONE = ("diffusers", "diffusers_tiled", "one_rank", "roofline")  # these work on the root while the others wait
EXACTNESS = ("bitwise", "rounding", "approximate")
MOST_TIMES_ROUNDS = 4  # the limit is this factor times --rounds, because more rounds say little more


@dataclass(frozen=True)
class Case:
    """One case to measure. `small` and `full`: latent rows and columns at these widths."""

    call: str
    frames: int
    small: tuple[int, int]
    full: tuple[int, int]
    contestants: tuple[str, ...]
    dtype: str = "float32"


# DistVAE splits latent rows in pairs and refuses an odd number of rows.
CASES = {
    "decode": Case("decode", 8, (23, 20), (3, 2), ("diffusers", "diffusers_tiled", "one_rank", "roofline")),
    "decode_bf16": Case("decode", 8, (23, 20), (3, 2), ("diffusers", "one_rank", "roofline"), "bfloat16"),
    "layer_pipeline": Case("decode", 16, (24, 20), (6, 4), ("diffusers", "one_rank", "layer_pipeline", "distvae")),
    "spatial_shard": Case(
        "decode", 3, (23, 20), (11, 4), ("diffusers", "one_rank", "one_rank_each", "spatial_shard")
    ),
    "spatial_shard_even": Case(
        "decode", 3, (24, 20), (12, 4), ("diffusers", "one_rank", "spatial_shard", "distvae")
    ),
    "stream": Case("stream", 16, (11, 10), (5, 4), ("diffusers", "one_rank", "layer_pipeline", "spatial_shard")),
    "encode": Case("encode", 5, (11, 10), (3, 4), ("diffusers", "one_rank", "layer_pipeline", "spatial_shard")),
    "image_decode": Case("decode", 1, (11, 10), (5, 6), ("diffusers", "one_rank", "spatial_shard")),
    "image_encode": Case("encode", 1, (11, 10), (5, 6), ("diffusers", "one_rank", "spatial_shard")),
}


class Ranks:
    """The ranks of one checkout. A rank without work waits on stdin, which takes no processor time."""

    def __init__(self, checkout: Path, dimensions: Mapping[str, Any], ranks: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = [str(checkout), str(checkout / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        command = [
            sys.executable,
            str(Path(__file__).with_name("vae_rank.py")),
            json.dumps(dimensions),
            str(threads),
        ]
        self._processes = [
            subprocess.Popen(
                command,
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def tell(self, do: str, *, root: bool = False, **command: Any) -> list[dict[str, Any]]:
        """Send a command to all ranks, or to the root alone, and return their answers.

        Raises RuntimeError if a rank fails.
        """
        told = self._processes[:1] if root else self._processes
        for process in told:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in told]
        errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
        if errors:
            raise RuntimeError("\n".join(errors))
        return answers

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"exit code {process.wait()}"}
        return answer

    def end(self, *, failed: bool) -> None:
        """Let the ranks end, or kill them if they may wait for each other."""
        for process in self._processes:
            if failed:
                process.kill()
            elif process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            process.wait()


@contextmanager
def started(checkout: Path, dimensions: Mapping[str, Any], ranks: int, threads: int) -> Iterator[Ranks]:
    """The ranks of `checkout`. They end with the block. Raises RuntimeError if they run other code."""
    group, failed = Ranks(checkout, dimensions, ranks, threads), True
    try:
        package = Path(group.tell("hello", root=True)[0]["package"])
        if package.parent != checkout:
            raise RuntimeError(f"{checkout} is no checkout of this project: its ranks import {package}")
        yield group
        failed = False
    finally:
        group.end(failed=failed)


def run_case(
    case: Case, size: tuple[int, int], groups: Mapping[str, Ranks], given: argparse.Namespace, link: Link | None
) -> dict[str, Any]:
    """Run every contestant of a case in every round. `groups`: the ranks of the checkouts `new` and `old`.

    link: the measured link between two ranks here, or None.
    """
    rows, cols = size
    shape: dict[str, Any] = dict(call=case.call, frames=case.frames, rows=rows, cols=cols, dtype=case.dtype)
    for group in groups.values():
        group.tell("case", **shape)
    new = groups["new"]
    found: dict[str, Any] = {**shape, "contestants": {}, "absent": {}, "old": {}}
    seconds_file = ""
    if case.call == "decode" and case.dtype == "float32" and not given.no_costs:
        found["costs"] = new.tell("ops", root=True, rounds=given.rounds)[0]
        seconds_file = str(given.out / "op_seconds.json")
        costs = {"cases": {"this": found["costs"]}}
        Path(seconds_file).write_text(json.dumps({"vae": given.dimensions, "costs": costs}))
    taking_part: list[tuple[str, str]] = []
    for name in case.contestants:
        for side, group in groups.items():
            if side == "old" and name in PEERS:
                continue
            answers = group.tell("make", root=name in ALONE, name=name, op_seconds=seconds_file)
            absent = [answer["absent"] for answer in answers if "absent" in answer]
            if absent and side == "new":
                found["absent"][name] = absent[0]
            elif not absent:
                taking_part.append((side, name))
    times = rounds(taking_part, groups, given.rounds, given.seconds)
    # The result of one rank comes first, because the other results are compared with it.
    for side, name in sorted(taking_part, key=lambda each: each[1] != "one_rank"):
        answers = groups[side].tell("check", root=name in ALONE, name=name)
        if not answers[0].get("equal", True):
            answers[0]["psnr_db"] = psnr_db(answers[0]["range"], answers[0]["mean_square"])
        row = {"ranks": len(answers), **times[side, name], "checked": answers}
        found["contestants" if side == "new" else "old"][name] = row
        if side == "new" and "costs" in found and link is not None:
            row["clock_s"] = by_the_clock(name, found, given, seconds_file, link)
    line = found["contestants"].get("roofline")
    if line is not None:  # a roofline is the least time of all rounds, so every round is compared with this time
        line["seconds"] = line["checked"][0]["seconds"]
        line["rounds"] = [line["seconds"]] * len(line["rounds"])
    return found


def rounds(
    taking_part: Sequence[tuple[str, str]], groups: Mapping[str, Ranks], least: int, seconds: float
) -> dict[tuple[str, str], dict[str, Any]]:
    """The seconds of each contestant in every round. The order rotates, and every other round is backwards.

    There are `least` rounds, or as many as fit into `seconds` by the time of the first round, but at most
    MOST_TIMES_ROUNDS times `least`.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {key: {"rounds": [], "processor": []} for key in taking_part}
    began, count, index = time.perf_counter(), least, 0
    while index < count:
        start = index % len(taking_part)
        for side, name in [*taking_part[start:], *taking_part[:start]][:: -1 if index % 2 else 1]:
            answers = groups[side].tell("run", root=name in ALONE, name=name)
            # A round takes as long as its slowest rank.
            found[side, name]["rounds"].append(max(answer["seconds"] for answer in answers))
            found[side, name]["processor"].append(max(answer["processor_s"] for answer in answers))
        if index == 0:
            count = max(least, min(MOST_TIMES_ROUNDS * least, int(seconds / (time.perf_counter() - began))))
        index += 1
    for row in found.values():
        row["seconds"] = statistics.median(row["rounds"])
    return found


def exactness(checked: Mapping[str, Any], call: str) -> str:
    """The exactness of a `call`'s result against one rank's: a level, or a PSNR. "" if it was not compared."""
    if "equal" not in checked:
        return ""
    if checked["equal"]:
        return EXACTNESS[0]
    distance_db = checked["psnr_db"]
    one_level = call == "stream" and checked["max_abs"] <= 1  # rounding of 8-bit frames
    return EXACTNESS[1] if distance_db >= ROUNDING_DB or one_level else f"{distance_db:.0f} dB"


def broken_promises(report: Mapping[str, Any]) -> list[str]:
    """Messages for strategies whose float32 result is less exact than they declare."""
    found = []
    for case, measured in report["cases"].items():
        for name, row in measured["contestants"].items():
            got, declared = exactness(row["checked"][0], measured["call"]), row["checked"][0]["declared"]
            level = EXACTNESS.index(got) if got in EXACTNESS else len(EXACTNESS) - 1
            if got and declared and level > EXACTNESS.index(declared) and measured["dtype"] == "float32":
                found.append(f"{name} in {case} declares {declared}, and its result is {got}")
    return found


def by_the_clock(
    name: str, case: Mapping[str, Any], given: argparse.Namespace, seconds_file: str, link: Link
) -> float | None:
    """Seconds of an installed strategy by the clock, from measured seconds of ops and messages."""
    cls = discover().strategies.get(name)
    if cls is None or issubclass(cls, OwnRunner):
        return None
    strategy = cls(**{"op_seconds": seconds_file} if hasattr(cls, "op_seconds") else {})
    program = program_for("decode", given.dimensions)
    shape = LatentShape(1, case["frames"], case["rows"], case["cols"])
    assignment = strategy.assign(program, shape, given.ranks)
    return clip_seconds(program, shape, assignment, MeasuredCosts(case["costs"]), lambda a, b: link)


# ------------------------------------------------------------------------------------------------------ the report
def table(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. The first of `rows` has the headings."""
    heading, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, "|" + "---|" * heading.count(" | ") + "---|", *body])


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def case_table(report: Mapping[str, Any], case: Mapping[str, Any]) -> str:
    """The table of the contestants of one case."""
    rows = [["contestant", "ranks", "seconds", "times one rank", "by the clock", "result", "peak MB", "sent MB"]]
    alone = case["contestants"].get("one_rank")
    for name, row in case["contestants"].items():
        first, clock = row["checked"][0], row.get("clock_s")
        ratios = [a / b for a, b in zip(alone["rounds"], row["rounds"], strict=True)] if alone else []
        peak = max((answer.get("peak_bytes", 0) for answer in row["checked"]), default=0)
        sent = sum(answer.get("sent_bytes", 0) for answer in row["checked"])
        rows.append(
            [
                name,
                str(row["ranks"]),
                f"{row['seconds']:.3f}",
                spread(ratios) if ratios else "",
                "" if clock is None else f"{clock:.3f}",
                exactness(first, case["call"]),
                f"{peak / 1e6:.1f}" if peak else "",
                f"{sent / 1e6:.2f}" if sent else "",
            ]
        )
    return table(rows)


def old_table(report: Mapping[str, Any]) -> str:
    """The table of the old checkout beside this checkout, in the same rounds."""
    rows = [["case", "contestant", "old seconds", "new seconds", "new / old", "of the processor", "result"]]
    for case, measured in report["cases"].items():
        for name, old in measured["old"].items():
            new = measured["contestants"].get(name)
            if new is not None:
                clock, cpu = (
                    spread([a / b for a, b in zip(new[key], old[key], strict=True)])
                    for key in ("rounds", "processor")
                )
                same = new["checked"][0].get("digest") == old["checked"][0].get("digest")
                seconds = [f"{row['seconds']:.3f}" for row in (old, new)]
                rows.append([case, name, *seconds, clock, cpu, "the same bits" if same else "other bits"])
    return table(rows)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    machine, parts = report["machine"], [f"# The VAE on {report['ranks']} ranks"]
    parts.append(
        f"{report['date']}, {report['revision']}"
        + (f" beside {report['old_revision']}" if report["old_revision"] else "")
        + f", `{report['command']}`. {machine['processor']}, {machine['cores']} cores (load {machine['load']:.1f} "
        f"before), torch {machine['torch']}, {report['threads']} thread a rank, width {report['width']}."
    )
    if report["old_revision"]:
        parts += ["## Old beside new", old_table(report)]
    for name, case in report["cases"].items():
        count = len(next(iter(case["contestants"].values()), {"rounds": [], "processor": []})["rounds"])
        what = (
            f"{case['call']}, {case['frames']} latent frames of {case['rows']} x {case['cols']}, {case['dtype']}"
        )
        parts += [f"## {name}", f"{what}; medians of {count} rounds.", case_table(report, case)]
        notes = {name: row["checked"][0].get("note") for name, row in case["contestants"].items()}
        absent = {name: f"absent: {why}" for name, why in case["absent"].items()}
        parts += [f"- {name}: {why}" for name, why in {**notes, **absent}.items() if why]
    parts += [f"- **{lie}**" for lie in broken_promises(report)]
    return "\n\n".join(parts) + "\n"


def revision(checkout: Path) -> str:
    """The git commit of a checkout, with a suffix if files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no git"


def heading(program: str) -> dict[str, Any]:
    """The beginning of a report: date, machine and command of a program of this folder."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "revision": revision(ROOT),
        "command": " ".join(["python", f"benchmarks/{program}", *sys.argv[1:]]),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "instructions": torch.backends.cpu.get_cpu_capability(),
            **{name: version(name) for name in ("torch", "diffusers")},
        },
    }


def processor() -> str:
    """The name of the processor, on Linux as the kernel has it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())


def options() -> argparse.Namespace:
    """The command line. `chosen` are the cases with their overrides, `dimensions` those of the VAE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument(
        "--width", choices=MODELS, default="small", help="of model=toy_random, or the Wan2.2 VAE's"
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        help=f"instead of the case's: {', '.join(PEERS)}, one_rank, "
        "one_rank_each, a strategy's name, or module:Class",
    )
    parser.add_argument("--strategies", nargs="+", default=[], help="beside the case's contestants")
    for name in ("frames", "rows", "cols"):
        parser.add_argument(f"--{name}", type=int, help=f"latent {name} instead of the case's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the case's")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="more rounds of a case if they fit into so many"
    )
    parser.add_argument("--no-costs", action="store_true", help="do not measure ops and messages for the clock")
    parser.add_argument("--old", type=Path, help="another checkout of this project, to be run beside this one")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    given = parser.parse_args()
    given.old = given.old and given.old.resolve()
    given.out = given.out.resolve()
    changes = {k: v for k in ("frames", "dtype") if (v := getattr(given, k)) is not None}
    given.chosen = {}
    for name in given.cases:
        case = replace(CASES[name], **changes)
        names = dict.fromkeys((*(given.contestants or case.contestants), *given.strategies))
        rows, cols = getattr(case, given.width)
        given.chosen[name] = replace(case, contestants=tuple(names)), (given.rows or rows, given.cols or cols)
    given.dimensions = plain(compose([f"model={MODELS[given.width]}"]).typed().model.vae)
    return given


def main() -> int:
    """Run the cases. Returns 1 if a strategy's result is less exact than it declares, else 0."""
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        **heading("vae.py"),
        "old_revision": given.old and revision(given.old),
        "ranks": given.ranks,
        "threads": given.threads,
        "width": given.width,
        "vae": given.dimensions,
        "cases": {},
        "costs": {"cases": {}, "link": None},
    }
    with ExitStack() as stack:
        checkouts = {**({"old": given.old} if given.old else {}), "new": ROOT}
        groups = {
            side: stack.enter_context(started(checkout, given.dimensions, given.ranks, given.threads))
            for side, checkout in checkouts.items()
        }
        link = None
        if given.ranks > 1 and not given.no_costs:
            report["costs"]["link"] = groups["new"].tell("link")[0]
            link = Link(**report["costs"]["link"])
        for name, (case, size) in given.chosen.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            found = report["cases"][name] = run_case(case, size, groups, given, link)
            if "costs" in found:
                report["costs"]["cases"][name] = found["costs"]
            (given.out / "vae.json").write_text(json.dumps(report, indent=1))
            (given.out / "vae.md").write_text(markdown(report))
    print((given.out / "vae.md").read_text())
    return 1 if broken_promises(report) else 0


if __name__ == "__main__":
    sys.exit(main())
