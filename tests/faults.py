"""A campaign of faults: runs that are hit by a signal, stopped, started twice or over, and what they leave.

`KINDS` is the table of kinds. Each makes one case from random numbers and says what is wrong with its end; a
kind is added by a function with `@kind`. `python tests/faults.py --seed 0 --count 100` runs cases in turn and
writes what it found to a file; `make faults` also writes the table of docs/reliability.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import av

REPOSITORY = Path(__file__).parents[1]
FRAMES = 9
SMALL = ("model=toy_random", "task.height=80", "task.width=96", f"task.num_frames={FRAMES}", "sampler.steps=2")
STILL = ("model=toy_random", "task=t2i", "task.height=80", "task.width=96", "sampler.steps=2")
# Long enough to be hit in the middle.
LONG = ("model=toy_random", "task.height=160", "task.width=192", f"task.num_frames={FRAMES}", "sampler.steps=100")
TOPOLOGIES = ("one process", "2 ranks", "torchrun")
# Seconds in which all is over after a fault, and after which a run that nothing was done to hangs.
GONE_SECONDS, HANGS_SECONDS = 10.0, 300.0
MARK = "COSMOS3_FAULT"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Found:
    """One case: its kind, what was done, and what was wrong with the end; `code` is the exit code."""

    kind: str
    what: str
    code: int | None
    seconds: float
    wrong: list[str]
    said: str = ""


Kind = Callable[[random.Random, "Place"], Found]
KINDS: dict[str, Kind] = {}


def kind(make: Kind) -> Kind:
    """Adds the function to the table, by its name."""
    KINDS[make.__name__.replace("_", " ")] = make
    return make


@dataclass
class Place:
    """The folders of one case, and the processes that were started in it."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def start(self, topology: str, *overrides: str, output: str = "run") -> Run:
        """`launch.py` with `overrides`, in a session of its own, as a shell starts it."""
        mark = uuid4().hex
        logs = self.folder / f"logs{len(self.runs)}"
        logs.mkdir()
        self.temporary.mkdir(exist_ok=True)
        command = [sys.executable, "launch.py"]
        if topology == "torchrun":
            # The ranks write to files of their own, because only their output is judged, not torchrun's.
            command = [*TORCHRUN, "--log-dir", str(logs / "ranks"), "--redirects", "3", "launch.py"]
        ranks = [] if topology == "one process" else ["topology=cpu_x2"]
        folder = self.folder / output
        with (logs / "out").open("wb") as out, (logs / "err").open("wb") as err:
            process = subprocess.Popen(
                [*command, *overrides, *ranks, f"hydra.run.dir={folder}"],
                cwd=REPOSITORY,
                # With FORCE_COLOR bars are drawn into the files as on a terminal, so they tell what the run does.
                env={
                    **os.environ,
                    MARK: mark,
                    "TMPDIR": str(self.temporary),
                    "COLUMNS": "200",
                    "FORCE_COLOR": "1",
                },
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=hear_signals,
            )
        run = Run(process, mark, logs, folder, topology)
        self.runs.append(run)
        return run

    def end(self) -> None:
        """Kill what is left of all runs."""
        for run in self.runs:
            for pid in run.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.process.wait()


def hear_signals() -> None:
    """A shell script's background jobs ignore Ctrl-C; these runs do not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Run:
    """A command that was started, with its `logs` and its `output` folder."""

    process: subprocess.Popen[bytes]
    mark: str
    logs: Path
    output: Path
    topology: str
    started: float = field(default_factory=time.monotonic)

    def pids(self) -> list[int]:
        """The processes of the run that have not ended: they have its mark in their environment."""
        return [pid for pid, words in processes() if f"{MARK}={self.mark}".encode() in words]

    def ranks(self) -> list[int]:
        """The processes of its ranks: children of the fork server, or of torchrun."""
        if self.topology == "one process":
            return [self.process.pid]
        parents = [self.process.pid] if self.topology == "torchrun" else self.servers()
        return [child for parent in parents for child in children(parent)]

    def servers(self) -> list[int]:
        """The process that ranks are forked from."""
        found = []
        for pid in children(self.process.pid):
            with suppress(OSError):
                if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def wait_until(self, moment: str, delay: float) -> bool:
        """Wait for `moment`, then `delay` seconds. Return whether the run is still alive after that."""
        happens = MOMENTS[moment]
        end = time.monotonic() + HANGS_SECONDS
        while self.process.poll() is None and not happens(self) and time.monotonic() < end:
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(delay)
        return self.process.poll() is None

    def ends(self, within: float) -> bool:
        """Whether the command ends in so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(within)
        return self.process.poll() is not None

    def said(self) -> str:
        """All that it, or under torchrun its ranks, wrote."""
        files = [*self.logs.rglob("*.log")] if self.topology == "torchrun" else []
        return "\n".join(
            file.read_text(errors="replace") for file in [*files, self.logs / "err"] if file.is_file()
        )

    def ours(self) -> str:
        """The part of the output that our own code wrote."""
        if self.topology != "torchrun":
            return (self.logs / "err").read_text(errors="replace")
        return "\n".join(file.read_text(errors="replace") for file in self.logs.rglob("*.log"))


def processes() -> Iterator[tuple[int, bytes]]:
    """All processes that have not ended, with their environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), (entry / "environ").read_bytes()


def children(parent: int) -> list[int]:
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def writes(run: Run, pattern: str) -> bool:
    return any(run.output.glob(pattern))


# When a fault comes.
MOMENTS: dict[str, Callable[[Run], bool]] = {
    "at its start": lambda run: time.monotonic() - run.started > 0.15,
    "while it imports": lambda run: time.monotonic() - run.started > 0.5,
    "with its folder": lambda run: run.output.is_dir(),
    "with its ranks": lambda run: run.output.is_dir() if run.topology == "one process" else len(run.ranks()) >= 2,
    "in its work": lambda run: "denoising steps" in run.said(),
    "with a file begun": lambda run: writes(run, "video.mp4.*"),
    "with its video": lambda run: writes(run, "video.mp4"),
    "at its end": lambda run: writes(run, "metrics.json"),
    "after its ranks": lambda run: writes(run, "metrics.json") and not run.ranks(),
}


def clip_for(moment: str) -> Sequence[str]:
    """The overrides of a run that is hit at `moment`."""
    return SMALL if moment in ("with a file begun", "with its video", "at its end", "after its ranks") else LONG


def wrongs(place: Place, run: Run, codes: Sequence[int]) -> list[str]:
    """The faults in how `run` has ended."""
    found = []
    code = run.process.poll()
    if code is None:
        found.append("hangs")
    elif code not in codes:
        found.append(f"exit code {code} and not {' or '.join(map(str, codes))}")
    end = time.monotonic() + (0 if code is None else GONE_SECONDS)
    while (left := run.pids()) and time.monotonic() < end:
        time.sleep(0.05)
    if left and code is not None:
        found.append(f"{len(left)} processes stay")
    # Until the import of `stopping` is done, a traceback is that of an interpreter that was still starting.
    said = re.sub(r"Traceback \(most.*\n.*launch\.py.*\n +from cosmos3_pipeline import stopping\n", "", run.ours())
    if re.search(r"Traceback \(most recent call last\)[\s\S]*cosmos3_pipeline/", said):
        found.append("traceback")
    found += [f"said: {line[-160:]}" for line in run.ours().splitlines() if "leaked" in line]
    found += [f"half a file: {words}" for words in half_files(run.output)]
    # PyTorch makes the folder of its compiler's cache in every process that imports it, and keeps it.
    files = {file.name for file in place.temporary.glob("*") if not file.name.startswith("torchinductor_")}
    if files:
        found.append(f"left in TMPDIR: {', '.join(sorted(files))}")
    return found


def half_files(output: Path) -> Iterator[str]:
    """The files of a run that do not open, or are not named as whole."""
    for file in output.rglob("*") if output.is_dir() else ():
        if ".partial" in file.name:
            yield file.name
        elif file.name == "video.mp4" and file.is_file():
            try:
                with av.open(str(file)) as container:
                    frames = sum(1 for _ in container.decode(video=0))
                if frames != FRAMES:
                    yield f"{file.name} of {frames} frames"
            except av.error.FFmpegError as error:
                yield f"{file.name}: {error}"
        elif file.suffix == ".json" and file.is_file():
            try:
                json.loads(file.read_text())
            except ValueError as error:
                yield f"{file.name}: {error}"


def of(kind: str, what: str, place: Place, run: Run, wrong: list[str], since: float) -> Found:
    said = portable(run.ours(), place.folder).strip().splitlines()
    return Found(
        kind, what, run.process.poll(), round(time.monotonic() - since, 1), wrong, "\n".join(said[-6:])[-800:]
    )


def portable(text: str, folder: Path) -> str:
    """`text` without the paths of this machine, because the results are kept in the repository."""
    return (
        text.replace(str(folder), "PLACE")
        .replace(sys.base_prefix, "PYTHON")
        .replace(str(REPOSITORY), "REPOSITORY")
    )


def done(run: Run) -> bool:
    return run.process.poll() == 0


@kind
def signal_to_the_launcher(rng: random.Random, place: Place) -> Found:
    """Ctrl-C, `kill`, a terminal that closes: one line, the signal's exit code, nothing left."""
    topology, moment = rng.choice(TOPOLOGIES), rng.choice(list(MOMENTS))
    number, all_of_them = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)), rng.random() < 0.4
    run = place.start(topology, *clip_for(moment))
    there = run.wait_until(moment, rng.uniform(0, 0.4))
    since = time.monotonic()
    with suppress(ProcessLookupError):
        os.killpg(run.process.pid, number) if all_of_them else os.kill(run.process.pid, number)
    run.ends(GONE_SECONDS)
    # torchrun's agent has an exit code of its own, and Python's start one without handlers.
    codes = [128 + number, 0] + ([1, -number] if topology == "torchrun" or moment == "at its start" else [])
    wrong = wrongs(place, run, codes)
    if moment == "at its start":
        wrong = [word for word in wrong if word != "traceback"]  # of Python itself
    lines = [line for line in run.ours().splitlines() if line.startswith("stopped by")]
    if there and not done(run) and topology != "torchrun" and moment != "at its start" and len(lines) != 1:
        wrong.append(f"{len(lines)} lines say that it was stopped")
    whom = "all" if all_of_them else "the launcher"
    return of("signal to the launcher", f"{number.name} to {whom}, {topology}, {moment}", place, run, wrong, since)


@kind
def launcher_killed(rng: random.Random, place: Place) -> Found:
    """The memory killer or a scheduler: nothing stays, because another process removes it."""
    topology, moment = rng.choice(TOPOLOGIES), rng.choice(list(MOMENTS))
    run = place.start(topology, *clip_for(moment))
    run.wait_until(moment, rng.uniform(0, 0.4))
    since = time.monotonic()
    run.process.kill()
    run.process.wait()
    wrong = wrongs(place, run, [-signal.SIGKILL, 0])
    return of("launcher killed", f"{topology}, {moment}", place, run, wrong, since)


@kind
def signal_to_a_rank(rng: random.Random, place: Place) -> Found:
    """The run ends and names it, or has ended well before."""
    topology, rank = rng.choice(TOPOLOGIES[1:]), rng.choice((0, 1))
    moment = rng.choice(list(MOMENTS)[3:])
    number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGSEGV))
    run = place.start(topology, *clip_for(moment))
    run.wait_until(moment, rng.uniform(0, 0.4))
    since = time.monotonic()
    ranks = run.ranks()
    if rank < len(ranks):
        with suppress(ProcessLookupError):
            os.kill(ranks[rank], number)
    ended = run.ends(40 if topology == "torchrun" else GONE_SECONDS)
    wrong = wrongs(place, run, [0, 1])
    if ended and topology == "2 ranks" and not done(run) and not re.search(r"rank \d of 2 failed", run.ours()):
        wrong.append("no rank is named")
    return of("signal to a rank", f"{number.name} to rank {rank}, {topology}, {moment}", place, run, wrong, since)


@kind
def rank_stopped(rng: random.Random, place: Place) -> Found:
    """A rank that never goes on is named after the time that the run was given."""
    topology, rank, moment = rng.choice(TOPOLOGIES[1:]), rng.choice((0, 1)), rng.choice(list(MOMENTS)[3:5])
    run = place.start(topology, *LONG, "topology.patience_seconds=4")
    there = run.wait_until(moment, rng.uniform(0, 0.4))
    since = time.monotonic()
    ranks = run.ranks()
    if rank < len(ranks):
        with suppress(ProcessLookupError):
            os.kill(ranks[rank], signal.SIGSTOP)
    run.ends(HANGS_SECONDS)  # the other rank has to come first, and torchrun waits 30 s for a stopped one
    wrong = wrongs(place, run, [1] if there else [0])
    if there and not re.search(r"rank \d of 2 (gives no sign of life|has not come)", run.ours()):
        wrong.append("no rank is named")
    return of("rank stopped", f"rank {rank}, {topology}, {moment}", place, run, wrong, since)


@kind
def fork_server_killed(rng: random.Random, place: Place) -> Found:
    """The process that ranks are forked from is gone: the run ends, or needed it no more."""
    moment = rng.choice(list(MOMENTS)[3:])
    run = place.start("2 ranks", *clip_for(moment))
    run.wait_until(moment, rng.uniform(0, 0.4))
    since = time.monotonic()
    for server in run.servers():
        os.kill(server, signal.SIGKILL)
    run.ends(GONE_SECONDS)
    return of("fork server killed", moment, place, run, wrongs(place, run, [0, 1]), since)


@kind
def two_runs_in_a_folder(rng: random.Random, place: Place) -> Found:
    """One runs, the other is refused."""
    topologies = [rng.choice(TOPOLOGIES[:2]) for _ in range(2)]
    since = time.monotonic()
    first = place.start(topologies[0], *SMALL)
    time.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 4))))
    second = place.start(topologies[1], *SMALL, "sampler.seed=7")
    ended = [run.ends(HANGS_SECONDS) for run in (first, second)]
    codes = sorted(run.process.poll() or 0 for run in (first, second)) if all(ended) else []
    wrong = wrongs(place, first, [0, 2]) + wrongs(place, second, [0, 2])
    if codes not in ([0, 2], [0, 0]):  # one after the other, where the first was done by then
        wrong.append(f"exit codes {codes}")
    if codes == [0, 2] and not any("another run is writing" in run.ours() for run in (first, second)):
        wrong.append("the refusal does not say why")
    if not (first.output / "video.mp4").is_file():
        wrong.append("no video")
    return of("two runs in a folder", " and ".join(topologies), place, second, wrong, since)


@kind
def run_in_an_old_folder(rng: random.Random, place: Place) -> Found:
    """A run that is broken off in the folder of an older run leaves no files of the older run beside its own."""
    topology = rng.choice(TOPOLOGIES)
    place.start(rng.choice(TOPOLOGIES[:2]), *SMALL).ends(HANGS_SECONDS)
    since = time.monotonic()
    again = place.start(topology, *STILL)
    number = rng.choice((None, signal.SIGTERM, signal.SIGKILL))
    if number is None:
        again.ends(HANGS_SECONDS)
    else:
        again.wait_until("in its work", rng.uniform(0, 0.5))
        again.process.send_signal(number)
        again.ends(40 if topology == "torchrun" else GONE_SECONDS)
    codes = [0] if number is None else [0, 1, -number, 128 + number]
    wrong = wrongs(place, again, codes)
    if number is None and (again.output / "video.mp4").exists():
        wrong.append("the older video is beside the picture")
    names = [again.output / name for name in ("config.yaml", "metrics.json")]
    if all(name.is_file() for name in names):
        same = ("name: t2i" in names[0].read_text()) == (json.loads(names[1].read_text())["task"] == "t2i")
        if not same:
            wrong.append("the older metrics are beside the new config")
    what = "done" if number is None else number.name
    return of("run in an old folder", f"{topology}, {what}", place, again, wrong, since)


@kind
def something_in_the_way(rng: random.Random, place: Place) -> Found:
    """A folder where a file goes is refused before work; a link is replaced, not followed."""
    name = rng.choice(("video.mp4", "metrics.json", "config.yaml", "plan.json", "log.txt", ".hydra"))
    how = rng.choice(("folder", "link"))
    output = place.folder / "run"
    output.mkdir()
    aim = place.folder / "precious"
    aim.write_text("precious")
    if name == ".hydra":
        (output / name).write_text("a file")
    elif how == "folder":
        (output / name).mkdir()
    else:
        (output / name).symlink_to(aim)
    since = time.monotonic()
    run = place.start(rng.choice(TOPOLOGIES), *SMALL)
    run.ends(HANGS_SECONDS)
    followed = how == "link" and name != ".hydra"
    codes = [0] if followed else [1, 2] if run.topology == "torchrun" else [2]
    wrong = [word for word in wrongs(place, run, codes) if "half a file" not in word]
    if aim.read_text() != "precious":
        wrong.append("the link was followed")
    if not followed and "works:" not in run.ours():
        wrong.append("no words")
    return of("something in the way", f"{name}: {how}, {run.topology}", place, run, wrong, since)


def campaign(seed: int, count: int, kinds: Sequence[str] = (), *, tell: Callable[[Found], None]) -> None:
    """`count` cases, the kinds in turn; the same ones for the same `seed`."""
    names = list(kinds or KINDS)
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        folder = Path(tempfile.mkdtemp(prefix="cosmos3_fault_"))
        place = Place(folder)
        try:
            tell(KINDS[names[number % len(names)]](rng, place))
        finally:
            place.end()
            shutil.rmtree(folder, ignore_errors=True)


def table(found: Sequence[Found]) -> str:
    """The numbers of cases and faults, by kind, as a table in Markdown."""
    rows = [
        "| fault | cases | hang | processes stay | traceback | half a file | other |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(each.kind for each in found):
        cases = [each for each in found if each.kind == name]
        counts = Counter(column(word) for each in cases for word in each.wrong)
        cells = [counts[key] for key in ("hang", "stay", "traceback", "half", "other")]
        rows.append(f"| {name} | {len(cases)} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def column(wrong: str) -> str:
    for key in ("hang", "stay", "traceback", "half"):
        if key in wrong:
            return key
    return "other"


def report(found: Sequence[Found], given: argparse.Namespace) -> None:
    """Write what was found so far: all of it to a file, and the table into a page."""
    content = {"seed": given.seed, "load": os.getloadavg()[0], "cases": [asdict(each) for each in found]}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2))
    if given.page is not None:
        command = f"`python tests/faults.py --seed {given.seed} --count {given.count}`"
        made = f"<!-- faults -->\n{len(found)} cases of {command}:\n\n{table(found)}\n<!-- end of faults -->"
        text = given.page.read_text()
        given.page.write_text(re.sub("<!-- faults -->.*<!-- end of faults -->", lambda _: made, text, flags=re.S))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "faults.json")
    parser.add_argument("--page", type=Path, help="a Markdown file whose table is written anew")
    given = parser.parse_args()

    found: list[Found] = []

    def tell(each: Found) -> None:
        found.append(each)
        ending = "; ".join(each.wrong) or "well"
        print(f"{each.kind}: {each.what}: {each.code} in {each.seconds} s: {ending}", flush=True)
        if each.wrong:
            print(f"    {each.said}", flush=True)
        report(found, given)

    campaign(given.seed, given.count, given.kinds, tell=tell)
    print(table(found))
    return int(any(each.wrong for each in found))


if __name__ == "__main__":
    sys.exit(main())
