"""Callbacks: progress lines, panels as files."""

from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch

from callbacks.media import write_panel
from callbacks.progress import Bars, Lines, progress
from models.image import read_image


def test_panels_are_images_or_videos(tmp_path):
    image = write_panel(tmp_path / "view", 250, torch.zeros(3, 20, 24))
    assert image.name == "0000250.png" and read_image(image).shape == (1, 3, 20, 24)
    video = write_panel(tmp_path / "turn", 7, torch.zeros(5, 3, 16, 16))
    assert video.name == "0000007.mp4" and imageio_ffmpeg.count_frames_and_secs(str(video))[0] == 5


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_on_a_terminal_and_lines_elsewhere(monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert isinstance(progress(), Bars if terminal else Lines)


class TestLines:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr("callbacks.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
        return clock

    @pytest.fixture
    def lines(self, clock):
        lines = Lines(seconds=10)
        lines._begin("fit")
        return lines

    def test_time_left_counts_from_where_a_run_resumed(self, lines, clock, capsys):
        lines._begin("fit", 100)
        for done in range(101, 121):
            clock.now += 1
            lines._line("fit", done, 200, {"loss": 0.25})
        text = capsys.readouterr().out.splitlines()
        assert text == [
            "fit 110/200, 0:01:30 left, 1.00 it/s, loss 0.25",
            "fit 120/200, 0:01:20 left, 1.00 it/s, loss 0.25",
        ]

    def test_the_last_step_is_shown_and_an_endless_run_has_no_end(self, lines, clock, capsys):
        clock.now = 1
        lines._line("fit", 1, 1, {})
        clock.now = 20
        lines._line("fit", 2, float("inf"), {})
        assert capsys.readouterr().out.splitlines() == ["fit 1/1, 0:00:00 left, 1.00 it/s", "fit 2, 0.10 it/s"]

    def test_validation_within_a_resumed_fit_has_a_clock_of_its_own(self, lines, clock, capsys):
        lines._begin("fit", 1)
        lines.on_validation_start(None, None)
        clock.now = 2
        lines._line("validate", 1, 1, {})
        clock.now = 12
        lines._line("fit", 7, 13, {})
        assert capsys.readouterr().out.splitlines() == [
            "validate 1/1, 0:00:00 left, 0.50 it/s",
            "fit 7/13, 0:00:12 left, 0.50 it/s",
        ]

    def test_prints_for_the_stage_and_can_be_switched_off(self, lines, clock, capsys):
        lines.print("hello", sep="")
        lines.disable()
        clock.now = 60
        lines._line("fit", 1, 1, {})
        assert capsys.readouterr().out == "hello\n" and not lines.is_enabled
