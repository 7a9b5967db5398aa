"""A CUDA graph whose small clears are kernels.

cuBLAS and cuDNN clear a counter of four bytes before most products. A graph keeps that as a memset
node, and a kernel on either side of such a node waits: on an H100 1.4 us before it and 2.9 behind,
which between two kernels is nothing. A step of DiT-XL/2 has 339. So every clear of a few bytes
becomes a kernel that stores the same zeros.

It takes CUDA's own interface to graphs, ``cuda.bindings``, which PyTorch brings along. Where that
is missing, or a node is anything but such a clear, the graph stays as it was recorded.
"""

import ctypes
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch

LARGEST = 1024  # bytes: a thread stores four
_CLEAR = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry clear(.param .u64 place)
{
    .reg .u32 %thread;
    .reg .u64 %at, %offset;
    ld.param.u64 %at, [place];
    mov.u32 %thread, %tid.x;
    mul.wide.u32 %offset, %thread, 4;
    add.u64 %at, %at, %offset;
    st.u32 [%at], 0;
    ret;
}
"""


def new_graph() -> torch.cuda.CUDAGraph:
    """One that ``finish`` can change before it is replayed."""
    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:  # a PyTorch whose graphs cannot be changed
        return torch.cuda.CUDAGraph()


def finish(graph: torch.cuda.CUDAGraph) -> int:
    """Makes the clears of a recorded graph kernels; how many."""
    driver = _driver()
    if driver is None:
        return 0
    try:
        recorded = graph.raw_cuda_graph()
    except (AttributeError, RuntimeError):  # not kept
        return 0
    clears: list[Any] = []
    renewed: dict[int, Any] = {}  # clears may be neighbours
    with suppress(AttributeError, RuntimeError, ValueError):  # bindings or a driver too old
        kernel = _clear(torch.cuda.current_device())
        found = (_found(driver, node) for node in _nodes(driver, recorded))
        clears = [(*clear, kernel) for clear in found if clear is not None]
    for node, before, after, place, size, kernel in clears:
        before, after = ([renewed.get(int(n), n) for n in nodes] for nodes in (before, after))
        renewed[int(node)] = _added(driver, recorded, before, after, place, size, kernel)
        _call(driver.cuGraphDestroyNode, node)  # and its edges
    graph.instantiate()
    return len(clears)


def _driver() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError:
        return None


def _call(function: Any, *args: Any) -> list[Any]:
    """What a function of the driver returns behind its status."""
    status, *results = function(*args)
    if int(status):
        raise RuntimeError(f"{function.__name__} returned {status}; use cuda_graphs=false")
    return results


def _nodes(driver: Any, graph: Any) -> list[Any]:
    _, count = _call(driver.cuGraphGetNodes, graph)
    nodes, _ = _call(driver.cuGraphGetNodes, graph, count)
    return nodes[:count]


def _found(driver: Any, node: Any) -> tuple[Any, ...] | None:
    """Of a small clear the node, its neighbours before and after, place and bytes."""
    (kind,) = _call(driver.cuGraphNodeGetType, node)
    if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
        return None
    (memset,) = _call(driver.cuGraphMemsetNodeGetParams, node)
    size, place = memset.elementSize * memset.width, int(memset.dst)
    if memset.value or memset.height != 1 or size > LARGEST or size % 4 or place % 4:
        return None
    before = _neighbours(driver, "cuGraphNodeGetDependencies", node)
    after = _neighbours(driver, "cuGraphNodeGetDependentNodes", node)
    return None if before is None or after is None else (node, before, after, place, size)


def _added(
    driver: Any,
    graph: Any,
    before: list[Any],
    after: list[Any],
    place: int,
    size: int,
    function: Any,
) -> Any:
    """A kernel node between these."""
    kernel = driver.CUDA_KERNEL_NODE_PARAMS()
    kernel.func = function
    kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = 1
    kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = size // 4, 1, 1
    kernel.sharedMemBytes = 0
    kernel.kernelParams = ((place,), (ctypes.c_void_p,))
    (clear,) = _call(driver.cuGraphAddKernelNode, graph, before, len(before), kernel)
    if after:
        add = _of_edges(driver, "cuGraphAddDependencies")
        _call(add, graph, [clear] * len(after), after, None, len(after))
    return clear


def _of_edges(driver: Any, name: str) -> Any:
    """A function that knows edges with data: the second version in CUDA 12, the only one in 13."""
    return getattr(driver, f"{name}_v2", None) or getattr(driver, name)


def _neighbours(driver: Any, name: str, node: Any) -> list[Any] | None:
    """Nodes at the other end of plain edges; None where an edge is another one."""
    function = _of_edges(driver, name)
    *_, count = _call(function, node)
    if count == 0:
        return []
    nodes, edges, _ = _call(function, node, count)
    plain = all(not (e.from_port or e.to_port or int(e.type)) for e in edges[:count])
    return nodes[:count] if plain else None


@cache
def _clear(device: int) -> Any:
    """The kernel, which stays loaded. ``device`` is the current one."""
    driver = _driver()
    (module,) = _call(driver.cuModuleLoadData, _CLEAR + b"\0")
    (function,) = _call(driver.cuModuleGetFunction, module, b"clear")
    return function
