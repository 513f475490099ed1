# %% [markdown]
# # Read a run
#
# `load_run` reads the directory of a run, also while it is trained. It does not import torch.

# %%
from pathlib import Path

import numpy as np
from PIL import Image

from flowgrain import Trainer, load_config, load_run

STEPS = 10
changes = {"training.max_steps": STEPS, "evaluation.every": 5, "evaluation.num_prompts": 24}
if not Path("runs/example-read").exists():  # something to read
    Trainer(load_config("demo", changes), "runs/example-read").train()

# %%
run = load_run("runs/example-read")
print(run.name, run.status, run.method, run.rewards)
run

# %% [markdown]
# ## Metrics
#
# Columns of `metrics.jsonl`, NaN where a step has no such value.

# %%
history = run.history
steps, rewards = np.array(history["step"]), np.array(history["reward/oracle"])
print("rewards of the rollouts:", dict(zip(steps[1:].tolist(), rewards[1:].round(3), strict=True)))

# %% [markdown]
# ## Evaluations
#
# All evaluations have the same prompts and the same noise, so differences are paired.

# %%
first, last = run.evaluations[0], run.evaluations[-1]
difference = np.array(last.scores["oracle"]) - np.array(first.scores["oracle"])
print(f"mean difference {difference.mean():+.3f} on {len(difference)} prompts")
place = int(np.argmax(difference))
print("largest gain:", last.prompts[place])
pair = np.concatenate([np.asarray(e.image(place)) for e in (first, last)], axis=1)
Image.fromarray(pair).resize((512, 256), 0)

# %% [markdown]
# ## Groups
#
# The tree of a prompt is a table: `parent` leads to the row above, `leaves` are the rows with an
# image, `edges` the trained rows. `credited_leaves` are the images that count for a trained row.

# %%
group = run.groups[run.groups.steps[-1]]
tree, prompt = group.tree, group.prompts[0]
edge = tree.edges[int(np.argmax(prompt.advantage))]
places = [tree.leaves.index(leaf) for leaf in tree.credited_leaves[edge]]
print(f"best trained step: row {edge}, grid step {tree.grid_index[tree.parent[edge]]}")
print("rewards of its images:", [prompt.rewards["oracle"][place] for place in places])
