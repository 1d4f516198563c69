"""A training step as a graph of kernels: recorded once, replayed at the cost of one launch."""

from __future__ import annotations

from typing import Any

import torch


class Replayed:
    """A bundle whose steps are replayed on a stream of its own (CUDA)."""

    def __init__(self, bundle: Any, warm: int = 3) -> None:
        self.bundle, self.stream, self.done = bundle, torch.cuda.Stream(bundle.device), 0
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(bundle.generator)
        self.warm = warm
        torch.cuda.synchronize(bundle.device)

    def step(self) -> None:
        if self.done < self.warm:  # libraries set themselves up, gradients and moments get their memory
            with torch.cuda.stream(self.stream):
                self.bundle.step()
        elif self.done == self.warm:
            torch.cuda.synchronize(self.stream.device)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.bundle.step()
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        self.done += 1

    def wait(self) -> None:
        """Until all steps are done."""
        self.stream.synchronize()
