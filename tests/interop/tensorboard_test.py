"""The tensorboard package reads our event files, and they say what metrics.jsonl says."""
import math

from support import rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_events_equal_metrics(trained):
    folder = trained("llama")
    lines = [file for file in folder.rglob("metrics.jsonl")]
    assert len(lines) == 1, f"one metrics.jsonl expected under {folder}"
    metrics = rows_of(lines[0].read_text())
    events = EventAccumulator(str(lines[0].parent / "tensorboard"))
    events.Reload()
    loss = {e.step: e.value for e in events.Scalars("train/loss")}
    expected = {row["step"]: row["train/loss"] for row in metrics if "train/loss" in row}
    assert len(expected) == 12 and loss.keys() == expected.keys()
    for step, value in expected.items():
        assert math.isclose(loss[step], value, rel_tol=1e-6), f"step {step}"
    tags = {tag for row in metrics for tag in row} - {"step", "time"}
    assert set(events.Tags()["scalars"]) == tags
