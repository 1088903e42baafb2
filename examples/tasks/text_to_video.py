# %% [markdown]
# # Words to a video
# The toy model knows red, green, blue, yellow, white, purple, orange and black circles, squares and triangles,
# small or large, that move left, right, up or down over a background, by day or at night. Change the words!

# %%
from cosmos3_pipeline import plan, run

prompt = "A large yellow triangle moves up over a purple background."
asked = ["task=t2v", f"task.prompt='{prompt}'"]

# %% The plan of the run: time, memory and messages, before it starts.
print(plan(asked))

# %%
made = run(asked)
print(made.picture)

# %% Another seed makes another clip of the same words. Guidance says how closely the clip follows the words.
for seed in (1, 2):
    print(run([*asked, f"sampler.seed={seed}", "sampler.guidance_scale=2"]).picture)

# %% Two ranks share the two guidance passes and the decode. The frames are the same up to rounding.
made = run([*asked, "topology=cpu_x2"])
print(made.metrics["seconds"], made.metrics["vae"]["decode"]["strategy"])
