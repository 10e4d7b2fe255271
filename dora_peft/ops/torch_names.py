"""Names of torch that are not public, each with what it is for, so that a release that renames one is met here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Variable

# Calls of C: is a torch.func transform at work, is torch.jit.trace recording, how many modes see each operation.
transforming = torch._C._are_functorch_transforms_active
jit_state = torch._C._get_tracing_state
modes = torch._C._len_torch_dispatch_stack
# The tensor within what a torch.func transform has left behind, any other tensor as it is.
unwrap_dead: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead
# Not None if tensors that are saved for backward pass through hooks: non-reentrant checkpointing, offloading. A torch
# without it is assumed to have hooks, which is safe: torch then checks versions itself.
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
# A reshaped tensor that is no view: the output of an autograd function could not be changed in place otherwise.
unsafe_view: Callable[[Tensor, list[int]], Tensor] = torch.ops.aten._unsafe_view
# The address of the current stream of the GPU of this number.
raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
# Batch normalisation's gradients: in evaluation it is y = c * (z - mean) / sqrt(var + eps) + b, a layer's last step.
batch_norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.aten.native_batch_norm_backward.default


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """`function.apply` where no torch.func transform is at work, of which it would look for traces in each argument: a
    third of what an autograd function costs. The public one, if this torch has none such."""
    plain = vars(getattr(torch._C, "_FunctionBase", object)).get("apply")
    return function.apply if plain is None else plain.__get__(None, function)


def is_recorded() -> bool:
    """Whether a mode records operations, or computes shapes alone: make_fx, FakeTensorMode."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(isinstance(m, (ProxyTorchDispatchMode, FakeTensorMode)) for m in _get_current_dispatch_mode_stack())


def after_backward(call: Callable[[], None]) -> None:
    """Have `call` called when the backward pass ends that runs now."""
    Variable._execution_engine.queue_callback(call)


def onednn_linear() -> Callable[..., Tensor] | None:
    """oneDNN's linear layer in fp32, None if this torch has it under another name."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if operation is None else operation.default


def cuda_driver_version() -> int:
    """The newest CUDA that the installed driver can run, 12040 for 12.4; 0 if this torch does not say."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return 0 if ask is None else ask()


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured from the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
