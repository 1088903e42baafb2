"""The text of `--help`: every option of every group with its own first line, read from conf/."""

from __future__ import annotations

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.vae.plugins import Plugins

HEAD = """\
NVIDIA Cosmos3 video generation on many devices, from configuration.

  {command}                                      a toy video in seconds, on any laptop
  {command} task=t2i task.prompt='a red kite'    one image
  {command} model=nano model.path=DIR topology=h200_x4
  {command} -m vae=replicated,parallel_decode topology=cpu_x1,cpu_x2    a sweep, with a table and a page at the end
  {command} job=plan model=nano topology=h200_x4    what that run would do; plan.search=true ranks layouts
  torchrun --nproc-per-node 2 launch.py topology=cpu_x2    join ranks that exist already

group=option chooses one of:
"""

FOOT = """
key=value sets anything else; see all keys and what they are now with --cfg job:
  task.prompt task.negative_prompt task.image task.video task.height task.width task.num_frames task.fps
  sampler.steps sampler.guidance_scale sampler.flow_shift sampler.seed     output.latents output.report
  model.path model.revision model.dtype     vae.parallel_encode vae.parallel_decode
  topology.nodes .ranks_per_node .cfg .ulysses

  --cfg job     print the composed configuration and stop (--resolve: with the references followed)
  -m            run every combination of comma-separated values
  --hydra-help  Hydra's own flags

  cosmos3 diff, blame, sweep-plan: what a change does, who set a value, what a sweep would run (see their --help)
  cosmos3 report: the page of a sweep or of a run, written anew
  cosmos3 plugins: the strategies that are installed, and why one is not to be had
  cosmos3 make-checkpoint: random weights in a published layout, to try a machine before a download
"""


def help_text(command: str, plugins: Plugins) -> str:
    """The help page; `command` is how the program was called."""
    lines = [HEAD.format(command=command)]
    root = config_dir()
    groups: dict[str, dict[str, str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group != ".":
            groups.setdefault(group, {})[file.stem] = _first_line(file.read_text(encoding="utf-8"))
    for name, cls in plugins.strategies.items():
        for direction in sorted(cls.directions):
            about = (cls.__doc__ or "").strip().splitlines()[0]
            groups.setdefault(f"vae/{direction}", {}).setdefault(name, about)
    for group, options in sorted(groups.items()):
        lines.append(f"{group}")
        width = max(len(option) for option in options)
        lines.extend(f"  {option:{width}}  {about}" for option, about in options.items())
    for name, why in plugins.broken.items():
        lines.append(f"\nplugin {name} is installed but broken: {why}")
    lines.append(FOOT)
    return "\n".join(lines)


def _first_line(text: str) -> str:
    comments = (line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line)
    return next(comments, "")
