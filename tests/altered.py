"""A worker process with something in it changed, without a word of that in the product."""

from pathlib import Path

from tests.worker_process import ROOT


def altered(directory: Path, code: str) -> dict[str, str]:
    """Settings for a `WorkerProcess` that runs this code before anything of its own; `directory` gets a file.

    The interpreter imports `sitecustomize` at its start, from wherever it finds it first.
    """
    folder = directory / "altered"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}
