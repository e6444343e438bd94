"""ubgen-report: one HTML file about finished stage directories."""

from pathlib import Path

import tyro

from ubgen.core.errors import run


def report(
    paths: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("report.html"),
    title: str = "Dataset generation report",
) -> None:
    """One HTML file that needs no network: what was run, curves, pictures, scores, and the paper's figures beside.

    Args:
        paths: Finished directories of ubgen-train, -export, -synth, -pretrain and -eval, or of ubgen-dataset stats
            --out; a directory that holds such ones stands for all of them. Any subset will do.
        out: File to write. An earlier report is replaced.
        title: Heading of the page.
    """
    from ubgen.report.page import (
        write_report,  # with the libraries of the evaluation, for which --help need not wait
    )

    found = write_report(paths, out, title)
    for name, reason in found.others:
        print(f"not shown: {name}: {reason}")
    size = out.stat().st_size / 1e6
    print(f"{out}: {len(found.finished) + len(found.stats)} directories, {size:.1f} MB")


def main() -> None:
    """Entry point of the `ubgen-report` command."""
    run(lambda: tyro.cli(report, prog="ubgen-report"), resumes=False)


if __name__ == "__main__":
    main()
