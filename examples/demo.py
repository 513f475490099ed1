# %% [markdown]
# # Train the demo and look into it
#
# The bundled model draws colored shapes on 32 x 32 pixels. G2RPO trains it on the CPU. The reward
# is `oracle`, an exact check of the prompt. Open this file as a notebook, or run it with Python.

# %%
from flowgrain import Trainer, load_config, load_run

STEPS = 10
config = load_config("demo", {"training.max_steps": STEPS, "evaluation.num_prompts": 32})
trainer = Trainer(config, "runs/example-demo")
trainer.train(lambda metrics: print(f"step {metrics['step']}: {metrics['reward/oracle']:.3f}"))

# %% [markdown]
# `trainer.history` has one column per metric. `pandas.DataFrame(trainer.history)` makes a table.

# %%
history = trainer.history
print("held-out oracle:", history["eval/oracle"][0], "->", history["eval/oracle"][-1])
history

# %% [markdown]
# The run recorded the groups of its training steps: the images that were compared with each other,
# their rewards, and the advantages of the trained steps that lead to them.

# %%
group = load_run("runs/example-demo").groups[1]
group

# %%
table = group.table(0)
best = max(table["place"], key=lambda place: table["reward/oracle"][place])
print("prompt:", group.prompts[0].text)
print("best image:", best, "with oracle", table["reward/oracle"][best])
group.image(0, best).resize((256, 256), 0)

# %% [markdown]
# Images of new prompts, with the trained parameters:

# %%
images = trainer.sample(["three green circles", "red square left of blue circle"])
print(tuple(images.shape))
