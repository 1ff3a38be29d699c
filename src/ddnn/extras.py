"""Which optional packages belong to which extra, so that a missing one ends in a sentence."""

PACKAGES = {
    "train": (
        "torch",
        "torchvision",
        "datasets",
        "fsspec",
        "huggingface_hub",
        "pyarrow",
        "pydantic",
        "safetensors",
        "scipy",
        "tensorboard",
        "tomli_w",
    ),
    "timm": ("timm",),
    "examples": ("accelerate", "lightning", "sklearn", "transformers"),
    "export": ("onnx", "onnx_ir", "onnxscript"),
    "runtime": ("onnxruntime",),
    "serve": ("anyio", "starlette", "uvicorn"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "ray": ("ray",),
    "figures": ("jinja2", "markupsafe", "matplotlib"),
}
"""Import names by extra."""


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install where a package of an extra is missing; None where another one is."""
    missing = (error.name or "").partition(".")[0]
    for extra, packages in PACKAGES.items():
        if missing in packages:
            return f"this needs the extra {extra} ({missing} is not installed): pip install 'ddnn[{extra}]'"
    return None
