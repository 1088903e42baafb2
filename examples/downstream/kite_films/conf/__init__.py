"""The configs of this project, beside those of cosmos3_pipeline."""
