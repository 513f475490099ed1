# %% [markdown]
# # Train on your own reward
#
# A reward is a function of images and prompts. It returns one number per image.

# %%
from flowgrain import Trainer, load_config

STEPS = 10


def blueness(images, prompts):
    """How much bluer than red and green an image [3, H, W] in 0..1 is on average."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return blue - (red + green) / 2


# %% [markdown]
# `rewards` replaces the rewards of the configuration. The trained reward is also evaluated on
# held-out prompts, before the first step and after the last one.

# %%
changes = {"training.max_steps": STEPS, "evaluation.num_prompts": 32, "evaluation.rewards": []}
config = load_config("demo", changes)
trainer = Trainer(config, "runs/example-own-reward", rewards={"blueness": blueness})
trainer.train()
before, after = (trainer.history["eval/blueness"][place] for place in (0, -1))
print(f"held-out blueness: {before:.3f} -> {after:.3f}")

# %% [markdown]
# A model that only becomes bluer has learned to exploit the reward. Rewards that are not trained
# show what it has lost: add them to `evaluation.rewards`, and look at the recorded groups.

# %%
scores = trainer.evaluate(num_images=8).means()
print(scores)
