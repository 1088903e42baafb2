# %% [markdown]
# # Continue a clip
# The first frames of a clip stay, and new frames follow them. `task.condition_latent_frames=[0,1]` keeps five
# frames: the first latent frame is one frame, and each later one is four. `task.condition_keep=last` continues the
# clip's end.

# %%
from cosmos3_pipeline import run

words = "A green circle moves down over a white background."
clip = run(["task=t2v", f"task.prompt='{words}'"]).picture

# %%
made = run(["task=v2v", f"task.video={clip}", f"task.prompt='{words}'"])
print(made.picture)
