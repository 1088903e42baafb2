"""Command lines with mistakes, and the commands that are proposed for them. The proposals are run as well."""

from __future__ import annotations

import shlex
import string
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from cosmos3_pipeline import cli
from cosmos3_pipeline.cli import overrides_first
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.mistakes import as_typed
from cosmos3_pipeline.config.overrides import check_overrides
from cosmos3_pipeline.config.source import BUILTIN
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.checks import check_composition

PROMPTS = st.text(string.ascii_letters + string.digits + string.punctuation + " äß", max_size=30)


def value_of(typed: str) -> object:
    (argument,) = shlex.split(typed)
    return compose([argument]).typed().task.prompt


@given(PROMPTS)
def test_what_is_advised_sets_the_very_words(words: str) -> None:
    (argument,) = shlex.split(as_typed("task.prompt", words))
    assert OverridesParser.create().parse_override(argument).value() == words.replace("${", "\\${")


@pytest.mark.parametrize(
    "words", ["it's", 'a "red" kite', "what: a kite (red)?", "a, b", "${x}", "back\\", "[x", ""]
)
def test_the_words_reach_the_config(words: str) -> None:
    assert value_of(as_typed("task.prompt", words)) == words


@pytest.mark.parametrize(
    ("typed", "works"),
    [
        ("task.prompt=it's", '"task.prompt=\\"it\'s\\""'),
        ("task.prompt=a|red|kite", "'task.prompt=a red kite'"),
        ("task.prompt=what: a kite (red)?", "'task.prompt=\"what: a kite (red)?\"'"),
        ("task.prompt=[x", "'task.prompt=\"[x\"'"),
        ("task.prompt=a, b", "'task.prompt=\"a, b\"', or with -m to try each"),
        ("sampler.steps=1,2", "-m sampler.steps=1,2 to try each"),
        ("topology=glob(cpu_*)", "-m 'topology=glob(cpu_*)'"),
        ("vae.decode=tiled", "vae/decode=tiled"),
        ("vae.decode=tile", "vae/decode=tiled"),
        ("decode=tiled", "vae/decode=tiled"),
        ("vae.decode=xyzzy", "vae/decode=auto or vae/decode=layer_pipeline or "),
        ("vae.decode=paralel", "vae=parallel"),
        ("vae/decode=paralel", "did you mean vae=parallel?"),
        ("vae.decode=true", "vae.parallel_decode=true"),
        ("vae/encode=true", "vae.parallel_encode=true"),
        ("decode=off", "vae.parallel_decode=false"),
        ("vae.decode=[tiled]", "vae/decode=tiled"),
        ("vae.decode=4", "vae/decode=auto or vae/decode=layer_pipeline or "),
        ("vae.decode=null", "vae/decode=auto or vae/decode=layer_pipeline or "),
        ("sampler.cache=false", "sampler/cache=none"),
        ("vae.decode.groups=2", "vae/decode=pipeline_of_shards beside it"),
        ("vae=[tiled,replicated]", "to try each: -m vae=tiled,replicated"),
        ("kite", "key=value or group=option"),
        ("A red circle", "'task.prompt=\"A red circle\"'"),
        ("sampler.steps:4", "sampler.steps=4"),
        ("topology=4", "topology=cpu_x4 or topology=h200_x4"),
        ("vae=true", "vae=parallel or "),
        ("model=1.5", "model=edge or "),
        ("experiment=null", "or ~experiment for none"),
        ("hydra/launcher=3", "hydra/launcher=NAME"),
        ("task.num_frames=17frames", "task.num_frames=17"),
        ("task.size=160x96", "task.width=160 task.height=96"),
        ("hydra/launcher=rq", "pip install hydra-rq-launcher"),
        ("hydra/launcher=slurn", "did you mean hydra/launcher=slurm?"),
        ("hydra.launcher.n_jobs=2", "hydra/launcher=joblib beside it"),
        ("hydra.run.dir", "hydra.run.dir=VALUE"),
        ("model=nvidia/Cosmos3-Nano", "did you mean model=nano model.path=nvidia/Cosmos3-Nano?"),
        ("weights=offload", "did you mean weights=streamed?"),
        ("weights.offload=true", "did you mean weights=streamed?"),
        ("vae.decode.name=tiled", "did you mean vae/decode=tiled?"),
        ("vae.decode.strategy=tiled", "did you mean vae/decode=tiled?"),
        ("output.format=gif", "the keys of output are: "),
        ("extras.tags=[kite]", "'+extras.tags=[kite]'"),
        ("output.report=ture", "output.report=true"),
        ("task.width=1.5k", "task.width=1500"),
        ("sampler.steps=2O", "sampler.steps=20"),
        ("sampler.steps=1e3", "sampler.steps=1000"),
        ("sampler.steps=thirty", "sampler.steps=20"),
        ("sampler.steps=thirty|task=i2v|sampler.steps=4|task.image=a.png", "sampler.steps=20"),
        ("task.fps=24000/1001", "task.fps=23.976"),
        ("output.crf=high", "output.crf=17"),
        ("output.lossless=true", "the keys of output are: "),
        ("output.video=true", "the keys of output are: "),
        ("output.codec=h264", "did you mean output.encoder=libx264?"),
        ("output=kite.mp4", "did you mean hydra.run.dir=kite?"),
        ("output.dir=", "did you mean hydra.run.dir?"),
        ("hydra.run.dir=", "hydra.run.dir=. for this folder, or the command without hydra.run.dir"),
        ("hydra.sweep.subdir=''", "hydra.sweep.subdir=TEXT, or the command without hydra.sweep.subdir"),
        ("model.path=", "model.path=TEXT, or the command without model.path"),
        ("model.lora=[{path: ''}]", "model.lora[0].path=TEXT, or the command without model.lora"),
        ("obj=seconds", "did you mean objective?"),
        ("task.neg=blur", "did you mean task.negative_prompt?"),
        ("task=video", "did you mean task=t2v?"),
        ("task=image", "did you mean task=t2i?"),
        ("hydra.sweep.dirs=x", "did you mean hydra.sweep.dir?"),
        ("hydra.sweeper.n_trails=3", "did you mean hydra.sweeper.n_trials?"),
        ("hydra.xyzzy=3", "the keys of hydra are: "),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(typed: str, works: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(typed.split("|"))
    (problem,) = refused.value.problems
    assert works in problem.works and problem.why


def test_paths_may_refer_to_where_hydra_was_started() -> None:
    config = check_composition(compose(["task.prompt=${hydra:runtime.cwd}/p.txt"])).config
    assert config.task.prompt == f"{Path.cwd()}/p.txt"


def test_a_sweep_may_have_commas() -> None:
    asked = ["vae=tiled,replicated", "sampler.steps=range(1,3)", "topology=glob(cpu_*)"]
    check_overrides(asked, BUILTIN.groups(), sweep=True)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["a=1", "-m", "b=1,2"], ["a=1", "b=1,2", "-m"]),
        (["--cfg", "job", "a=1"], ["a=1", "--cfg", "job"]),
        (["-i", "plugins", "a=1", "-cd", "x"], ["a=1", "-i", "plugins", "-cd", "x"]),
        (["--info", "a=1"], ["a=1", "--info"]),
        (["--config-dir=x", "a=1", "--resolve", "b=2"], ["a=1", "b=2", "--config-dir=x", "--resolve"]),
    ],
)
def test_flags_may_stand_between_overrides(given: list[str], taken: list[str]) -> None:
    assert overrides_first(given) == taken


def test_a_folder_of_configs_that_is_not_there_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cosmos3_pipeline", "--config-dir", "nope"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--config-dir nope" in done.stderr


@pytest.mark.parametrize(
    ("typed", "works"),
    [
        ("--sampler.steps=4", "sampler.steps=4"),
        ("--vae=tiled", "vae=tiled"),
        ("--task.prompt=a kite", "'task.prompt=a kite'"),
        ("--config", "--config-path or --config-name or --config-dir"),
        ("--cfg=jobs", "--cfg job"),
        ("--config-name=nope", "the name of a file in a folder that --info searchpath lists"),
        ("dif", "cosmos3 diff"),
        ("plugin", "cosmos3 plugins"),
    ],
)
def test_what_is_no_flag_and_no_command_is_told_before_anything_else(
    typed: str, works: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cosmos3", typed])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.REFUSED
    told = capsys.readouterr().err.rstrip()
    assert f"works: {works}" in told
    assert "=" not in works or told.endswith(f"to copy: cosmos3 {works}")


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_the_number_of_a_repeat_is_not_typed(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cosmos3", *flags, "sweep.repeat=3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.REFUSED
    assert "works: -m sweep.repeats=3" in capsys.readouterr().err


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["cosmos3", "--version"])
    assert cli._code_of(pytest.fail) == 0
    assert capsys.readouterr().out == f"cosmos3_pipeline {metadata.version('cosmos3_pipeline')}\n"


def test_output_that_nobody_reads_ends_without_a_word() -> None:
    command = [sys.executable, "-m", "cosmos3_pipeline", "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13


def meant(typed: str) -> str | None:
    found = cli._read(typed.split("|"))
    if any(each.means is None for each in found):
        return None
    return "|".join(argument for each in found for argument in each.means or ())


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        pytest.param("sampler.cache=seacache", "sampler/cache=seacache", id="dot for slash"),
        pytest.param("task/prompt=kite", "task.prompt=kite", id="slash for dot"),
        pytest.param("topology.cp=2,2", "topology.cp=[2,2]", id="list without brackets"),
        pytest.param("topology.cp=[2,2", "topology.cp=[2,2]", id="one bracket"),
        pytest.param("-m|sampler.seed=6..4", "-m|sampler.seed=range(6,3,-1)", id="numbers downwards"),
        pytest.param("sampler.steps==4", "sampler.steps=4", id="two equals"),
        pytest.param("model = nano", "model=nano", id="spaces in an argument"),
        pytest.param("model|=|nano|sampler.steps=|4", "model=nano|sampler.steps=4", id="spaces in a shell"),
        pytest.param("job=plan model nano", "job=plan|model=nano", id="no equals"),
        pytest.param("plan|model.nano", "job=plan|model=nano", id="option alone"),
        pytest.param("+model=nano", "model=nano", id="plus"),
        pytest.param("~model", "", id="deleted group"),
        pytest.param("seed=3|width=160", "sampler.seed=3|task.width=160", id="last part of a key"),
        pytest.param("num_inference_steps=4|gpus=2", "sampler.steps=4|topology.ranks_per_node=2", id="other tool"),
        pytest.param("JOB=Plan|tasks=t2i", "job=plan|task=t2i", id="capitals and plural"),
        pytest.param("topology=CPU-X2|model=model/nano.yaml", "topology=cpu_x2|model=nano", id="spelt option"),
        pytest.param("vae=layer_pipeline|model=t2i", "vae/decode=layer_pipeline|task=t2i", id="other group"),
        pytest.param("task.height=1,080|task.fps=24fps", "task.height=1080|task.fps=24", id="numbers"),
        pytest.param("task.num_frames=5s|task.fps=23,5", "task.num_frames=121|task.fps=23.5", id="seconds"),
        pytest.param("task.sound=enabled|model.dtype=bf16", "task.sound=true|model.dtype=bfloat16", id="words"),
        pytest.param("--steps|4|--prompt|a red kite", "sampler.steps=4|task.prompt=a red kite", id="flags"),
        pytest.param("-help|--multirun=true", "--help|--multirun", id="flag spelt otherwise"),
        pytest.param("model=\u201cnano\u201d|\u2014cfg|job", "model=nano|--cfg|job", id="typographic"),
        pytest.param("vae=tiled,replicated", "-m|vae=tiled,replicated", id="sweep without -m"),
        pytest.param("-m|sampler.seed=1,|2", "-m|sampler.seed=1,2", id="space in a sweep"),
        pytest.param("output=video.mp4", "hydra.run.dir=video", id="file for a folder"),
        pytest.param("topology.accelerator=cuda", "topology.device=cuda", id="value of the key beside"),
        pytest.param("sampler.scheduler=euler|mode=txt2img", "sampler=unipc|task=t2i", id="group of another tool"),
        pytest.param("weights=cpu|offload=true", "weights=streamed|weights=streamed", id="option of another tool"),
        pytest.param("vae.parallel=true|vae.tiling=True", "vae=parallel|vae=tiled", id="option as a flag"),
        pytest.param("--enable-model-cpu-offload|--dry-run", "weights=streamed|job=plan", id="flag for an option"),
        pytest.param("vae.tiling=false", None, id="no option for off"),
        pytest.param("--tensor-parallel-size|4", "topology.ulysses=4", id="flag of another tool"),
        pytest.param("prompt|a kite|seed|42", "task.prompt=a kite|sampler.seed=42", id="key before its value"),
        pytest.param("task.sound", "task.sound=true", id="key alone"),
        pytest.param("launch.py|a.jpg|b.mp4", "task.image=a.jpg|task.video=b.mp4", id="file alone"),
        pytest.param("+sampler.seed=4|++task.fps=8", "sampler.seed=4|++task.fps=8", id="plus for a key"),
        pytest.param("~task.image", "", id="deleted key"),
        pytest.param(
            "-m|sampler.seed=1-5|task.fps=[8,16]", "-m|sampler.seed=range(1,6)|task.fps=8,16", id="range"
        ),
        pytest.param("sampler.seed=1..3", "-m|sampler.seed=range(1,4)", id="range without -m"),
        pytest.param("topology=8xH100|topology=cpu", "topology=h100_x8|topology=cpu_x4", id="part of an option"),
        pytest.param("model=nano;job=plan", "model=nano|job=plan", id="semicolon"),
        pytest.param("task.prompt=a=b, c=d", 'task.prompt="a=b, c=d"', id="equals in a text"),
        pytest.param("model.name=nano", "model=nano", id="name of an option"),
        pytest.param("task.negative_prompt=None", "task.negative_prompt=null", id="None"),
        pytest.param(
            "sampler.cache=on|sampler/cache=no", "sampler/cache=seacache|sampler/cache=none", id="on, off"
        ),
        pytest.param("model=nvidia/Cosmos3-Nano", "model=nano|model.path=nvidia/Cosmos3-Nano", id="repository"),
        pytest.param("--multirn|--confg-dir=own", "--multirun|--config-dir=own", id="misspelt flag"),
        pytest.param("xyzzy", None, id="no meaning"),
        pytest.param("vae.decode=none", None, id="no option"),
    ],
)
def test_a_mistyped_command_line_means(typed: str, right: str | None) -> None:
    assert meant(typed) == right


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        pytest.param("task.num_frames=5s|task.fps=16", "task.num_frames=81 task.fps=16", id="seconds at a rate"),
        pytest.param("task.fps=1000|model=nano", "task.fps=120 model=nano", id="out of range"),
        pytest.param("sampler.steps=twenty", None, id="a word for a number"),
        pytest.param("hydra/launcher=slurn", "hydra/launcher=slurm", id="option of Hydra's"),
        pytest.param("extras.tags=[kite]", "'+extras.tags=[kite]'", id="the user's own key"),
    ],
)
def test_the_command_to_copy_depends_on_the_rest(
    typed: str, command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cosmos3"])
    with pytest.raises(ConfigError) as refused:
        check_composition(compose(typed.split("|")))
    found = cli._corrected(typed.split("|"), [problem.works for problem in refused.value.problems])
    assert found == (command and f"cosmos3 {command}")
    assert command is None or command.split()[0] in refused.value.problems[0].works


def test_a_random_seed_is_one_number_in_the_whole_answer() -> None:
    assert meant("sampler.seed=random") == meant("seed=random") != "sampler.seed=random"


@pytest.mark.parametrize(
    "right",
    [
        "model=nano|task.prompt=a red kite|topology.cp=[2,2]|task.sound=yes",
        "-m|vae=tiled,replicated|sampler.steps=range(1,3)|topology=glob(cpu_*)",
        "~experiment|+extras.tags=[kite]|hydra/launcher=joblib|hydra.run.dir=x",
        "model.lora=[{path:a,weight:1}]|objective=[seconds,psnr]|task.prompt=${oc.env:HOME}",
        "model.path=|-m|vae=tiled,replicated",
        "--cfg=job|--config-na=x|--multirun|-m|sampler.steps=4|--config-dir|conf",
        'task.prompt="a, b"|task.image=/tmp/a b.png|vae.decode.moving_cuts=false|sampler.flow_shift=null',
    ],
)
def test_a_right_command_line_means_itself(right: str) -> None:
    assert meant(right) == right
