"""The notebook of the documents runs from its first cell to its last."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first-run.ipynb"


def write_digits(folder: Path) -> None:
    """Write ten classes of 28 x 28 pixels that differ in where they are bright."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for label in range(10):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (28, 28))
                top, left = 3 + 11 * (label // 5), 1 + 5 * (label % 5)
                pixels[top : top + 10, left : left + 5] += 180
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")


def source(cell: nbformat.NotebookNode) -> str:
    return "".join(cell["source"])


@pytest.mark.slow
def test_the_notebook_trains_looks_and_predicts(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert "SOURCE" in source(parameters) and "EPOCHS" in source(parameters)
    write_digits(tmp_path / "raw")
    parameters["source"] = f"SOURCE = ['image_folder', {str(tmp_path / 'raw')!r}]\nEPOCHS = 4"
    recipe = yaml.safe_load((ROOT / "recipes/train/quickstart.yaml").read_text())
    recipe |= {"cluster": {"workers": 1}, "tracking": {"enabled": False}}  # not what this test is about
    (tmp_path / "recipes/train").mkdir(parents=True)
    (tmp_path / "recipes/train/quickstart.yaml").write_text(yaml.safe_dump(recipe))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    said = "".join(str(output.get("text", "")) for output in outputs)
    assert len(pictures) == 3, "the curves, the attention maps, the confusion"
    assert "of 40 held-out digits are right" in said and "(1, 1, 16, 784)" not in said
    assert "(4, 1, 16, 784)" in said, "samples, heads, latents and pixels of an attention map"


def test_the_notebook_is_kept_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it as a whole and save it"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert "/home/" not in NOTEBOOK.read_text() and "/work/" not in NOTEBOOK.read_text()
