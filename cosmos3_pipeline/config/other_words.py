"""Words of other tools and habits for keys and values of ours. `mistakes` reads command lines with them."""

from __future__ import annotations

FOLDER = "hydra.run.dir"  # the key of a run's folder
# Names of other tools for a key of ours, in lower case with underscores.
OTHER_NAMES = {
    **dict.fromkeys(("num_inference_steps", "inference_steps", "num_steps", "n_steps"), "sampler.steps"),
    **dict.fromkeys(("cfg_scale", "guidance", "scale"), "sampler.guidance_scale"),
    **dict.fromkeys(("shift", "flowshift"), "sampler.flow_shift"),
    **dict.fromkeys(("frames", "n_frames", "video_length", "duration", "seconds"), "task.num_frames"),
    **dict.fromkeys(("frame_rate", "framerate", "frames_per_second"), "task.fps"),
    **dict.fromkeys(("size", "resolution"), "task.height"),
    **dict.fromkeys(
        ("gpus", "num_gpus", "n_gpus", "devices", "num_devices", "ranks", "topology.ranks", "nproc_per_node"),
        "topology.ranks_per_node",
    ),
    **dict.fromkeys(("nnodes", "num_nodes"), "topology.nodes"),
    **dict.fromkeys(("data_parallel_size", "dp_size"), "topology.dp"),
    **dict.fromkeys(("cfg_degree", "cfg_parallel_size"), "topology.cfg"),
    **dict.fromkeys(
        ("ulysses_degree", "ulysses_size", "tensor_parallel_size", "tp", "sequence_parallel_size", "sp_size"),
        "topology.ulysses",
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "precision"), "model.dtype"),
    **dict.fromkeys(("codec", "vcodec", "video_codec"), "output.encoder"),
    **dict.fromkeys(("audio", "generate_audio", "enable_sound"), "task.sound"),
    **{"quality": "output.crf", "output.wav": "output.sound"},
    **dict.fromkeys(("scheduler", "solver"), "sampler"),
    **dict.fromkeys(("mode", "task_type"), "task"),
    **dict.fromkeys(("ckpt", "checkpoint", "model_path", "checkpoint_path", "model_id"), "model.path"),
    **dict.fromkeys(
        (
            "output_dir",
            "output_path",
            "output_file",
            "filename",
            "o",
            "out",
            "outdir",
            "save_path",
            "output.path",
            "output.dir",
        ),
        FOLDER,
    ),
}
# Names of other tools for an option or a value of ours.
OTHER_VALUES = {
    **dict.fromkeys(("bf16", "half", "float16", "fp16"), "bfloat16"),
    **dict.fromkeys(("fp32", "float", "full"), "float32"),
    **dict.fromkeys(
        ("offload", "cpu_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "cpu", "low_vram"),
        "streamed",
    ),
    **dict.fromkeys(("gpu",), "cuda"),
    **dict.fromkeys(("nvenc",), "h264_nvenc"),
    **dict.fromkeys(("h264", "x264", "avc"), "libx264"),
    **dict.fromkeys(("fsdp",), "sharded"),
    **dict.fromkeys(("tiling", "enable_tiling", "vae_tiling", "enable_vae_tiling"), "tiled"),
    **dict.fromkeys(("parallel_vae", "use_parallel_vae", "parallel_vae_decode"), "parallel"),
    **dict.fromkeys(("euler", "ddim", "ddpm", "dpm++", "dpmsolver++", "flow_match_euler"), "unipc"),
    **dict.fromkeys(("text2video", "text_to_video", "txt2vid", "video"), "t2v"),
    **dict.fromkeys(("image2video", "image_to_video", "img2vid"), "i2v"),
    **dict.fromkeys(("video2video", "video_to_video", "vid2vid"), "v2v"),
    **dict.fromkeys(("text2image", "text_to_image", "txt2img", "image", "picture"), "t2i"),
    **dict.fromkeys(("dryrun", "dry_run"), "plan"),
}
# A word alone that means a flag, a job, or nothing.
ALONE = {
    **{"help": ("--help",), "run": ("job=generate",), "sweep": ("-m",), "multirun": ("-m",)},
    **dict.fromkeys(("python", "launch.py", "cosmos3"), ()),
}
# A file alone is the input of this key.
FILES = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "task.image"),
    **dict.fromkeys((".mp4", ".mov", ".webm", ".mkv"), "task.video"),
    **dict.fromkeys((".txt", ".jsonl"), "task.prompt_file"),
}
# The sizes that the names of a resolution mean, as width x height.
SIZES = {"480p": "832x480", "720p": "1280x720"}
