"""The configuration: its schema, how it is composed, and how it is checked. Imports no torch."""

from pathlib import Path


def config_dir() -> Path:
    """The folder of the YAML files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
