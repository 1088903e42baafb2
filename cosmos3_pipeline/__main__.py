"""`python -m cosmos3_pipeline` is the `cosmos3` command."""

from cosmos3_pipeline.cli import main

main()
