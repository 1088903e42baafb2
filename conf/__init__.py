"""The config options, as a package: `pkg://cosmos3_pipeline.conf` in a search path of Hydra.

They extend schemas that Hydra has to know first; whoever puts this package into a search path has them.
"""

from cosmos3_pipeline.config.plugins import register

register()
