"""Run Cosmos3 from a composed config: `python launch.py [group=option ...] [key=value ...]`."""

from cosmos3_pipeline import commands, stopping

if __name__ == "__main__":
    # before the imports, which take a while, or fail
    stopping.on_signals()
    commands.check_environment()

import hydra
from omegaconf import DictConfig

from cosmos3_pipeline.cli import launch, run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    return run(cfg)


if __name__ == "__main__":
    launch(main)
