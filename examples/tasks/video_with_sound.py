# %% [markdown]
# # A video with sound
# The toy's sound is a tone for each shape. A higher shape has a higher tone. The first shape of the words is heard
# on the left, the second on the right, and one alone on both sides.

# %%
from cosmos3_pipeline import run

words = "A red circle moves up over a blue background."
made = run(["task=t2v", "task.sound=true", "output.sound=true", f"task.prompt='{words}'"])
print(made.picture, made.metrics["sound"])
