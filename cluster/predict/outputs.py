"""A task's predictions as tables and Parquet files."""

from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from perceiver.tasks import Batch, known_targets

FIRST = ("sample_id", "key", "label", "prediction", "class", "classes", "answer", "ended")
"""The first columns, if present."""


def predicted(task: Any, model: nn.Module, batch: Batch) -> pa.Table:
    """Return one row per sample of the batch: `sample_id`, the true values if there are any, and the task's outputs.

    Padding and bad samples are left out. Outputs with more axes become lists, masks (B, H, W) uint8 PNG files.
    """
    keep = batch["valid"]
    with torch.inference_mode():
        outputs = task.predict(model, batch)
    found = {"sample_id": batch["sample_id"], **known_targets(task, batch), **outputs}
    return pa.table({name: _column(values[keep]) for name, values in found.items()})


def _column(values: Tensor) -> pa.Array:
    if values.dtype == torch.uint8 and values.ndim == 3:
        return pa.array([_png(mask) for mask in values.cpu().numpy()], pa.binary())
    array = (values.float() if values.is_floating_point() else values).cpu().numpy()
    column = pa.array(array.ravel())
    for axis in range(array.ndim - 1, 0, -1):
        size = array.shape[axis]
        rows = int(np.prod(array.shape[:axis]))
        column = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * size, column)
    return column


def _png(mask: NDArray[np.uint8]) -> bytes:
    sink = BytesIO()
    Image.fromarray(mask).save(sink, "PNG")
    return sink.getvalue()


def parquet(rows: pa.Table) -> bytes:
    """Return the rows as a Parquet file, the columns of `FIRST` first."""
    order = [name for name in FIRST if name in rows.column_names]
    sink = BytesIO()
    pq.write_table(rows.select(order + [name for name in rows.column_names if name not in FIRST]), sink)
    return sink.getvalue()
