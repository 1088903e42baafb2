"""`kite-films`, or `python -m kite_films.make`: everything that `launch.py` does, with this project's configs."""

import hydra
from omegaconf import DictConfig

from cosmos3_pipeline.cli import launch, run


@hydra.main(version_base="1.3", config_path="conf", config_name="kite_films")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """One film. What stands here beside `run` is this project's own."""
    print(f"film {cfg.extras.film}")
    return run(cfg)


def command() -> None:
    """What the console script calls."""
    launch(main)


if __name__ == "__main__":
    command()
