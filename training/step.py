"""A training step: the loss and its gradients, compiled by the block, replayed as a CUDA graph.

step = Step(net, objective, compile=True, cuda_graphs=True)
terms = step(sample)            loss and metrics
step.backward(terms.loss)       gradients in p.grad, added to those that are there (``accumulate``)

Compiled by the block: all blocks of a network share one compiled graph, so that the first step
takes as long for 28 blocks as for one. A CUDA graph holds everything between sample and gradients,
what the processes of a run send each other too: a step is one launch, and Python no longer keeps
the GPU waiting. The first step of a kind (shapes, dtypes and options of the sample) runs eagerly,
the second one is recorded and replayed, with the same kernels in the same order.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from training import cuda_graphs
from training.distributed import SummedGradients
from training.half_weights import HalfWeights
from training.kernels.gelu_products import compile_ahead
from training.models.dit import DiT
from training.models.layers import Block, FinalLayer, Mlp
from training.objectives.objective import Objective, Terms
from training.objectives.teachers import AveragedTeacher
from training.sharding import is_sharded

KINDS = 4  # graphs kept; each has memory of its own


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]  # where the graph reads the sample
    terms: Terms  # where it leaves its results
    gradients: list[torch.Tensor | None]


class Step:
    """Loss and gradients of ``objective.loss(net, sample)``.

    Args:
        compile: compile the blocks of the network and of the objective's teachers.
        cuda_graphs: record forward and backward as one CUDA graph.
        fused: what stands between the products of a compiled block by kernels of ours (``kernels``)
            where the tangent is a constant.
        accumulate: of so many batches the gradients are averaged.
        exchange: makes gradients the means over all processes, inside of the graph.
        halves: what the network computes with, see ``half_weights``; None: its weights.
    """

    exchange: SummedGradients | None = None
    halves: HalfWeights | None = None

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        compile: bool = False,
        cuda_graphs: bool = False,
        fused: bool = True,
        accumulate: int = 1,
    ) -> None:
        self.net, self.objective = net, objective
        self.compile, self.cuda_graphs, self.accumulate = compile, cuda_graphs, accumulate
        self.fused = fused
        self.recorded: dict[Any, Recorded | None] = {}  # None: seen once
        self.pending: Recorded | None = None  # replayed, its gradients not handed over yet

    def prepare(self, dtype: torch.dtype | None = None) -> None:
        """Once, before the first step, when the objective's teachers are there. ``dtype``: of 16
        bits, in which the blocks compute, or None.
        """
        if self.compile:
            for module in (self.net, *teachers(self.objective)):
                compile_blocks(module, self.fused)
            if self.fused and dtype == torch.bfloat16:
                _compile_kernels(self.net)

    def halve(self, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None) -> None:
        """The network, of this process alone, computes with weights in 16 bits that the optimizer
        keeps, where it can. Gradients of a weight are added in float32: over batches, over passes
        of the network and where a tangent has one too. Teachers share the blocks' compiled code,
        whose weights are of one dtype.
        """
        taught = next(teachers(self.objective), None) is not None
        added = self.accumulate > 1 or not getattr(self.objective, "one_pass", False)
        wanted = self.compile and self.exchange is None and not (added or taught)
        self.halves = HalfWeights.of(self.net, optimizer, dtype) if wanted else None

    def __call__(self, sample: Any) -> Terms:
        if self.halves is not None:
            self.halves.refresh()
        if not self.cuda_graphs:
            return self._loss(sample)
        leaves, spec = tree_flatten(sample)
        kind = (spec, self.net.training, *(_kind(x) for x in leaves))
        if kind not in self.recorded:
            if len(self.recorded) == KINDS:
                rank_zero_info("CUDA graphs: too many kinds of steps, the oldest graph is dropped")
                self.recorded.pop(next(iter(self.recorded)))
            elif self.recorded:
                rank_zero_info("CUDA graphs: the sample has changed its shape; recording anew")
            self.recorded[kind] = None
            return self._loss(sample)
        recorded = self.recorded[kind]
        if recorded is None:
            recorded = self.recorded[kind] = self._record(leaves, spec)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        for static, given in zip(recorded.inputs, tensors, strict=True):
            static.copy_(given)
        recorded.graph.replay()
        self.pending = recorded
        # Whoever keeps the results keeps them beyond the next replay.
        results, where = tree_flatten(recorded.terms)
        return tree_unflatten([_copy(x) for x in results], where)

    def backward(self, loss: torch.Tensor) -> None:
        """``loss``: that of the terms returned last, divided by ``accumulate``."""
        recorded, self.pending = self.pending, None
        if recorded is not None:
            # The next replay writes there again.
            self._add(recorded.gradients, copied=self.accumulate > 1)
        elif self.exchange is None and self.halves is None:
            loss.backward()
        else:
            with self._halved(), self._alone() as gradients:
                self._differentiate(loss)
            self._add(gradients)

    def release(self) -> None:
        """Forget the graphs. What processes send each other in one keeps their connection open,
        and closing it waits for ever.
        """
        graphs = [recorded.graph for recorded in self.recorded.values() if recorded is not None]
        if graphs:
            torch.cuda.synchronize()
        for graph in graphs:
            graph.reset()  # an error's traceback may hold it
        self.recorded.clear()
        self.pending = None

    def _halved(self) -> AbstractContextManager[None]:
        return nullcontext() if self.halves is None else self.halves.instead()

    def _loss(self, sample: Any) -> Terms:
        with self._halved():
            return self.objective.loss(self.net, sample)

    def _differentiate(self, loss: torch.Tensor) -> None:
        """Gradients of this batch alone: a sum over the processes would add what is there again."""
        if self.exchange is None:
            loss.backward()
            return
        (loss / self.exchange.size).backward()
        self.exchange.wait()

    @contextmanager
    def _alone(self) -> Iterator[list[torch.Tensor | None]]:
        """The gradients of what runs inside, by the end of it; those that were there are there
        again afterwards.
        """
        parameters = list(self.net.parameters())
        before = [p.grad for p in parameters]
        found: list[torch.Tensor | None] = []
        for p in parameters:
            p.grad = None
        try:
            yield found
            found += [p.grad for p in parameters]
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient

    def _add(self, gradients: list[torch.Tensor | None], copied: bool = False) -> None:
        """To those that are there; where there is none, they are taken as they are or copied."""
        for p, gradient in zip(self.net.parameters(), gradients, strict=True):
            if gradient is None:
                continue
            if p.grad is gradient or (p.grad is not None and gradient.dtype != p.dtype):
                raise RuntimeError(
                    "p.grad has the gradients of the step before, where this step's are written;"
                    " call optimizer.zero_grad() after each step, or set accumulate to the number"
                    " of batches whose gradients are to be averaged"
                )
            if p.grad is not None:
                p.grad += gradient
            else:
                p.grad = gradient.clone() if copied else gradient

    def _record(self, leaves: list[Any], spec: Any) -> Recorded:
        static = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = cuda_graphs.new_graph()
        # Other threads (loaders, loggers) may use the device meanwhile.
        try:
            captured = torch.cuda.graph(graph, capture_error_mode="thread_local")
            with self._halved(), self._alone() as gradients, captured:
                terms = self.objective.loss(self.net, tree_unflatten(static, spec))
                self._differentiate(terms.loss / self.accumulate)
            cuda_graphs.finish(graph)
        except RuntimeError as error:
            graph.reset()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                "the step cannot be recorded as a CUDA graph, see the error above; use"
                " cuda_graphs=false"
            ) from error
        terms = terms._replace(loss=terms.loss.detach())
        inputs = [x for x in static if isinstance(x, torch.Tensor)]
        return Recorded(graph, inputs, terms, gradients)


def _kind(x: Any) -> Any:
    return (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) else x


def compile_blocks(net: nn.Module, fused: bool = False, **options: Any) -> None:
    """In place, and not in copies of the network: a copy is for samples, of any number."""
    options |= {"fullgraph": True, "dynamic": False}
    for module in net.modules():
        if is_sharded(module):  # its hooks gather weights, which is no part of a graph
            if isinstance(module, Block):
                module.forward = torch.compile(module.forward, **options)  # type: ignore[assignment]
        elif isinstance(module, Block | FinalLayer):
            module.compile(**options)
        if isinstance(module, DiT):
            module.fused = fused


def _compile_kernels(net: nn.Module) -> None:
    """Begins with those that take longest, all for bfloat16, beside the compiler of the blocks."""
    layers = (module.expand for module in net.modules() if isinstance(module, Mlp))
    kinds = {(x.in_features, x.out_features, x.bias is not None, x.weight.device) for x in layers}
    for kind in kinds:
        compile_ahead(*kind)


def teachers(objective: Objective) -> Iterator[nn.Module]:
    """The networks that an objective asks, also those in a list, no part of its state."""
    for part in objective.children():
        yield part.net if isinstance(part, AveragedTeacher) else part
    for held in vars(objective).values():
        if isinstance(held, list):
            yield from (part for part in held if isinstance(part, nn.Module))
