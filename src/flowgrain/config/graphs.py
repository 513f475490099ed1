"""Check that the graphs of a rollout can be used by the update: training.graph_memory."""

from flowgrain.config.sections import TrainingConfig
from flowgrain.methods import Method, PolicyGradient


def check_graph_memory(training: TrainingConfig, method: Method, model: str) -> None:
    """Check that the update evaluates rows of the rollout with the parameters that sampled.

    Args:
        training: settings with graph_memory.
        method: training method.
        model: name of the backbone.

    Raises:
        ValueError: a graph cannot be reused, or its memory is not known.
    """
    if not training.graph_memory:
        return
    memory = training.graph_memory
    given = f"training.graph_memory={memory if memory == 'all' else format(memory, 'g')}"
    if not isinstance(method, PolicyGradient):
        raise ValueError(
            f"{given}: method {method.name!r} does not train the steps of its rollout, so the "
            "update repeats no forward pass of it. Use training.graph_memory=0."
        )
    if method.updates_per_rollout != 1:
        raise ValueError(
            f"{given}: with method.updates_per_rollout={method.updates_per_rollout}, the first "
            "update changes the parameters, and the graphs of the rollout become invalid. Use "
            "method.updates_per_rollout=1, or training.graph_memory=0."
        )
    if memory != "all" and model == "zimage":
        raise ValueError(
            f"{given}: prompts of model.name=zimage have different lengths, so the memory of a row "
            "is not known. Use training.graph_memory=all, or 0."
        )
