"""What a user can choose: the schema, composing it, checking it. Imports no torch."""

from pathlib import Path


def config_dir() -> Path:
    """The folder of the YAML files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
