# %% [markdown]
# # Follow edges
# The edges say where the shape is, and the words say which colours it has. OpenCV makes the edges of a clip
# (`pip install 'cosmos3-pipeline[transfer]'`). A clip of edges may also be a file: `task.controls.edge=edges.mp4`.

# %%
from cosmos3_pipeline import run

clip = run(["task=t2v", "task.prompt='A red circle moves right over a white background.'"]).picture

# %%
words = "A green circle moves right over a black background."
edges = [f"task.video={clip}", "task.controls.edge=from_video", "output.control=true"]
made = run(["task=transfer", *edges, f"task.prompt='{words}'"])
print(made.picture)
