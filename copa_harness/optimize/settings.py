"""Everything one optimization is configured with, in one record. Knows no meaning of it; see `COPA`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from copa_harness.optimize.proposals import ProposalSettings
from copa_harness.optimize.trials import SearchSettings
from copa_harness.optimize.weights import WeightsSettings


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything an optimization is configured with; see `COPA` for the meanings."""

    seed: int
    threads: int
    max_cycles: int
    epsilon: float
    search: SearchSettings
    proposals: ProposalSettings
    weights: WeightsSettings
    n_checkpoints: int = 1
    adoption_p: float = 0.2
    optimizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
