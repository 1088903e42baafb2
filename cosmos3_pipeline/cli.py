"""The entry point from a shell, shared by `launch.py` and the `cosmos3` command. Imports no torch."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, chdir, redirect_stdout, suppress
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cosmos3_pipeline import __version__, jobs, stopping
from cosmos3_pipeline.commands import COMMANDS, set_up_terminal
from cosmos3_pipeline.config import config_dir, running
from cosmos3_pipeline.config.checks import problems
from cosmos3_pipeline.config.completion import cleaned
from cosmos3_pipeline.config.compose import (
    VERSION_BASE,
    Composition,
    as_config_error,
    compose,
)
from cosmos3_pipeline.config.help import help_text
from cosmos3_pipeline.config.mistakes import USUAL_FPS, Reading, in_a_shell, read
from cosmos3_pipeline.config.overrides import asks_for_sweep, check_no_sweep, check_overrides, mistaken
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.schema import JobName
from cosmos3_pipeline.config.source import BUILTIN, Source
from cosmos3_pipeline.config.sweep import compositions_of
from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.distributed.machine import machine_problem, output_problems, told_as_fault
from cosmos3_pipeline.distributed.world import NO_WORLD, world_problems
from cosmos3_pipeline.errors import REFUSED, ConfigError, Fault, Problem, Refusal, nearest
from cosmos3_pipeline.jobs import sweep
from cosmos3_pipeline.jobs.folder import claimed, clear
from cosmos3_pipeline.jobs.log import kept
from cosmos3_pipeline.jobs.prompts import PromptsFailed
from cosmos3_pipeline.jobs.start import Prepared, prepare
from cosmos3_pipeline.jobs.sweep import table
from cosmos3_pipeline.jobs.sweep.outcome import OUTCOMES
from cosmos3_pipeline.planning.checks import check_composition

__all__ = ["launch", "main", "run"]

FAILED = 1
# Flags of Hydra that take the next argument as their value. `INFOS` are the values that may follow --info.
FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
}
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


# How often an OpenMP thread checks whether the others are ready before it sleeps; read when torch is imported.
# GNU's default spins longer than a time slice. When another program used a core, two threads waited for each
# other, and one second of the toy's work took 54 s. With this value it takes 6 s. Nothing changes on an idle
# machine.
SPIN = ("GOMP_SPINCOUNT", "10000")


def main() -> None:
    """A run by `cosmos3`: `launch.py` with the installed configs, runnable from any directory."""
    first = next(iter(sys.argv[1:]), "")
    if re.fullmatch(r"[\w-]+", first) and (command := nearest(first, COMMANDS)):
        typed = f"cosmos3 {first}"
        sys.exit(_refused(ConfigError([Problem(typed, "there is no such command", f"cosmos3 {command}")])))
    launch(hydra.main(version_base=VERSION_BASE, config_path=str(config_dir()), config_name="config")(run))


def launch(hydra_main: Callable[[], None]) -> None:
    """Run a `@hydra.main` function with errors that a person can act on, alone or as one rank of torchrun.

    Exit codes: 2 if the composition is refused, 1 if a run or a job of a sweep failed, 128 plus the signal number
    if a signal ended it.
    """
    stopping.on_signals()
    if code := stopping.stoppable(partial(_code_of, hydra_main)):
        sys.exit(code)


def _code_of(hydra_main: Callable[[], None]) -> int:
    """The exit code of `launch`. Prints the errors."""
    words = sys.argv[1:]
    if "--version" in words:  # Hydra's parser would print the version of Hydra
        stopping.stdout_needed()
        print(f"cosmos3_pipeline {__version__}")
        return 0
    try:
        sys.argv[1:] = overrides_first(words)
        args = _arguments(words)
    except ConfigError as error:
        return _refused(error, words)
    if args.help or args.hydra_help or args.info or args.cfg or args.shell_completion:
        stopping.stdout_needed()
    plugins = register()
    set_up_terminal()
    os.environ.setdefault(*SPIN)
    if args.help:
        print(help_text(_command_name(), plugins, Source.of(hydra_main, args) or BUILTIN))
        return 0
    # Hydra prints its own errors and exits unless asked for the full error; then it raises, and we explain.
    asked_for_traceback = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    code = 0
    source = Source.of(hydra_main, args)
    if source is not None and source.groups() != BUILTIN.groups():  # words are read with the built-in options
        words = []
    try:
        _launch(hydra_main, args, source)
    except ConfigError as error:
        code = FAILED if sweep.was_told(error) else _refused(error, words)
    except Fault as fault:
        code = _stopped(fault)
    except Refusal as refusal:
        code = FAILED if sweep.was_told(refusal) else _refused(ConfigError([refusal.problem]), words)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if asked_for_traceback:
            raise
        code = _refused(as_config_error(error, args.overrides, source or BUILTIN), words)
    except ValueError as error:
        if not str(error).startswith("Only one of --run"):  # Hydra's own check of its flags
            raise
        code = _refused(ConfigError([Problem(str(error), "each does something else", "one of them")]))
    except (RankFailed, PromptsFailed) as error:
        if not sweep.was_told(error):
            print(error, file=sys.stderr)
        code = FAILED
    except sweep.NotStarted:
        code = REFUSED
    except (OSError, MemoryError) as error:  # raised outside the job; the job itself raises a Fault
        problem = machine_problem(error)
        if asked_for_traceback or problem is None:
            raise
        print(f"the run has stopped\n\n{problem}", file=sys.stderr)
        code = FAILED
    except Exception as error:
        # A rank under torchrun: another rank has ended. The error's class is in a module that imports torch.
        if isinstance(getattr(error, "problem", None), Problem):
            code = _stopped(error)
        # Hydra's sweeper ends by raising the error of the first failed job, which was printed before.
        elif asked_for_traceback or not sweep.was_told(error):
            raise
        code = FAILED
    finally:
        failed = sweep.current is not None and _report(sweep.current)
    return code or (FAILED if failed else 0)


def _stopped(error: Exception) -> int:
    """Print the error that ended a run, unless a sweep has printed it. Returns the exit code."""
    if not sweep.was_told(error):
        print(f"the run has stopped\n\n{error}", file=sys.stderr)
    return FAILED


def run(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Do the job that Hydra runs, in Hydra's output directory.

    Returns the numbers that `objective` names, for a sweeper.
    """
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    if multirun and cfg.sweep.resume is not None:
        folder = Path(hydra_config.runtime.cwd) / cfg.sweep.resume
        if (done := sweep.done_before(folder, hydra_config.job.num, hydra_config.overrides.task)) is not None:
            return cast(float | tuple[float, ...] | None, done.objective)
    output = running.output_directory()
    # hydra.job.chdir has moved this process to `output`, but relative paths are meant for the first folder.
    with told_as_fault(str(output)), chdir(_where_started()), claimed(output):
        clear(output)
        with kept(output):
            composition, prepared = _prepared(cfg)
            result = jobs.run(prepared, output, multirun=multirun)
    if prepared.config.output.report and prepared.config.job.name == JobName.generate:
        page(lambda: import_module("cosmos3_pipeline.report").run_page(output, composition.overrides or ()))
    return result


# The job that `launch` composed and prepared before Hydra made its folder.
_ahead: tuple[Composition, Prepared] | None = None


def _prepared(cfg: DictConfig) -> tuple[Composition, Prepared]:
    """The job of `cfg`: the one that was prepared ahead, unless the program has changed `cfg` since."""
    global _ahead
    ahead, _ahead = _ahead, None
    if ahead is not None and cfg == OmegaConf.masked_copy(ahead[0].cfg, list(cfg)):
        return ahead
    composition = Composition.of_a_running_job(cfg)
    return composition, prepare(composition)


def _where_started() -> Path:
    """The folder for relative paths: where the command started, or the launcher's if that does not exist here."""
    started = Path(HydraConfig.get().runtime.cwd)
    return started if started.is_dir() else Path.cwd()


def _launch(hydra_main: Callable[[], None], args: Namespace, source: Source | None) -> None:
    global _ahead
    if broken := [*world_problems(os.environ)]:
        raise ConfigError(broken)
    rank = os.environ.get("RANK")
    if rank is not None and args.multirun:
        raise ConfigError(
            [
                Problem(
                    what="-m under torchrun",
                    why="a sweep starts the ranks of each job anew, but torchrun has started them already",
                    works=f"torchrun without -m, or python launch.py -m ... without torchrun; {NO_WORLD}",
                )
            ]
        )
    if rank not in (None, "0"):
        # Only rank 0 may make an output directory, so the other ranks compose without Hydra's run.
        with told_as_fault("the folder of the run"):
            jobs.follow(prepare(compose(args.overrides, source or BUILTIN)))
        return
    folders_exist(args)
    _no_repeat(args.overrides)
    if args.multirun or asks_for_sweep(args.overrides):
        _repeat(args)
    if args.resolve and args.cfg is None:
        what = "--resolve without --cfg"
        raise ConfigError([Problem(what, "it says how --cfg prints a config", "--cfg job --resolve")])
    if resumed := [o.partition("=")[2] for o in args.overrides if o.startswith(f"{table.RESUME}=")]:
        sys.argv.insert(1, f"hydra.sweep.dir={resumed[-1]}")  # the folder for the files of Hydra and of the jobs
    sweeps = args.multirun or asks_for_sweep(args.overrides)
    if args.shell_completion and any(override.startswith("query=") for override in args.overrides):
        if "COMP_LINE" not in os.environ:
            what, why = (
                " ".join(["-sc", *args.overrides]),
                "a shell asks so while it completes, with COMP_LINE set",
            )
            raise ConfigError([Problem(what, why, "cosmos3 completion bash, whose script does it; or zsh, fish")])
        with redirect_stdout(StringIO()) as choices:
            hydra_main()
        print(cleaned(choices.getvalue()))
        return
    if args.hydra_help or args.info or args.shell_completion or args.experimental_rerun or source is None:
        hydra_main()
        return
    check_overrides(args.overrides, source.groups(), sweep=sweeps)
    if sweeps:
        hydra_main()
        return
    composition = compose(args.overrides, source)
    if composition.is_sweep:
        hydra_main()
    elif args.cfg is not None:
        check_composition(composition)
        running.show(composition, args.cfg, args.package, resolve=args.resolve)
    else:
        check_no_sweep(args.overrides)
        folder = Path(OmegaConf.select(composition.cfg, "hydra.run.dir"))
        if found := [*output_problems(folder, "hydra.run.dir")]:
            raise ConfigError(found)
        _ahead = composition, prepare(composition)  # before Hydra makes an output directory
        with claimed(Path(composition.cfg.hydra.run.dir)):  # before Hydra writes into it
            running.run(composition, getattr(hydra_main, "__wrapped__"))  # noqa: B009 - untyped


def _no_repeat(overrides: Sequence[str]) -> None:
    """Refuse the number of a repeat, which a sweep gives to its jobs. Raises ConfigError."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == table.REPEAT:
            why = "it counts the runs of a job from 0, and the sweep sets it"
            works = f"-m {table.REPEATS}={value if value.isdecimal() else 5}"
            raise ConfigError([Problem(what=override, why=why, works=works)])


def _repeat(args: Namespace) -> None:
    """Sweep over the repeats of `sweep.repeats` outermost, so that every job runs once before any runs again."""
    counts = [o.partition("=")[2] for o in args.overrides if o.startswith(f"{table.REPEATS}=")]
    if counts and counts[-1].isdecimal() and int(counts[-1]) > 1:
        turns = f"{table.REPEAT}={','.join(map(str, range(int(counts[-1]))))}"
        sys.argv.insert(1, turns)
        args.overrides.insert(0, turns)


def folders_exist(args: Namespace) -> None:
    """Refuse config folders that do not exist, because Hydra's error would not name the folder."""
    found = [
        Problem(
            what=f"--{name.replace('_', '-')} {folder}",
            why=f"{place / folder} is no folder",
            works="the path of a folder with YAML files",
        )
        # Hydra resolves --config-path from the script's folder, and --config-dir from the current folder.
        for name, place in (("config_path", Path(sys.argv[0]).absolute().parent), ("config_dir", Path.cwd()))
        if (folder := getattr(args, name)) is not None and "://" not in folder and not (place / folder).is_dir()
    ]
    if found:
        raise ConfigError(found)


def _flags() -> dict[str, bool]:
    """Hydra's flags, each with whether a value follows it."""
    return {flag: flag in FLAGS_WITH_VALUE for flag in get_args_parser()._option_string_actions}


def _arguments(words: Sequence[str]) -> Namespace:
    """The flags and overrides of the arguments `words`. Raises ConfigError for a flag that Hydra lacks."""

    def refuse(message: str) -> NoReturn:
        why = "Hydra has no such flag, or the flag takes another value"
        works = "key=value or group=option; see --help"
        if match := re.match(r"argument (--[\w-]+)", message):
            choices = re.search(r"choose from '?(\w+)", message)
            works = f"{match[1]} {choices[1] if choices else 'VALUE'}"
        elif flags := re.findall(r"--[\w-]+", message.partition("could match")[2]):
            works = " or ".join(flags)
        raise ConfigError([Problem(what=message, why=why, works=works)])

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    dashed = [each for each in _read(words) if each.why and each.typed[0][0] in "-\u2013\u2014"]
    if dashed:
        raise ConfigError([mistaken(each) for each in dashed])
    return parser.parse_args()


def _read(arguments: Sequence[str], fps: float = USUAL_FPS) -> list[Reading]:
    """The meaning of the words of a command line. With `fps` a duration becomes a number of frames."""
    sweep = any(word in ("-m", "--multirun") for word in arguments) or asks_for_sweep(arguments)
    return read(arguments, BUILTIN.groups(), flags=_flags(), sweep=sweep, fps=fps)


def _corrected(words: Sequence[str], works: Sequence[str] = ()) -> str | None:
    """The command to type instead of one with the arguments `words`, if it is known and can be composed.

    `works` tells what would work for each problem. Where the words mean what they say, it changes their keys.
    """
    readings = _read(words)
    meant = [argument for each in readings for argument in each.means or ()]
    if any(each.means is None for each in readings):
        return None
    if meant == list(words):
        found = [re.fullmatch(r"(?:did you mean )?'?(\+?([\w./]+)=[^\s,?']+)'?\??", each) for each in works]
        instead = {match[2]: match[1] for match in found if match}
        words = [instead.get(word.lstrip("+").partition("=")[0], word) for word in words]
        if len(instead) < len(works) or meant == words:
            return None
        meant = list(words)
    if "-m" not in meant and "--multirun" not in meant:
        try:
            composed = compose([each for each in meant if not each.startswith("-") and "=" in each])
            if [*problems(composed)]:
                return None
        except ConfigError:
            return None
        meant = [a for each in _read(words, composed.typed().task.fps) for a in each.means or ()]
    return " ".join([_command_name(), *map(in_a_shell, meant)])


def _command_name() -> str:
    """How this program was called."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return "python -m cosmos3_pipeline"
    return f"python {script.name}" if script.suffix == ".py" else script.name


def overrides_first(arguments: list[str]) -> list[str]:
    """The same arguments with the flags last, because argparse wants all overrides in one place.

    So `hydra/launcher=joblib -m sampler.steps=1,2` works.
    """
    overrides, flags, takes_value = list[str](), list[str](), False
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            flags.append(argument)
            takes_value = argument in FLAGS_WITH_VALUE
        elif takes_value or (flags and flags[-1] in ("--info", "-i") and argument in INFOS):
            flags.append(argument)
            takes_value = False
        else:
            overrides.append(argument)
    return [*overrides, *flags]


# Context managers of a sweep, held until this process ends.
_sweeps = ExitStack()


class SweepReport(Callback):
    """A Hydra callback (see conf/config.yaml) that reports the progress of a sweep, and failed jobs at once."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plan all jobs before the first starts, if Hydra's own sweeper runs; others choose jobs as they go."""
        resume, basic = config.sweep.resume is not None, config.hydra.sweeper._target_.endswith(".BasicSweeper")
        if "optuna" in config.hydra.sweeper._target_:
            let_a_grid_end_with_a_refusal()
        folder = _sweep_folder(config)
        if config.sweep.repeats > 1 and not basic:
            raise sweep.not_started("another sweeper than Hydra's own chooses jobs as it goes, and repeats none")
        if resume and not basic:
            raise sweep.not_started(
                "another sweeper than Hydra's own chooses jobs as it goes: it has to resume itself"
            )
        if resume and not (folder / OUTCOMES).is_dir():
            raise sweep.not_started(f"{table.RESUME}={config.sweep.resume}, but there is no sweep in {folder}")
        try:
            _sweeps.enter_context(claimed(folder))
        except ConfigError as error:
            raise sweep.not_started(str(error)) from error
        started = sweep.start(folder, baseline=config.sweep.baseline, resume=resume)
        if basic:
            with suppress(ConfigError):  # Hydra's sweeper will raise the same error
                started.look_ahead(compositions_of(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record the job, in the process that ran it. A launcher may have started that process elsewhere."""
        if config.hydra.mode == RunMode.MULTIRUN:
            sweep.record(
                _sweep_folder(config),
                config.hydra.job.num,
                config.hydra.overrides.task,
                Path(config.hydra.runtime.output_dir),
                JobName(config.job.name).value,
                job_return._return_value,
            )


def let_a_grid_end_with_a_refusal() -> None:
    """Suppress the error when Optuna's grid sampler stops its study after the last trial.

    The stop is an error because Hydra drives the study. hydra-optuna-sweeper 1.3.0 ignores the error after a
    finished trial. After a failed trial it ends with a traceback and without a result. The sweeper counts the
    trials itself, so the study need not be stopped.
    """
    grid = import_module("optuna.samplers").GridSampler
    stops = grid.after_trial

    def after_trial(*args: Any, **kwargs: Any) -> None:
        with suppress(RuntimeError):
            stops(*args, **kwargs)

    grid.after_trial = after_trial


def _sweep_folder(config: DictConfig) -> Path:
    """The folder of the sweep, as an absolute path, because a job may have changed the current folder."""
    return Path(config.hydra.runtime.cwd) / str(config.sweep.resume or config.hydra.sweep.dir)


def _report(ended: sweep.Sweep) -> bool:
    """Write the table and the page of a sweep. Returns whether a job that must be done is not done."""
    failed = ended.report()
    if (ended.folder / sweep.INDEX).is_file():
        page(lambda: import_module("cosmos3_pipeline.report").sweep_page(ended.folder))
    return failed


def page(write: Callable[[], Path]) -> None:
    """Write a page and print its path. An error is printed only, because the work that the page shows is done."""
    try:
        print(f"{write()}")
    except Exception as error:
        print(f"the page could not be written: {type(error).__name__}: {error}", file=sys.stderr)


def _refused(error: ConfigError, words: Sequence[str] = ()) -> int:
    rank = os.environ.get("RANK", "0")
    # Only under torchrun a rank 0 surely exists and prints the problems.
    if rank != "0" and "TORCHELASTIC_RUN_ID" in os.environ and not [*world_problems(os.environ)]:
        print(f"rank {rank}: refused, as rank 0 says", file=sys.stderr)
        return REFUSED
    count = len(error.problems)
    print(f"refused: {count} problem{'s' * (count > 1)} in the configuration\n", file=sys.stderr)
    print(error, file=sys.stderr)
    if command := _corrected(words, [problem.works for problem in error.problems]):
        print(f"\nto copy: {command}", file=sys.stderr)
    return REFUSED
