# %% [markdown]
# # Words to an image
# An image is a still of the scene, half way.

# %%
from cosmos3_pipeline import run

made = run(["task=t2i", "task.prompt='A small white circle moves right over a green background at night.'"])
print(made.picture)
