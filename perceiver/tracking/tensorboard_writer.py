"""Writes the metrics of a run to TensorBoard's event files. Runs in a separate process, as MLflow's writer does.

Each start writes all rows of `history.jsonl` to a new file, and deletes those of earlier starts: a resumed run repeats
steps, and a point in an event file cannot be replaced. So there is one curve, with each recorded point once.
"""

from pathlib import Path

from tensorboardX import SummaryWriter

from perceiver.tracking.following import INTERVAL_S, follow
from perceiver.tracking.record import HISTORY, read_rows

FOLDER = "tensorboard"


class EventWriter:
    """Copies the rows of a run's record to `tensorboard/` of its folder."""

    def __init__(self, folder: Path) -> None:
        for before in (folder / FOLDER).glob("events.out.tfevents.*"):
            before.unlink()
        self._history, self._offset = folder / HISTORY, 0
        # A TensorBoard that has read an earlier file discards its points from `purge_step` on.
        self._events = SummaryWriter(str(folder / FOLDER), purge_step=0, flush_secs=int(INTERVAL_S))

    def send(self) -> None:
        """Write the rows that are recorded and not written yet."""
        rows, end = read_rows(self._history, self._offset)
        while end > self._offset:
            for row in rows:
                step, time_s = int(row.pop("step")), row.pop("time")
                for key, value in row.items():
                    self._events.add_scalar(key, value, step, walltime=time_s)
            self._offset = end
            rows, end = read_rows(self._history, end)

    def close(self) -> None:
        """Write what is in memory, and close the file."""
        self._events.close()


if __name__ == "__main__":
    follow(lambda request: EventWriter(Path(request["folder"])))
