"""What each part of G2RPO and DenseGRPO is worth on the bundled model, at the full comparison's budget and seeds.

    flowgrain compare ablations --jobs 2

"g2rpo {1} G=20" spends on more noise samples what {1,2,3} with G=12 spends on granularities: the same units a rollout within 2%.
"""

from typing import Any

from flowgrain.studies.comparisons import full

_G2RPO, _DENSE = full.METHODS["g2rpo"], full.METHODS["densegrpo"]
_UNIFORM = {key: value for key, value in _DENSE.items() if key != "psi"} | {"noise": "flow_sde", "calibration_rounds": 0}


def comparison() -> dict[str, Any]:
    """Variants of two methods."""
    return {
        **full.comparison(),
        "name": "ablations",
        "methods": {
            "g2rpo": {"method": "g2rpo", **_G2RPO},
            "g2rpo {1}": {"method": "g2rpo", **_G2RPO, "granularities": 1},
            "g2rpo {1,2}": {"method": "g2rpo", **_G2RPO, "granularities": "1,2"},
            "g2rpo {1} G=20": {"method": "g2rpo", **_G2RPO, "granularities": 1, "group_size": 20},
            "g2rpo all steps": {"method": "g2rpo", **_G2RPO, "sde_steps": "0,1,2,3,4,5,6"},
            "densegrpo": {"method": "densegrpo", **_DENSE},
            "densegrpo uniform": {"method": "densegrpo", **_UNIFORM},
            "densegrpo R of the next state": {"method": "densegrpo", **_DENSE, "dense_reward": "state"},
            "densegrpo n=2": {"method": "densegrpo", **_DENSE, "look_steps": 2},
            "densegrpo n=1": {"method": "densegrpo", **_DENSE, "look_steps": 1},
            "densegrpo first half": {"method": "densegrpo", **_DENSE, "sde_steps": "0,1,2,3"},
        },
        "rewards": {"towers": "towers"},
        "baselines": {f"densegrpo {part}": "densegrpo" for part in ("uniform", "R of the next state", "n=2", "n=1", "first half")},
    }
