# %% [markdown]
# # Words to an image
# The image shows the scene at half time of its motion.

# %%
from cosmos3_pipeline import run

made = run(["task=t2i", "task.prompt='A small white circle moves right over a green background at night.'"])
print(made.picture)
