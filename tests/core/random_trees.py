"""Random trees for hypothesis."""

from hypothesis import strategies as st

from flowgrain.core.tree import Planner, Tree


@st.composite
def trees(draw) -> Tree:
    """Trees of 1 to 3 prompts with stochastic, merged, ODE, coarse and second-order steps."""
    planner = Planner(draw(st.integers(2, 7)))
    grid = draw(st.sampled_from(["stride", "exact"]))
    nodes = [(planner.root(), 0) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(0, 8))):
        node, index = draw(st.sampled_from(nodes))
        if index >= planner.num_steps - 1:
            continue
        if draw(st.booleans()):
            length = draw(st.integers(1, planner.num_steps - 1 - index))
            children = planner.sde(node, draw(st.integers(1, 3)), length=length)
            nodes += [(child, index + length) for child in children]
        else:
            nodes.append((planner.ode(node, to=index + 1), index + 1))
    for node, _ in nodes:
        stride, order = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        leaf = planner.ode(node, stride=stride, order=order, grid=grid)
        planner.image(leaf, draw(st.integers(0, 1)))
    return planner.tree().repeat(draw(st.integers(1, 3)))
