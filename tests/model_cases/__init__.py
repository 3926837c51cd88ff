"""What the classes of diffusers are built and called with, where their signatures do not say it."""

from tests.every_model import Case
from tests.model_cases import autoencoders, conditions, images, sounds, unets, videos

MODULES = (unets, images, videos, sounds, autoencoders, conditions)
CASES: dict[str, Case] = {name: case for module in MODULES for name, case in module.CASES.items()}

# What is not tried, and why.
UNCOVERED: dict[str, str] = {
    "RFD4ProteinaAutoencoder": "it takes some forty features of a protein",
    "RFD4ProteinaTransformer": "it takes some forty features of a protein",
    "WanAnimate2Transformer3DModel": "it attends with flex_attention over a cache object of its own, and so stays eager",
    "ControlNetXSAdapter": "its forward raises: its layers are called by `UNetControlNetXSModel`, which is tried",
    "MotionAdapter": "it has no forward: its layers are moved into `UNetMotionModel`, which is tried",
}
