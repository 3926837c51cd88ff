"""sfast makes a diffusers pipeline fast with one line, without changing what it draws: `pipe = sfast.compile(pipe)`."""

from sfast.compiler import compile, restore
from sfast.config import CompilationConfig
from sfast.lora import swap_lora
from sfast.report import Report, report

__version__ = "0.1.0"
__all__ = ["CompilationConfig", "Report", "compile", "report", "restore", "swap_lora"]
