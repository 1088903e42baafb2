# %% [markdown]
# # A clip goes on
# The first frames of a clip stay, the rest is made anew: `task.condition_latent_frames=[0,1]` keeps five frames (a
# latent frame is one frame at the beginning, then four). `task.condition_keep=last` takes the end of the clip.

# %%
from cosmos3_pipeline import run

words = "A green circle moves down over a white background."
clip = run(["task=t2v", f"task.prompt='{words}'"]).picture

# %%
made = run(["task=v2v", f"task.video={clip}", f"task.prompt='{words}'"])
print(made.picture)
