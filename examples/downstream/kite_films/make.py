"""`kite-films`, or `python -m kite_films.make`: everything that `launch.py` does, with this project's configs."""

import hydra
from omegaconf import DictConfig

from cosmos3_pipeline.cli import launch, run


@hydra.main(version_base="1.3", config_path="conf", config_name="kite_films")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Make one film. The code before `run` belongs to this project."""
    print(f"film {cfg.extras.film}")
    return run(cfg)


def command() -> None:
    """The function that the console script calls."""
    launch(main)


if __name__ == "__main__":
    command()
