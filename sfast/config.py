"""What a user may choose, as one flat dataclass that is checked whenever it is built or changed.

Building one imports no kernel and touches no GPU. The defaults are lossless and right for almost everybody.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch

# Fields of stable-fast that no longer decide anything, and why. They are accepted so that existing scripts run unchanged.
RETIRED = {
    "enable_jit_freeze": "nothing is ever frozen: weights are inputs of the graph, so they stay editable and are never copied",
    "preserve_parameters": "parameters are always preserved",
    "prefer_lowp_gemm": "matrix products always accumulate in fp32: the default is lossless",
    "trace_scheduler": "a scheduler's few small kernels are hidden behind the next step once nobody waits for the GPU, "
    "which is what `enable_host_timesteps` sees to",
}


@dataclasses.dataclass
class CompilationConfig:
    """Options of `sfast.compile`. Every field may be assigned after construction; a wrong value raises at once.

    Args:
        memory_format: layout given to 4-D convolution weights on a GPU, `torch.channels_last` (the layout tensor cores
            read) or `torch.contiguous_format` (leave everything as it is). `None` means the same as `contiguous_format`.
        enable_jit: trace the modules and rewrite their graphs. Without it a CUDA graph of the eager module is captured.
        enable_cnn_optimization: fuse convolutions with bias, residual and activation; let cuDNN choose by measuring.
        enable_fused_linear_geglu: fuse linear layers with the GELU, SiLU or GEGLU that follows.
        enable_fused_linears: compute linear layers, with a residual that follows, by the native operators' fastest algorithm.
        enable_triton: use Triton kernels for normalizations, activations and the blending of video frames.
        enable_fused_modulation: join the gates, residuals, norms and modulations of diffusion transformers in Triton kernels.
        enable_fused_rotary: normalize, rotate and concatenate queries and keys in one Triton kernel.
        enable_memory_kernels: use Triton kernels for what only moves memory: nearest upsampling, concatenation of channels.
        enable_native: use the compiled cuDNN and cuBLASLt operators when they are installed.
        enable_fused_attention: choose the kernel of each attention by measuring, from PyTorch's, Triton's and native ones.
        enable_xformers: use xformers' attention where it is installed and works, before all others.
        enable_merged_linears: compute linear layers that read the same tensor, such as queries, keys and values, in one
            product. Their weights move next to each other in memory; nothing is copied for good.
        enable_hoisting: compute what only the prompt (or a control image, or a size) decides once, and not at every step.
            `None` means in pipelines, where a new picture is always noticed. In a module compiled alone, writing through
            `tensor.data` in place is not noticed while the prompt stays the same object, so there it is asked for by name.
        enable_host_timesteps: let a pipeline's scheduler read the timestep in the host's memory instead of waiting for
            the GPU at every step.
        enable_gpu_pixels: round a pipeline's pictures to bytes on the GPU and not on the host.
        enable_cuda_graph: capture one CUDA graph per input shape and replay it.
        verify: compare the first result at every new shape with eager, and fall back where they disagree.
        graph_memory_budget: bytes that captured graphs may hold on one GPU; the least recently used are dropped above
            it. `None` means a quarter of the memory that is free or theirs, looked at whenever one is captured.
        enable_jit_freeze, preserve_parameters, prefer_lowp_gemm, trace_scheduler: accepted for scripts written for
            stable-fast and without effect; `sfast.config.RETIRED` says why.

    Raises:
        TypeError: unknown field name, or a value of the wrong type.
        ValueError: a value out of range, or two fields that contradict each other.
    """

    memory_format: torch.memory_format | None = torch.channels_last
    enable_jit: bool = True
    enable_jit_freeze: bool = True
    preserve_parameters: bool = True
    enable_cnn_optimization: bool = True
    enable_fused_linear_geglu: bool = True
    enable_fused_linears: bool = True
    prefer_lowp_gemm: bool = True
    enable_fused_attention: bool = True
    enable_xformers: bool = False
    enable_merged_linears: bool = True
    enable_hoisting: bool | None = None
    enable_host_timesteps: bool = True
    enable_gpu_pixels: bool = True
    enable_cuda_graph: bool = True
    enable_triton: bool = True
    enable_fused_modulation: bool = True
    enable_fused_rotary: bool = True
    enable_memory_kernels: bool = True
    enable_native: bool = True
    trace_scheduler: bool = False
    verify: bool = True
    graph_memory_budget: int | None = None

    def __new__(cls, *args: Any, **fields: Any) -> CompilationConfig:
        for name in fields:
            _check_name(name)
        return super().__new__(cls)

    @classmethod
    def Default(cls) -> CompilationConfig:  # noqa: N802 - the name that stable-fast's users have in their scripts
        """The defaults, under the name that scripts written for stable-fast use."""
        return cls()

    def __setattr__(self, name: str, value: Any) -> None:
        _check_name(name)
        _check_value(name, value)
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raise ValueError where fields that are fine alone contradict each other."""
        if self.enable_xformers and not self.enable_jit:
            raise ValueError(
                "`enable_xformers=True` replaces attention in the traced graph and needs `enable_jit=True`, got "
                "`enable_jit=False`; allowed: turn one of the two around."
            )

    def __post_init__(self) -> None:
        self.check()


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(CompilationConfig)]


def _check_name(name: str) -> None:
    names = _names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise TypeError(f"CompilationConfig has no field `{name}`.{hint} Allowed: {', '.join(names)}.")


def _check_value(name: str, value: Any) -> None:
    if name == "memory_format":
        formats = (None, torch.channels_last, torch.contiguous_format)
        if value is not None and not isinstance(value, torch.memory_format):
            raise TypeError(f"`memory_format` must be a torch.memory_format or None, got {value!r}.")
        if value not in formats:
            raise ValueError(
                f"`memory_format` must be torch.channels_last, torch.contiguous_format or None, got {value!r}."
            )
    elif name == "graph_memory_budget":
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"`graph_memory_budget` must be a number of bytes (int) or None, got {value!r}.")
        if value is not None and value < 0:
            raise ValueError(f"`graph_memory_budget` must not be negative, got {value}.")
    elif not isinstance(value, bool) and not (name == "enable_hoisting" and value is None):
        allowed = "True, False or None" if name == "enable_hoisting" else "True or False"
        raise TypeError(f"`{name}` must be {allowed}, got {value!r}.")
