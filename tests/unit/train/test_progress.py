import io

from rich.console import Console

from ubgen.train.progress import figures, progress

METRICS = {"loss": 1.25, "quality": 3.0, "images_per_second": 4.0, "generator_lr": 1e-4}


def test_figures_show_what_was_measured() -> None:
    assert figures(METRICS) == "loss 1.250, quality 3.00, 4 images/s"


def test_a_log_gets_lines_with_the_time_left() -> None:
    text = io.StringIO()
    with progress(Console(file=text, width=100), done=2, total=4) as advance:
        advance(METRICS)
        advance(METRICS)
    lines = text.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["3/4", "4/4"]
    assert "0:00:00 left, loss 1.250" in lines[1]


def test_a_terminal_gets_a_bar() -> None:
    text = io.StringIO()
    with progress(Console(file=text, width=100, force_terminal=True), done=0, total=2) as advance:
        advance(METRICS)
    assert "1/2" in text.getvalue()
    assert "loss 1.250" in text.getvalue()
