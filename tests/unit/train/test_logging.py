from ubgen.train.logging import figures

METRICS = {"loss": 1.25, "quality": 3.0, "images_per_second": 4.0, "generator_lr": 1e-4}


def test_figures_show_what_was_measured() -> None:
    assert figures(METRICS) == "loss 1.250, quality 3.00, 4 images/s"
