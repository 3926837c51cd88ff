"""The older of stable-fast's two import paths; the same names as `diffusion_pipeline_compiler`."""

from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, compile, compile_unet, compile_vae

__all__ = ["CompilationConfig", "compile", "compile_unet", "compile_vae"]
