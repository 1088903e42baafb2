# %% [markdown]
# # From one photograph to another
# The first frame and the last frame are given. Here both come from the frames of a clip.

# %%
from cosmos3_pipeline import run
from cosmos3_pipeline.stages.media import read_frames

words = "A blue square moves left over a yellow background."
made = run(["task=t2v", f"task.prompt='{words}'"])
frames, _ = read_frames(made.picture, frames=17)
first, last = (made.picture.with_name(f"{name}.png") for name in ("first", "last"))
frames[0].save(first)
frames[-1].save(last)

# %%
given = [f"task.image={first}", f"task.last_image={last}"]
print(run(["task=flf2v", *given, f"task.prompt='{words}'"]).picture)
