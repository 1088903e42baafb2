"""Run Cosmos3 from a composed config: `python launch.py [group=option ...] [key=value ...]`."""

from cosmos3_pipeline import stopping

if __name__ == "__main__":
    stopping.on_signals()  # before the imports, which take a while

import hydra
from omegaconf import DictConfig

from cosmos3_pipeline.cli import launch, run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    return run(cfg)


if __name__ == "__main__":
    launch(main)
