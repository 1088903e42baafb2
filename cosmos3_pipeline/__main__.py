"""`python -m cosmos3_pipeline` is the `cosmos3` command."""

import sys

from cosmos3_pipeline import commands, stopping


def main() -> None:
    """Run the command. Signals end this process in order from the start, also while the rest is imported."""
    stopping.on_signals()
    commands.check_environment()
    if len(sys.argv) > 1 and sys.argv[1] in commands.COMMANDS:
        sys.exit(stopping.stoppable(commands.run))
    from cosmos3_pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
