"""See `distributed.host_path`."""

from cosmos3_pipeline.distributed.host_path import takes_host_path as takes_host_path
