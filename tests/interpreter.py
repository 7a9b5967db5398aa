"""Triton's interpreter at three times its speed.

At every call of a device function it patches the whole language anew, and it asks of each sum of
integers whether it overflows. In kernels as small as those of the tests that is most of the time.
Next come shapes, which it makes anew for every result and compares by making more, and operands,
which it brings to one shape before NumPy does.

It keeps bfloat16 as integers of 16 bits, of which its products knew nothing.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
from triton import language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

_EVERY = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def quicken() -> None:
    """For good, in this process. A launch patches the language once, and sums wrap as on a GPU."""
    patch, of_scalar = interpreter._patch_lang, cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)

    def dtype(kind):
        return pointer if kind.scalar.is_ptr() else of_scalar(kind.scalar)

    def call(function, *args, **kwargs):
        return function.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda fn: patch(_EVERY)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = dtype
    product = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, *others):
        return product(self, _widened(a), _widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = dot
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter.TensorHandle.__post_init__ = lambda handle: None  # its operators check it too
    _share_shapes()
    _leave_broadcasts_to_numpy()
    _call_at_once()


def _widened(x):
    """bfloat16 as float32."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    words = x.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(words.view(np.float32), tl.float32)


@cache
def _shape(sizes: tuple[int, ...]) -> tuple:
    """One for all blocks of these sizes: as a type has it, as a tensor has it, and their product;
    nothing writes into them."""
    numel = core.validate_block_shape(sizes)
    of_tensor = core.tuple([core.constexpr(n) for n in sizes])
    return core.tuple(list(sizes)), of_tensor, numel, core.constexpr(numel)


def _share_shapes() -> None:
    scalar, constant = (core.tuple([]), core.constexpr(1)), core.constexpr

    def block_type(self, element_ty, shape):
        self.element_ty = element_ty
        self.sizes = tuple([n.value if isinstance(n, constant) else n for n in shape])
        self.shape, _, self.numel, _ = _shape(self.sizes)

    def with_element_ty(self, element_ty):
        return self if element_ty is self.element_ty else core.block_type(element_ty, self.sizes)

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shape(type.sizes)[1::2] if type.is_block() else scalar

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.block_type.with_element_ty = with_element_ty
    core.block_type.to_ir = lambda self, builder: self


@cache
def _both(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return np.broadcast_shapes(left, right)


def _leave_broadcasts_to_numpy() -> None:
    """Of the operands of what is computed element by element. Most have one type already, which is
    one object."""
    meaning = semantic.TritonSemantic
    of_shapes, of_operands = meaning.broadcast_impl_value, meaning.binary_op_type_checking_impl
    of_types = core.dtype.__eq__

    def equal(self, other):
        return self is other or of_types(self, other)

    def broadcast(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else of_shapes(self, lhs, rhs)

    def typed(lhs, rhs):
        """Of one shape, as far as their types say."""
        left, right = lhs.type, rhs.type
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if not left.is_block():
            return core.tensor(lhs.handle, right.with_element_ty(left)), rhs
        if not right.is_block():
            return lhs, core.tensor(rhs.handle, left.with_element_ty(right))
        sizes = _both(left.sizes, right.sizes)
        return tuple(core.tensor(x.handle, core.block_type(x.dtype, sizes)) for x in (lhs, rhs))

    def fits(number, dtype):
        """Whether the other operand's dtype takes it as it is."""
        if type(number) is float:
            return dtype is tl.float32
        return type(number) is int and dtype is not tl.int1 and 0 <= number < 128

    def operands(self, lhs, rhs, *how):
        left, right = type(lhs) is core.tensor, type(rhs) is core.tensor
        if not (left or right):
            return of_operands(self, lhs, rhs, *how)
        x, y = lhs if left else rhs, rhs if right else lhs
        if x.dtype.is_ptr() or y.dtype.is_ptr():
            added = how == (True, True) and x.dtype.is_ptr() and y.dtype.is_int()
            return typed(x, y) if left and added else of_operands(self, lhs, rhs, *how)
        if how[3:] == (True,) and x.dtype is not tl.int32:  # others divide in float32
            return of_operands(self, lhs, rhs, *how)
        if not left and fits(lhs, x.dtype):
            lhs = self.scalar_constant(lhs, x.dtype)
        elif not right and fits(rhs, x.dtype):
            rhs = self.scalar_constant(rhs, x.dtype)
        elif not (left and right and x.dtype is y.dtype):
            return of_operands(self, lhs, rhs, *how)
        return typed(lhs, rhs)

    core.dtype.__eq__ = equal
    meaning.broadcast_impl_value, meaning.binary_op_type_checking_impl = broadcast, operands


def _call_at_once() -> None:
    """Builtins without the function around them, which asks for the semantics that is put in."""
    around = core.to_tensor.__code__

    def put(obj, name, member, builder, scope):
        run = member.__wrapped__ if member.__code__ is around else member

        def given(*args, _semantic=None, **kwargs):
            return run(*args, **kwargs, _semantic=interpreter.interpreter_semantic)

        scope.set_attr(obj, name, given)

    interpreter._patch_attr = put
