# %% [markdown]
# # Continue a photograph
# Any picture file can be used. Here the picture is made from words. The words for the video say what moves where.

# %%
from cosmos3_pipeline import run

words = "A blue square moves left over a yellow background."
photo = run(["task=t2i", f"task.prompt='{words}'", "task.height=96", "task.width=160"]).picture

# %%
made = run(["task=i2v", f"task.image={photo}", f"task.prompt='{words}'"])
print(made.picture)
