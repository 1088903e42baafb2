"""Every kind of wrong setting is refused before torch is imported, in three parts, with what would work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.start import prepare

NAMES = "vae.encode._target_ and vae.decode._target_ name strategies"
REFUSALS = [
    pytest.param(["task={promt:x}"], "unknown key task.promt ", "task.prompt?", id="misspelt key in a node"),
    pytest.param(["extras={mine:x}"], "extras.mine is not there", "+extras.mine=VALUE", id="no plus"),
    pytest.param(["extras=x"], "extras is given x", "+extras.KEY=VALUE", id="text for keys of one's own"),
    pytest.param(["model.lora=true"], "model.lora", "model.lora=[{path:TEXT}]", id="truth for a list of nodes"),
    pytest.param(["hydra.run.dir=[a]"], "hydra.run.dir is given [a]", "--cfg hydra", id="list for Hydra's text"),
    pytest.param(["task.promt=x"], "unknown key task.promt", "did you mean task.prompt?", id="misspelt key"),
    pytest.param(["sampler.prompt=x"], "sampler.prompt", "did you mean task.prompt?", id="key of another node"),
    pytest.param(["vea=replicated"], "vea", "did you mean vae?", id="misspelt group"),
    pytest.param(["task.height=tall"], "task.height", "type", id="wrong type"),
    pytest.param(["vae.parallel_decode=maybe"], "vae.parallel_decode", "type", id="not a bool"),
    pytest.param(["model.dtype=float17"], "model.dtype", "one of float32, bfloat16", id="unknown enum"),
    pytest.param(["task.modality=image"], "task.modality=image with task=t2v", "task=t2i", id="other modality"),
    pytest.param(
        ["sampler.guidance_scale=1", "task.negative_prompt=dark"],
        "task.negative_prompt with sampler.guidance_scale=1.0",
        "no task.negative_prompt",
        id="negative prompt without guidance",
    ),
    pytest.param(
        ["sampler.guidance_scale=0"], "sampler.guidance_scale=0", "sampler.guidance_scale=1.0", id="no prompt"
    ),
    pytest.param(
        ["task.prompt=kite", "task.prompt_file=p.txt"], "task.prompt beside", "one of them", id="two prompts"
    ),
    pytest.param(
        ["task=v2v", "task.num_frames=5"],
        "[0, 1] of 2 latent frames",
        "task.num_frames=9",
        id="nothing to generate",
    ),
    pytest.param(
        ["vae.decode.moving_cuts=false"],
        "vae.parallel_decode=false",
        "vae.parallel_decode=true",
        id="no such flag",
    ),
    pytest.param(
        ["task=i2v", "task.background=[1,2]"], "task.background=[1, 2]", "=[255,255,255]", id="no colour"
    ),
    pytest.param(["task.background=[0,0,0]"], "task.background=[0,0,0]", "no task.background", id="no picture"),
    pytest.param(["task=i2v", "task.resample=false"], "task.resample=false", "no task.resample", id="no clip"),
    pytest.param(["task.prompt='caf\udce9'"], r"task.prompt=caf\udce9 is no text", "in UTF-8", id="no UTF-8"),
    pytest.param(
        ["task=i2v", "task.image='caf\udce9.png'"], r"task.image=caf\udce9.png", "in UTF-8", id="a path without"
    ),
    pytest.param(["task.sound=null"], "task.sound is given null", "task.sound=true", id="null"),
    pytest.param(["sampler.seed=null"], "sampler.seed is given null", "sampler.seed=0", id="null for a number"),
    pytest.param(["task.controls=x"], "task.controls is given x", "task.controls.KEY=VALUE", id="text for a node"),
    pytest.param(
        ["task.condition_latent_frames=[null]"],
        "task.condition_latent_frames[0]",
        "task.condition_latent_frames=[...]",
        id="null in a list",
    ),
    pytest.param(
        ["model=toy_random", "model.transformer.num_attention_heads=1"],
        "model.transformer.num_attention_heads=1 with",
        "model.transformer.num_attention_heads=4",
        id="heads that share no keys evenly",
    ),
    pytest.param(["topology.cp=${model}"], "topology.cp refers to", "topology.cp=[1]", id="a node for a list"),
    pytest.param(["task.controls=${task.fps}"], "task.controls refers to 24", "no task.controls", id="for a node"),
    pytest.param(
        ["task.background=[${task.prompt},0,0]"],
        "task.background[0] cannot be resolved",
        "--cfg job",
        id="a text in a list of numbers",
    ),
    pytest.param(["task={}"], "task={} sets nothing", "task.KEY=VALUE", id="no keys"),
    pytest.param(["vae.decode={}"], "vae.decode={} sets nothing", "vae.decode.KEY=VALUE", id="no settings"),
    pytest.param(["task={controls: {}}"], "sets nothing", "task.controls.KEY=VALUE", id="no keys in a node"),
    pytest.param(["extras={}"], "extras={} sets nothing", "extras.KEY=VALUE", id="no keys of one's own"),
    pytest.param(["task.prompt=true"], "set the text True", """'task.prompt="true"'""", id="truth for a text"),
    pytest.param(["task.prompt=1e3"], "set the text 1000.0", """'task.prompt="1e3"'""", id="number for a text"),
    pytest.param(["++task.prompt=NaN"], "set the text nan", """'++task.prompt="NaN"'""", id="nan for a text"),
    pytest.param(["hydra.run.dir=2026_12"], "the text 202612", """dir="2026_12"'""", id="number for a folder"),
    pytest.param(
        ["model.lora=[{path: 1_0, weight: 1_0}]"],
        "set the text 10",
        """'model.lora=[{path:"1_0", weight:"1_0"}]'""",
        id="number for a text in a list",
    ),
    pytest.param(
        ["task.prompt=null"], "task.prompt is given null", """'task.prompt="null"'""", id="null for text"
    ),
    pytest.param(["task=[]"], "task=[] chooses no option", "task=NAME", id="no option"),
    pytest.param(["output.latents=7"], "output.latents=7", "output.latents=true", id="number for a bool"),
    pytest.param(
        ["task.controls.canny=x.mp4"],
        "task.controls.canny",
        "the keys of task.controls are: blur, depth, edge, seg, wsm",
        id="nothing near",
    ),
    pytest.param(["taks.prompt=x"], "taks.prompt", "did you mean task.prompt?", id="misspelt node"),
    pytest.param(["task.fps=nan"], "task.fps=nan is no finite number", "task.fps=1", id="nan"),
    pytest.param(
        ["topology.accelerator.memory_gb=inf"],
        "memory_gb=inf is no finite number",
        "topology.accelerator.memory_gb=1000000",
        id="infinite",
    ),
    pytest.param(["task.num_frames=4000000001"], "task.num_frames", "task.num_frames=100001", id="frames"),
    pytest.param(["task.height=1600000"], "task.height", "task.height=16384", id="pixels"),
    pytest.param(
        ["topology.nodes=4096", "topology.ranks_per_node=1024"], "4194304 ranks", "topology.nodes=1", id="ranks"
    ),
    pytest.param(
        ["model=toy_random", "model.vae.num_res_blocks=100000000"],
        "model.vae.num_res_blocks",
        "model.vae.num_res_blocks=64",
        id="blocks",
    ),
    pytest.param(
        ["model=toy_random", "model.vae.dim_mult=[]"],
        "model.vae.dim_mult=[] has 0 values",
        "1 to 8 values",
        id="no levels",
    ),
    pytest.param(
        ["model=toy_random", "model.vae.scale_factor_spatial=8"],
        "model.vae.scale_factor_spatial=8",
        "model.vae.scale_factor_spatial=16",
        id="factor of other levels",
    ),
    pytest.param(
        ["model.trained.tiers=[{sizes:[wide],min_frames:1,max_frames:3}]"],
        "model.trained.tiers[0].sizes[0]=wide",
        "[1280x720]",
        id="size in a list",
    ),
    pytest.param(
        ["model.lora=[{path:a,weight:nan}]"], "model.lora[0].weight=nan", "model.lora[0]", id="nan in a list"
    ),
    pytest.param(
        ["sampler.steps=200", "sampler.flow_shift=10"],
        "sampler.steps=200 with sampler.flow_shift=10.0",
        "sampler.steps=100",
        id="steps at one timestep",
    ),
    pytest.param(["task.modality=smell"], "task.modality", "video", id="unknown choice"),
    pytest.param(["model=suepr"], "model=suepr", "did you mean model=super?", id="unknown option"),
    pytest.param(["vae/decode=layerpipeline"], "vae/decode", "layer_pipeline", id="unknown strategy"),
    pytest.param(["vae/decode=replicated"], "vae/decode=replicated", "vae=replicated", id="reference as strategy"),
    pytest.param(
        ["vae.encode._target_=cosmos3_plugins.replicated.Replicated"],
        "vae.encode._target_",
        "vae.parallel_encode=false",
        id="target of the reference",
    ),
    pytest.param(
        ["vae=diffusers", "vae.parallel_decode=true"],
        "vae.kernels=diffusers with vae.parallel_decode=true",
        "vae=diffusers, or vae.kernels=own",
        id="kernels of diffusers, divided",
    ),
    pytest.param(
        ["vae=diffusers", "vae.required_exactness=bitwise"],
        "vae.kernels=diffusers is rounding with vae.required_exactness=bitwise",
        "vae.kernels=own",
        id="kernels of diffusers, bitwise",
    ),
    pytest.param(
        ["vae=diffusers", "job=rehearse"],
        "vae.kernels=diffusers with job=rehearse",
        "vae=replicated",
        id="kernels of diffusers, rehearsed",
    ),
    pytest.param(["experiment=none_such"], "experiment=none_such", "sglang_27037", id="unknown experiment"),
    pytest.param(["+task.zoom=2"], "unknown key task.zoom", "task", id="added key"),
    pytest.param(["++sampler.sed=2"], "unknown key sampler.sed", "did you mean sampler.seed?", id="forced key"),
    pytest.param(["+extra.node=2"], "unknown key extra.node", "did you mean extras.node?", id="added node"),
    pytest.param(["+vae.decode.depth=2"], "unknown key vae.decode.depth", "", id="added strategy key"),
    pytest.param(
        ["vae.decode.op_second=x"], "vae.decode.op_second", "mean vae.decode.op_seconds?", id="misspelt setting"
    ),
    pytest.param(
        ["vae/decode=spatial_shard", "vae.decode.op_seconds=x"],
        "vae.decode.op_seconds",
        "vae/decode=layer_pipeline beside it",
        id="another's setting",
    ),
    pytest.param(
        ["vae/decode=none_such", "vae.decode.op_second=x"],
        "vae/decode",
        "layer_pipeline",
        id="unknown, with a setting",
    ),
    pytest.param(["vae=[replicated,parallel_decode]"], "2 options", "-m vae=", id="list of options"),
    pytest.param(["vae=replicated", "vae=parallel_decode"], "chosen twice", "vae=replicated", id="option twice"),
    pytest.param(["task.fps=1000"], "task.fps=1000", "task.fps=120", id="above the range"),
    pytest.param(["sampler.steps=0"], "sampler.steps=0", "sampler.steps=1", id="below the range"),
    pytest.param(["sampler.seed=-1"], "sampler.seed=-1", "sampler.seed=0", id="negative seed"),
    pytest.param(["topology.cfg=3"], "topology.cfg=3", "topology.cfg=2", id="three guidance passes"),
    pytest.param(["~task.fps"], "task.fps", "task.fps=", id="deleted key"),
    pytest.param(["nonsense"], "nonsense", "key=value", id="not an override"),
    pytest.param(["task.prompt=a, b"], "task.prompt", "'task.prompt=\"a, b\"'", id="comma in a text"),
    pytest.param(["vae.decode._target_=os.system"], "os.system", "layer_pipeline", id="foreign strategy target"),
    pytest.param(["stages.text._target_=os.system"], "stages.text._target_", "", id="target of a stage"),
    pytest.param(["stages.denoise.steps=3"], "stages.denoise.steps", "mean sampler.steps?", id="steps of a stage"),
    pytest.param(["stages.export.crf=200"], "stages.export.crf", "mean output.crf?", id="crf of a stage"),
    pytest.param(["stages.text.prompt="], "stages.text.prompt", "mean task.prompt?", id="prompt of a stage"),
    pytest.param(["stages.export.latents=true"], "stages.export.latents", "mean output.latents", id="two mean it"),
    pytest.param(["+stages.decode.foo=1"], "unknown key stages.decode.foo", "", id="argument of a stage"),
    pytest.param(["stages=standard"], "stages=standard", "", id="group of the stages"),
    pytest.param(["+task.foo._target_=os.system"], "task.foo._target_=os.system", NAMES, id="target in a section"),
    pytest.param(["+foo._target_=os.system"], "foo._target_=os.system", NAMES, id="target in a new node"),
    pytest.param(["+_target_=os.system"], "_target_=os.system", NAMES, id="target of all"),
    pytest.param(["+vae._target_=os.system"], "vae._target_=os.system", NAMES, id="target of the VAE"),
    pytest.param(
        ["+vae.decode.foo._target_=os.system"],
        "vae.decode.foo._target_=os",
        NAMES,
        id="target in a setting",
    ),
    pytest.param(
        ["+vae.encode.foo=[1,{_target_: os.system}]"], "vae.encode.foo.1._target_=os", NAMES, id="target in a list"
    ),
    pytest.param(
        ["+task.foo={_target_: torch.load, f: x}"], "task.foo._target_=torch.load", NAMES, id="target in a dict"
    ),
    pytest.param(
        ["model.trained.tiers=[{_target_: x}]"],
        "model.trained.tiers[...]._target_",
        "",
        id="target in a list of nodes",
    ),
    pytest.param(["model.trained.tiers=[{sizes: [64x64]}]"], "tiers[0].min_frames", "", id="half a list item"),
    pytest.param(["vae.decode.op_seconds=${no.such}"], "vae.decode.op_seconds cannot", "", id="lost reference"),
    pytest.param(["vae.decode=null"], "vae.decode", "layer_pipeline", id="no strategy"),
    pytest.param(
        ["topology.dp=3", "topology.ranks_per_node=2", "vae=parallel_decode"], "2 ranks", "=3", id="ranks too few"
    ),
    pytest.param(["task.last_image=README.md"], "task=t2v", "task=flf2v", id="last photograph that nothing reads"),
    pytest.param(
        ["task=flf2v", "task.condition_latent_frames=[0]"], "task=flf2v", "[0, -1]", id="flf2v of other frames"
    ),
    pytest.param(["task.image=launch.py"], "task=t2v", "task=i2v", id="image that nothing reads"),
    pytest.param(["task.prompt="], "task.prompt is empty", "task.prompt=", id="empty prompt"),
    pytest.param(["task.height=100"], "task.height=100", "task.height=96", id="height off the grid"),
    pytest.param(["task.width=1279"], "task.width=1279", "task.width=1280", id="width off the grid"),
    pytest.param(["task.num_frames=18"], "4k + 1", "task.num_frames=17", id="frames off the grid"),
    pytest.param(["task.num_frames=1"], "task.num_frames=1", "task=t2i", id="video of one frame"),
    pytest.param(["task=t2i", "task.num_frames=5"], "task=t2i", "task.num_frames=1", id="image of five frames"),
    pytest.param(["task.condition_latent_frames=[0]"], "condition_latent_frames", "[]", id="t2v conditioned"),
    pytest.param(["topology.cfg=2"], "1 ranks", "topology.ranks_per_node=2", id="axes over too few ranks"),
    pytest.param(["model=nano", "model.path=no/such/one"], "no/such/one", "model.path=", id="missing folder"),
    pytest.param(["model.path=conf"], "model_index.json", "model_index.json", id="not a checkpoint"),
    pytest.param(["output.preset=slwo"], "output.preset=slwo", "did you mean slow?", id="unknown codec preset"),
]


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("task.height=true", "that is a truth value, and task.height is a whole number from 16 to 16384"),
        ("task.fps={a:1}", "that is a node with keys, and task.fps is a number from 1 to 120"),
        ("task.height=1.5", "that is a number with a fraction, and task.height is a whole"),
        ("task={height:tall}", "that is a text, and task.height is a whole"),
        ("task.prompt=[1]", "that is a list, and task.prompt is a text"),
        ("task.fps=null", "why:   task.fps is a number from 1 to 120"),
        ("topology.device=tpu", "why:   topology.device is one of cpu, cuda"),
        ("topology.device=[]", "that is a list, and topology.device is one of cpu, cuda"),
        ("model.lora=1.5", "that is a number with a fraction, and model.lora is a list, of which each"),
    ],
)
def test_a_value_of_another_type_is_told_by_both_types(typed: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([typed])
    assert why in str(caught.value)


REFUSED_AT_THE_START = [
    pytest.param(["model=nano"], "model.path is not set", "nvidia/Cosmos3-Nano", id="no weights"),
    pytest.param(
        ["task=flf2v", "task.image=README.md"],
        "task.last_image is not set",
        "last.jpg",
        id="flf2v without its end",
    ),
    pytest.param(["task=i2v"], "task.image is not set", "task.image=", id="i2v without image"),
    pytest.param(["task=v2v"], "task.video is not set", "task.video=", id="v2v without video"),
    pytest.param(["task=i2v", "task.image=no.jpg"], "no.jpg", "file", id="missing photograph"),
    pytest.param(["task.prompt=@no.txt"], "no.txt", "file", id="missing prompt file"),
    pytest.param(["task=i2v", "task.image=/dev/null"], "/dev/null is no regular file", "a file", id="a device"),
    pytest.param(["task=i2v", "task.image=conf"], "conf is a folder", "a file", id="a folder"),
    pytest.param(["topology.nodes=2"], "without torchrun", "torchrun --nnodes 2", id="two nodes from one machine"),
]


@pytest.mark.sampled(30)
@pytest.mark.long
@pytest.mark.parametrize(("overrides", "what", "works"), REFUSALS)
def test_refused_in_three_parts(overrides: list[str], what: str, works: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    text = str(caught.value)
    assert what in text
    assert works in text
    for problem in caught.value.problems:
        assert problem.what and problem.why and problem.works


@pytest.mark.parametrize(("overrides", "what", "works"), REFUSED_AT_THE_START)
def test_a_plan_needs_no_inputs_but_a_run_does(overrides: list[str], what: str, works: str) -> None:
    compose(overrides)
    with pytest.raises(ConfigError) as caught:
        prepare(composition_of(overrides))
    assert what in str(caught.value)
    assert works in str(caught.value)


def test_a_fraction_is_in_range() -> None:
    assert compose(["sampler.guidance_scale=6.5", "task.fps=23.976"]).sampler.guidance_scale == 6.5


@pytest.mark.parametrize("text", ["42", "-1.5", "True", "yes", "off", "0x10", "007", "1e3x"])
def test_an_unquoted_text_arrives_as_typed(text: str) -> None:
    assert compose([f"task.prompt={text}"]).task.prompt == text


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["task.height=100", "task.num_frames=18", "topology.cfg=2", "output.preset=slwo"])
    assert len(caught.value.problems) == 4


@pytest.mark.long
def test_composing_and_refusing_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from cosmos3_pipeline import compose\n"
        "for overrides in [], ['vae=parallel_decode', 'topology=cpu_x4'], ['task.height=100']:\n"
        "    try: compose(overrides)\n"
        "    except ValueError: print('refused')\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'av', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
