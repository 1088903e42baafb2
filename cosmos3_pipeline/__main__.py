"""`python -m cosmos3_pipeline` is the `cosmos3` command."""

from cosmos3_pipeline import stopping


def main() -> None:
    """Run the command. Signals end this process in order from the start, also while the rest is imported."""
    stopping.on_signals()
    from cosmos3_pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
