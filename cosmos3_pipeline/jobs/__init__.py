"""What a composition is run for. Importing a job imports no torch; its ranks do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cosmos3_pipeline.checkpoint.adopt import Adopted
from cosmos3_pipeline.config.schema import JobName
from cosmos3_pipeline.jobs import bench, generate, plan, verify
from cosmos3_pipeline.jobs.start import check_start
from cosmos3_pipeline.plan.checks import check


def run(cfg: DictConfig) -> None:
    """Check `cfg`, then do its job in Hydra's output directory. Called by `@hydra.main`.

    Raises ConfigError before any work starts, RankFailed when a rank of the run failed, VerifyFailed (exit code 1)
    when a strategy is not as exact as it declares.
    """
    hydra_cfg = HydraConfig.get()
    adopted = check(cfg, hydra_cfg.overrides.task)
    if adopted is not None:
        tell(adopted, cfg)
    check_job(cfg)
    output = Path(hydra_cfg.runtime.output_dir)
    if cfg.job.name == JobName.plan:
        plan.plan_job(cfg, output)
        return
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    if cfg.job.name == JobName.verify:
        verify.verify(cfg, output, multirun=multirun)
        return
    if cfg.job.name == JobName.bench:
        bench.bench(cfg, output, multirun=multirun)
        return
    plan.head(cfg, output)
    generate.generate(cfg, output, own_process=multirun)


def tell(adopted: Adopted, cfg: DictConfig) -> None:
    """Print where the checkpoint differs from its model option, and what of it nothing here knows."""
    folder = adopted.checkpoint.folder
    if adopted.changed:
        print(
            f"{folder} has other numbers than model={cfg.model.name}, and they are used: {_few(adopted.changed)}"
        )
    if adopted.checkpoint.strangers:
        print(
            f"{folder} has settings that nothing here knows; they are not read: "
            f"{', '.join(adopted.checkpoint.strangers)}"
        )


def _few(changed: Sequence[str]) -> str:
    more = len(changed) - 4
    return "; ".join(changed[:4]) + (f"; and {more} more, see config.yaml" if more > 0 else "")


def check_job(cfg: DictConfig) -> None:
    """Raise ConfigError with everything that keeps the checked `cfg` from being run here and now."""
    check_start(cfg)
    verify.check_verify(cfg)
    bench.check_bench(cfg)


def follow(cfg: DictConfig) -> None:
    """Take part in the job of a checked `cfg` as a rank that is not the root: nothing is written here."""
    check_job(cfg)
    if cfg.job.name == JobName.verify:
        verify.join(cfg)
        return
    if cfg.job.name == JobName.bench:
        bench.join(cfg)
        return
    generate.join(cfg)
