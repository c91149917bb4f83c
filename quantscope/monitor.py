"""Who watches a study while it runs: told the plan, each step and the figures so far.  This one watches nothing; the CLI draws bars."""

from __future__ import annotations

from collections.abc import Mapping


class Monitor:
    """Override what is of interest.  Calls come from one thread, in the order of the work."""

    def note(self, text: str) -> None:
        """Something to know before the work begins: the plan, what is resumed."""

    def begin(self, stage: str, n_steps: int, n_tokens: int) -> None:
        """A stage ("prompt", "text") of ``n_steps`` equal steps, in which ``n_tokens`` tokens go through every variant."""

    def step(self, stage: str, done: int, what: str) -> None:
        """``done`` steps of the stage are done; ``what``: where it is, "batch 1/4, layer 7/22"."""

    def scores(self, kl_nats: Mapping[str, float]) -> None:
        """Mean KL divergence of each variant over the batches so far."""


SILENT = Monitor()
