"""Films of kites, made with cosmos3_pipeline."""
