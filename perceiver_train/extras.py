"""The optional dependencies of pyproject.toml: models alone need torch, numpy and pydantic, the rest is an extra."""

import importlib.util

EXTRA = "train"
"""What every command needs, and every function of the Python interface but `create_model` and `list_models`."""
OTHERS = {
    "s3fs": "s3",
    "boto3": "s3",
    "transformers": "models",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "wandb": "wandb",
}
OURS = {"perceiver", "perceiver_train", "pipelines", "cluster", "tune"}


def check(what: str) -> None:
    """Check that the extra is installed.

    Raises:
        ImportError: it is not; the message names it.
    """
    try:
        installed = importlib.util.find_spec("ray") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise ImportError(lacks(what, ModuleNotFoundError(name="ray")), name="ray")


def lacks(what: str, error: ModuleNotFoundError) -> str:
    """Return one line for a module of an extra that is not installed; empty if the module is ours.

    Args:
        what: what needs the module.
        error: raised by its import.
    """
    module = (error.name or "").partition(".")[0]
    if not module or module in OURS:
        return ""
    return f"{what} needs {module}, which is not installed: pip install 'perceiver-train[{OTHERS.get(module, EXTRA)}]'"
