"""The config options, as a package: `pkg://cosmos3_pipeline.conf` in a search path of Hydra.

The options extend schemas that Hydra must know first. Importing this package registers the schemas.
"""

from cosmos3_pipeline.config.plugins import register

register()
