"""Every check of a composition, before a weight is read: first its structure, then its arithmetic.

All problems are collected, so that a user can fix them in one go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.adopt import Adopted, adopt_checkpoint
from cosmos3_pipeline.checkpoint.hub import is_hub_id
from cosmos3_pipeline.checkpoint.lora import read_adapter
from cosmos3_pipeline.checkpoint.weights import Part, generation_parts, transformer_weights
from cosmos3_pipeline.config import checks as structure
from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.overrides import typed_settings
from cosmos3_pipeline.config.plain import flat, plain
from cosmos3_pipeline.config.provenance import Provenance
from cosmos3_pipeline.config.schema import Config, JobName, Placement, TaskName
from cosmos3_pipeline.config.shortcut import PlainComposition
from cosmos3_pipeline.config.tasks import paths_of
from cosmos3_pipeline.denoise.checks import PASSES, check_layout, check_tokens
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.planning.action_checks import by_hand, check_actions, settled
from cosmos3_pipeline.planning.geometry import (
    Clip,
    chunks_of,
    clip_of,
    grid_of,
    modalities_of,
    nearest_multiple,
    replica_ranks,
)
from cosmos3_pipeline.planning.plan import Plan, make_plan
from cosmos3_pipeline.planning.sampling import check_cache, check_interval, check_steps, passes_of
from cosmos3_pipeline.planning.task_checks import TASK_CHECKS
from cosmos3_pipeline.planning.trained import outside
from cosmos3_pipeline.planning.transfer import transfer_problems
from cosmos3_pipeline.planning.unread import unread_settings, value_of
from cosmos3_pipeline.planning.vae import (
    VaePlan,
    directions,
    is_parallel,
    settings_of,
    strategy_of,
    vae_plan,
)
from cosmos3_pipeline.planning.writing import PRESETS
from cosmos3_pipeline.vae.of_diffusers import OfDiffusers
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Exactness

# Nobody has more ranks than this for one run, and a plan for more ranks takes longer than a second.
MOST_RANKS = 1024


@dataclass(frozen=True)
class Checked:
    """A config without problems, with two results of its check: the VAE's plans, and the checkpoint if any."""

    config: Config
    vae: Mapping[Direction, VaePlan]
    adopted: Adopted | None = None

    def plan(self) -> Plan:
        """The plan of the config. It uses the VAE's plans of the check."""
        return make_plan(self.config, vae=self.vae)


def check_composition(
    composition: Composition | PlainComposition,
    changes: Mapping[str, Any] | None = None,
    *,
    plan_vae: bool = True,
) -> Checked:
    """The typed and checked config of `composition`. Raises ConfigError with every problem found.

    If `model.path` is a local folder, the checkpoint's numbers replace those in the config, see
    `adopt_checkpoint`. `changes` maps dotted keys to values that replace the composition's. Each problem names the
    file or override that set its keys.

    Planning the VAE takes most of the time. Without `plan_vae` nothing is found that its strategies would refuse.
    """
    # The structure of a plain composition has been checked already.
    found = structure.problems(composition) if isinstance(composition, Composition) else []
    if not found:  # the checks below need every value present and in range
        config = composition.typed(changes)
        found.extend(_model(config))
        found.extend(_ranks_in_all(config))
        found.extend(_no_text(config))
        found.extend(no_paths := [*_no_paths(config)])
        found.extend(unread_settings(config, composition, changes or {}))
        try:
            adopted = None if no_paths else adopt_checkpoint(config)
        except Refusal as refusal:
            found.append(refusal.problem)
        else:
            found.extend(() if adopted is None else _replaced_settings(composition, adopted))
            found.extend(() if found else _adapters(config, adopted))  # wrong numbers give wrong weights
    if not found:
        numbers = {**(changes or {}), **(adopted.numbers if adopted is not None else {})}
        try:
            config = composition.typed(numbers)
            of_picture = settled(config)
            found.extend(by_hand(of_picture, composition.literal, typed_settings(composition.overrides or ())))
            checked = check(composition.typed({**numbers, **of_picture}) if of_picture else config, plan_vae)
            if not found:
                return replace(checked, adopted=adopted)
        except ConfigError as error:
            found.extend(error.problems)
    raise ConfigError(located(found, composition))


def _replaced_settings(composition: Composition | PlainComposition, adopted: Adopted) -> Iterator[Problem]:
    """Typed numbers of a model that the checkpoint replaces by its own."""
    typed, config = typed_settings(composition.overrides or ()), composition.typed()
    for key, number in adopted.numbers.items():
        if key in typed and value_of(config, key) != number:
            yield Problem(
                what=f"{typed[key]} with model.path={config.model.path}",
                why=f"the checkpoint says {'null' if number is None else number}, and a run takes its numbers",
                works=f"no {key}, or model=toy_random, which is made with the numbers of the config",
            )


def check(cfg: Config, plan_vae: bool = True) -> Checked:
    """Check the arithmetic of `cfg`, whose structure is right. Raises ConfigError with every problem."""
    clip, vae = clip_of(cfg), dict[Direction, VaePlan]()
    found = [problem for one in CHECKS for problem in one(cfg, clip)]
    found += check_actions(cfg)
    found += [] if found else _tokens(cfg)
    for direction in directions(cfg) if plan_vae and replica_ranks(cfg.topology) else ():
        if found and not is_parallel(cfg.vae, direction):
            continue  # the reference works with every valid clip and number of ranks
        try:
            vae[direction] = _vae(cfg, direction)
        except ConfigError as error:
            found.extend(error.problems)
    found += [problem for one in (_output, _job) for problem in one(cfg)]
    if cfg.model.trained.when_outside == "refuse":
        found.extend(outside(cfg))
    if found:
        raise ConfigError(found)
    return Checked(cfg, vae)


def located(problems: Sequence[Problem], composition: Composition | PlainComposition) -> Sequence[Problem]:
    """`problems` with the file or override that set each key in their text, as far as it is known."""
    traced = composition.traced()
    if traced is None:
        return problems
    return [replace(problem, set_by=tuple(_origins(problem.what, traced))) for problem in problems]


def _origins(words: str, traced: Provenance) -> Iterator[str]:
    for key in dict.fromkeys(re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", words)):
        # A strategy's settings come with the choice of its class, so the origin of `_target_` is theirs too.
        if chain := traced.chain(key) or traced.chain(f"{key}._target_"):
            through = f" ({chain[-1].key})" if len(chain) > 1 else ""
            yield f"{key} by {chain[-1].winner.place}{through}"


def _model(cfg: Config) -> Iterator[Problem]:
    model = cfg.model
    path = model.path
    if model.transformer.sound_gen and model.transformer.sound_dim is None:
        yield Problem(
            what="model.transformer.sound_gen=true with model.transformer.sound_dim=null",
            why="a head for sound needs the channels of a sound latent",
            works="model.transformer.sound_dim=64, as published, or model.transformer.sound_gen=false",
        )
    heads, keys = model.transformer.num_attention_heads, model.transformer.num_key_value_heads
    if heads % keys:
        yield Problem(
            what=f"model.transformer.num_attention_heads={heads} with "
            f"model.transformer.num_key_value_heads={keys}",
            why="each key/value head serves equally many attention heads",
            works=f"model.transformer.num_attention_heads={nearest_multiple(heads, keys)}",
        )
    yield from _scale(cfg)
    if path is None and cfg.model.repo is None and cfg.model.distilled_sigmas is not None:
        yield Problem(
            what=f"model.distilled_sigmas with model={cfg.model.name} and model.path=null",
            why="the checkpoint that is made on the spot is not distilled",
            works="a checkpoint of cosmos3 make-checkpoint --layout distilled FOLDER, with model.path=FOLDER",
        )
    if path is not None and is_hub_id(path):
        return
    for key in ("revision", "commit"):
        value = cfg.model.revision if key == "revision" else cfg.model.commit
        if value is not None:
            yield Problem(
                what=f"model.{key}={value} with model.path={'null' if path is None else path}",
                why="only a repository of the hub has revisions, so it would be ignored",
                works=f"model.path={cfg.model.repo or 'nvidia/Cosmos3-Nano'}, or no model.{key}",
            )


def _scale(cfg: Config) -> Iterator[Problem]:
    """Problems of scale factors between pixels and latents that contradict the VAE's levels."""
    vae = cfg.model.vae
    resamplings = len(vae.dim_mult) - 1
    spatial = vae.patch_size << resamplings
    temporal = 2 ** sum(vae.temperal_downsample[:resamplings])
    for key, factor in (("scale_factor_spatial", spatial), ("scale_factor_temporal", temporal)):
        if getattr(vae, key) != factor:
            yield Problem(
                what=f"model.vae.{key}={getattr(vae, key)}",
                why=f"model.vae.dim_mult={vae.dim_mult}, temperal_downsample={vae.temperal_downsample} and "
                f"patch_size={vae.patch_size} make it {factor}",
                works=f"model.vae.{key}={factor}",
            )


def _adapters(cfg: Config, adopted: Adopted | None) -> Iterator[Problem]:
    """Problems of entries in `model.lora` that are no adapter or do not fit the checkpoint's weights.

    The weights of a model that is made on the spot follow from its numbers. The weights of a hub checkpoint are
    unknown before its download, so the fit is checked after it.
    """
    weights = None
    if adopted is not None:
        weights = [placed.weight for placed in adopted.checkpoint.tensors["transformer"]]
    elif cfg.model.path is None and cfg.model.repo is None:
        numbers = {**plain(cfg.model.transformer), "latent_channel": cfg.model.vae.z_dim}
        weights = list(transformer_weights(numbers))
    seen: dict[Path, int] = {}
    read = (Part.TEXT, *generation_parts(modalities_of(cfg)))
    for number, asked in enumerate(cfg.model.lora):
        try:
            adapter = read_adapter(asked, number)
            if (first := seen.setdefault(adapter.file.resolve(), number)) != number:
                weight = cfg.model.lora[first].weight + asked.weight
                yield Problem(
                    what=f"model.lora[{first}] and model.lora[{number}] are one adapter, {asked.path}",
                    why="it would be added twice, as strongly as both weights together",
                    works=f"model.lora=[{{path: {asked.path}, weight: {weight:g}}}] if that is meant, or once",
                )
                continue
            if weights is not None:
                adapter.check_fits(weights, read=read)
        except Refusal as refusal:
            yield refusal.problem


def _no_text(cfg: Config) -> Iterator[Problem]:
    """Problems of values whose bytes are no UTF-8. Python hands such bytes of a command line on as surrogates."""
    for key, value in flat(cfg).items():
        shown = str(value).encode("utf-8", "backslashreplace").decode()
        if shown != str(value):
            yield Problem(
                what=f"{key}={shown[:60]} is no text",
                why="its bytes are not UTF-8, and the files of a run are",
                works=f"{key} in UTF-8, such as from a terminal with LC_ALL=C.UTF-8; a file can be renamed",
            )


def _no_paths(cfg: Config) -> Iterator[Problem]:
    """Problems of values that cannot be paths: too long, in an unknown user's home, or in a closed folder."""
    for key, path in paths_of(cfg).items():
        try:
            Path(path).expanduser().exists()
        except (OSError, RuntimeError, ValueError) as error:
            shown = path if len(path) <= 80 else f"{path[:60]}... ({len(path)} characters)"
            why = getattr(error, "strerror", None) or str(error)
            yield Problem(f"{key}={shown} cannot be looked for", why, f"{key}=FILE with a path that exists")


def _ranks_in_all(cfg: Config) -> Iterator[Problem]:
    topology = cfg.topology
    if topology.nodes * topology.ranks_per_node > MOST_RANKS:
        yield Problem(
            what=f"topology.nodes={topology.nodes} x topology.ranks_per_node={topology.ranks_per_node} = "
            f"{topology.nodes * topology.ranks_per_node} ranks",
            why=f"a plan goes over all ranks, and is made for {MOST_RANKS} at most",
            works=f"topology.nodes={max(MOST_RANKS // topology.ranks_per_node, 1)}, or fewer ranks on each",
        )


def _ranks(cfg: Config, clip: Clip) -> Iterator[Problem]:
    topology = cfg.topology
    ranks = topology.nodes * topology.ranks_per_node
    grid = grid_of(topology)
    split = topology.dp * topology.cfg * grid.ranks
    # With more ranks for guidance than passes, other numbers of ranks do not help: `_layout` says what does.
    if ranks % split and (topology.cfg <= PASSES or _has_own_passes(cfg)):
        cp = f" x topology.cp=[{grid.rows},{grid.columns}]" if grid.groups > 1 else ""
        axes = f"topology.cfg={topology.cfg}{cp} x topology.ulysses={topology.ulysses}"
        axes = axes if topology.dp == 1 else f"topology.dp={topology.dp} x {axes}"
        yield Problem(
            what=f"{axes} on {ranks} ranks",
            why=f"{ranks} ranks do not divide by {split}",
            works=f"topology.ranks_per_node={nearest_multiple(ranks, split)}"
            if topology.nodes == 1
            else "axes whose product divides the ranks",
        )
    if topology.dp > 1 and cfg.task.prompt_file is None:
        yield Problem(
            what=f"topology.dp={topology.dp} with one prompt",
            why="a replica makes clips of its own, and one prompt is one clip",
            works="task.prompt_file=prompts.txt with a prompt per line, or topology.dp=1",
        )


def _layout(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """Problems of a layout that the transformer's heads or the guidance do not allow."""
    model, topology = cfg.model.transformer, cfg.topology
    found = refused(
        lambda: check_layout(
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            cfg=1 if _has_own_passes(cfg) else topology.cfg,
            ulysses=topology.ulysses,
            guidance_scale=cfg.sampler.guidance_scale,
        )
    )
    for problem in found:
        yield _by_keys(problem)


def _tokens(cfg: Config) -> Iterator[Problem]:
    """Problems of a grid with too few tokens. Tokens can be counted only if nothing else is wrong with `cfg`."""
    tokens = min(
        one.rows for chunk in range(min(chunks_of(cfg).count, 2)) for one in passes_of(cfg, (1, 1), chunk)
    )
    for problem in refused(lambda: check_tokens(tokens, grid_of(cfg.topology))):
        yield _by_keys(problem)


def _by_keys(problem: Problem) -> Problem:
    """The denoiser's `problem` with config keys for its argument names: `topology.ulysses=` for `ulysses=`."""
    named = re.sub(r"(?<![.\w])(cfg|cp|ulysses)=", r"topology.\1=", "\0".join((problem.what, problem.works)))
    what, works = re.sub(r"(?<![.\w])guidance_scale=", "sampler.guidance_scale=", named).split("\0")
    return Problem(what=what, why=problem.why, works=works)


def _has_own_passes(cfg: Config) -> bool:
    """Whether another check compares topology.cfg with the passes: `_distilled` or `transfer_problems`."""
    return cfg.model.distilled_sigmas is not None or cfg.task.name is TaskName.transfer


def _weights(cfg: Config, clip: Clip) -> Iterator[Problem]:
    weights, layers = cfg.weights, cfg.model.transformer.num_hidden_layers
    placement, stay = weights.placement, weights.resident_layers
    if placement is Placement.sharded and replica_ranks(cfg.topology) == 1:
        yield Problem(
            what="weights.placement=sharded with one rank for a clip",
            why="there is no other rank to keep a part of the layers",
            works="weights=streamed, or more ranks on topology.cfg, topology.cp or topology.ulysses",
        )
    if placement not in (Placement.streamed, Placement.auto) and stay != 0:
        yield Problem(
            what=f"weights.resident_layers={'null' if stay is None else stay} with "
            f"weights.placement={placement.value}",
            why="only where layers are streamed do some of them stay, so it would be ignored",
            works="weights=streamed, or weights.resident_layers=0",
        )
    if stay is not None and stay > layers:
        yield Problem(
            what=f"weights.resident_layers={stay} with {layers} layers",
            why="no more layers can stay than there are",
            works=f"weights.resident_layers={layers}, which is weights=resident, or null for as many as fit",
        )


def _vae(cfg: Config, direction: Direction) -> VaePlan:
    """The plan of a direction. Raises ConfigError if its strategy refuses, or is not exact enough."""
    required = Exactness(cfg.vae.required_exactness)
    if is_parallel(cfg.vae, direction):
        named = f"vae.{direction}={settings_of(cfg.vae, direction)['_target_'].rpartition('.')[2]}"
        exact = f"vae/{direction}=layer_pipeline"
    else:
        named, exact = f"vae.kernels={cfg.vae.kernels}", "vae.kernels=own"
    try:
        planned = vae_plan(cfg, direction, strategy_of(cfg, direction))
    except Refusal as refusal:
        raise ConfigError([replace(refusal.problem, what=f"{named}: {refusal.problem.what}")]) from refusal
    if not planned.plan.exactness.satisfies(required):
        problem = Problem(
            what=f"{named} is {planned.plan.exactness} with vae.required_exactness={required}",
            why=f"its output is not {required} equal to that of one rank",
            works=f"{exact}, which is bitwise, or vae.required_exactness={planned.plan.exactness}",
        )
        raise ConfigError([problem])
    return planned


def _kernels(cfg: Config, clip: Clip) -> Iterator[Problem]:
    parallel = [key for key in ("parallel_encode", "parallel_decode") if getattr(cfg.vae, key)]
    if cfg.vae.kernels == OfDiffusers.name and parallel:
        yield Problem(
            what=f"vae.kernels=diffusers with {' and '.join(f'vae.{key}=true' for key in parallel)}",
            why="diffusers' VAE runs whole on every rank, and a strategy divides the kernels of this package",
            works="vae=diffusers, or vae.kernels=own",
        )
    if cfg.vae.kernels == OfDiffusers.name and cfg.job.name == JobName.rehearse:
        yield Problem(
            what="vae.kernels=diffusers with job=rehearse",
            why="a rehearsal compares a run with its plan, which only estimates the memory of diffusers' VAE",
            works="vae=replicated, or job=generate",
        )


def _job(cfg: Config) -> Iterator[Problem]:
    if cfg.plan.search and cfg.job.name != JobName.plan:
        yield Problem(
            what=f"plan.search=true with job={cfg.job.name.value}",
            why="only job=plan searches; a run has the layout that it was given",
            works="job=plan, or plan.search=false",
        )


def _output(cfg: Config) -> Iterator[Problem]:
    presets = PRESETS[cfg.output.encoder]
    if cfg.output.preset not in presets:
        yield Problem(
            what=f"output.preset={cfg.output.preset} does not exist",
            why=f"the presets of output.encoder={cfg.output.encoder.value} are: {', '.join(presets)}",
            works=did_you_mean(cfg.output.preset, presets, otherwise="output.preset=medium"),
        )


CHECKS = (
    *TASK_CHECKS,
    transfer_problems,
    check_steps,
    check_interval,
    check_cache,
    _ranks,
    _layout,
    _weights,
    _kernels,
)


def refused(action: Callable[[], object]) -> Iterator[Problem]:
    """The problem of the Refusal that `action` raises, or nothing if it raises none."""
    try:
        action()
    except Refusal as refusal:
        yield refusal.problem
