"""Clears of a recorded CUDA graph, which become kernels, in a graph that is not there."""

from types import SimpleNamespace

import pytest

from training import cuda_graphs

MEMSET, KERNEL = "memset", "kernel"
PLAIN = SimpleNamespace(from_port=0, to_port=0, type=0)


class Driver:
    """What ``cuda.bindings.driver`` says of a chain of nodes: kernels, and clears of so many bytes.
    Functions know data of edges, as in CUDA 13.
    """

    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_MEMSET=MEMSET)
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def __init__(self, chain, edge=PLAIN):
        self.nodes = {i: (KERNEL if x is None else MEMSET, x) for i, x in enumerate(chain)}
        self.edges = {(i, i + 1): edge for i in range(len(chain) - 1)}
        self.kernels = {}

    def cuGraphGetNodes(self, graph, count=0):
        return 0, list(self.nodes), len(self.nodes)

    def cuGraphNodeGetType(self, node):
        return 0, self.nodes[node][0]

    def cuGraphMemsetNodeGetParams(self, node):
        size = self.nodes[node][1]
        return 0, SimpleNamespace(elementSize=1, width=size, height=1, value=0, dst=64 * node)

    def cuGraphNodeGetDependencies(self, node, count=0):
        found = [(a, e) for (a, b), e in self.edges.items() if b == node]
        return 0, [a for a, _ in found], [e for _, e in found], len(found)

    def cuGraphNodeGetDependentNodes(self, node, count=0):
        found = [(b, e) for (a, b), e in self.edges.items() if a == node]
        return 0, [b for b, _ in found], [e for _, e in found], len(found)

    def cuGraphAddKernelNode(self, graph, before, count, kernel):
        node = max(self.nodes) + 1
        self.nodes[node], self.kernels[node] = (KERNEL, None), kernel
        for a in before:
            assert a in self.nodes
            self.edges[a, node] = PLAIN
        return 0, node

    def cuGraphAddDependencies(self, graph, before, after, data, count):
        for pair in zip(before, after, strict=True):
            assert pair not in self.edges
            self.edges[pair] = PLAIN
        return (0,)

    def cuGraphDestroyNode(self, node):
        del self.nodes[node]
        self.edges = {pair: e for pair, e in self.edges.items() if node not in pair}
        return (0,)

    def chain(self):
        """The nodes in their order."""
        after = dict(self.edges)
        (node,) = set(self.nodes) - {b for _, b in after}
        found = [node]
        while len(found) < len(self.nodes):
            (node,) = (b for a, b in after if a == found[-1])
            found.append(node)
        return found


class Graph:
    instantiated = 0

    def raw_cuda_graph(self):
        return "graph"

    def instantiate(self):
        self.instantiated += 1


def finish(monkeypatch, driver):
    graph = Graph()
    monkeypatch.setattr(cuda_graphs, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_graphs, "_clear", lambda _: "clear")
    monkeypatch.setattr(cuda_graphs.torch.cuda, "current_device", lambda: 0)
    replaced = cuda_graphs.finish(graph)
    return replaced, graph.instantiated


def test_small_clears_become_kernels_in_the_same_place(monkeypatch):
    driver = Driver([None, 4, 8, None, 1 << 20, 3, 4])  # large, and no whole words
    assert finish(monkeypatch, driver) == (3, 1)
    places = [driver.kernels[n].kernelParams[0][0] if n in driver.kernels else n
              for n in driver.chain()]  # fmt: skip
    assert places == [0, 64 * 1, 64 * 2, 3, 4, 5, 64 * 6]
    threads = {k.kernelParams[0][0]: k.blockDimX for k in driver.kernels.values()}
    assert threads == {64: 1, 128: 2, 384: 1}
    assert {k.func for k in driver.kernels.values()} == {"clear"}


def test_a_clear_at_another_edge_than_a_plain_one_stays(monkeypatch):
    edge = SimpleNamespace(from_port=1, to_port=0, type=1)
    driver = Driver([None, 4, None], edge)
    assert finish(monkeypatch, driver) == (0, 1)
    assert driver.chain() == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, ValueError])
def test_a_graph_that_cannot_be_read_stays_as_it_was_recorded(monkeypatch, error):
    class Old(Driver):
        def cuGraphNodeGetDependentNodes(self, node, count=0):
            raise error

    driver = Old([None, 4, None])
    assert finish(monkeypatch, driver) == (0, 1)
    assert driver.chain() == [0, 1, 2]


def test_without_bindings_a_graph_is_replayed_as_ever(monkeypatch):
    assert finish(monkeypatch, None) == (0, 0)
