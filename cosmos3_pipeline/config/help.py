"""The text of `--help`: every option of every group, with the first comment line of its file."""

from __future__ import annotations

from cosmos3_pipeline.config.source import Source
from cosmos3_pipeline.vae.plugins import Plugins

HEAD = """\
NVIDIA Cosmos3 video generation on many devices, from configuration.

  {command}                                      a toy video in seconds, on any laptop
  {command} task=t2i task.prompt='A small red circle moves up over a black background.'    one image
  {command} model=nano model.path=DIR topology=h200_x4
  {command} -m vae=replicated,parallel_decode topology=cpu_x1,cpu_x2    a sweep, with a table and a page at the end
  {command} job=plan model=nano topology=h200_x4    what that run would do; plan.search=true ranks layouts
  {command} job=rehearse model=nano topology=h200_x4    its real code, without weights or a GPU
  torchrun --nproc-per-node 2 launch.py topology=cpu_x2    join ranks that exist already

group=option chooses one of:
"""

FOOT = """
key=value sets anything else; see all keys and what they are now with --cfg job:
  task.prompt task.negative_prompt task.image task.video task.height task.width task.num_frames task.fps task.sound
  sampler.steps sampler.guidance_scale sampler.flow_shift sampler.seed     output.latents output.report
  model.path model.revision model.lora model.dtype     vae.parallel_encode vae.parallel_decode
  topology.nodes .ranks_per_node .cfg .cp .ulysses
  rehearse.ranks (else all of a replica of up to eight, whose messages are replayed)     rehearse.format=markdown

  --cfg job     print the composed configuration and stop (--resolve: with the references followed)
  -m            run every combination of comma-separated values
  --config-dir  a folder with options of your own, beside these; or hydra.searchpath=[file://FOLDER]
  --config-path FOLDER --config-name config    a run once more, from the config.yaml in its folder
  --hydra-help  Hydra's own flags; hydra/launcher and hydra/sweeper choose who runs the jobs of -m

  cosmos3 diff, blame, sweep-plan: what a change does, who set a value, what a sweep would run (see their --help)
  cosmos3 report: the page of a sweep or of a run, written anew
  cosmos3 plugins: the strategies that are installed, and why one is not to be had
  cosmos3 completion bash | zsh | fish: TAB completes groups, options and keys
  cosmos3 make-checkpoint: random weights in a published layout, to try a machine before a download
"""


def help_text(command: str, plugins: Plugins, source: Source) -> str:
    """The help page. `command` is how the program was called, and `source` has its configs."""
    lines = [HEAD.format(command=command)]
    for group, options in sorted(source.abouts().items()):
        lines.append(f"{group}")
        width = max(map(len, options), default=0)
        for option, about in sorted(options.items()):
            strategy = plugins.strategies.get(option) if group.startswith("vae/") else None
            own = "" if strategy is None else (strategy.__doc__ or "").strip().partition("\n")[0]
            lines.append(f"  {option:{width}}  {about or own}")
    for name, why in plugins.broken.items():
        lines.append(f"\nplugin {name} is installed but broken: {why}")
    lines.append(FOOT)
    return "\n".join(lines)
