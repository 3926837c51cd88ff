"""`compile`, `CompilationConfig`, `compile_unet` and `compile_vae` under the names that stable-fast gave them.

Everything here is sfast itself: no second compiler, no second set of options. The fields that lost their meaning are
accepted and documented in `sfast.CompilationConfig`.
"""

from torch import nn

from sfast import CompilationConfig, compile

__all__ = ["CompilationConfig", "compile", "compile_unet", "compile_vae"]


def compile_unet(module: nn.Module, config: CompilationConfig | None = None) -> nn.Module:
    """Compiles one denoiser (a UNet, a transformer, a ControlNet) in place, and returns it."""
    return compile(module, config)


def compile_vae(module: nn.Module, config: CompilationConfig | None = None) -> nn.Module:
    """Compiles a VAE's encoder and decoder in place, and returns the VAE."""
    return compile(module, config)
